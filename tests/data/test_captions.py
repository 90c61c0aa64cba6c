"""Captions in the layouts of other trainers; paths, encodings and errors."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

from sources import find_videos  # noqa: E402


def folder_of(tmp_path, *names):
    for name in names or ("a.mp4", "sub/b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def found(folder, **options):
    sources, skipped = find_videos(folder, **options)
    return {s.file: s.captions if len(s.captions) > 1 else s.caption for s in sources}, skipped


WHOLE = {"a.mp4": "one, two", "sub/b.mp4": "three"}
ROWS = [("a.mp4", "one, two"), ("sub/b.mp4", "three")]


@pytest.mark.parametrize(
    "name, text",
    {
        "captions.csv": 'file,caption\na.mp4,"one, two"\nsub/b.mp4,three\n',
        "metadata.csv": 'file_name,text\n./a.mp4,"one, two"\nsub\\b.mp4,three\n',  # Hugging Face, from Windows
        "metadata_.csv": 'video,prompt\na.mp4,"one, two"\nsub/b.mp4,three\n',  # DiffSynth
        "semi.csv": "file;caption\na.mp4;one, two\nsub/b.mp4;three\n",
        "metadata.jsonl": "\n".join(json.dumps({"file_name": f, "text": t}) for f, t in ROWS),
        "musubi.jsonl": "\n".join(json.dumps({"video_path": f"/another/machine/{f}", "caption": t}) for f, t in ROWS),
        "metadata.json": json.dumps([{"file_path": f"train/{f}", "text": t, "type": "video"} for f, t in ROWS]),  # VideoX-Fun
        "captions.json": json.dumps(dict(ROWS)),  # diffusion-pipe
    }.items(),
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_other_trainers(tmp_path, name, text, encoding):
    folder = folder_of(tmp_path)
    (folder / name).write_text(text, encoding=encoding)
    assert found(folder) == (WHOLE, [])


def test_absolute_paths_and_tables_in_sub_folders(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "captions.csv").write_text(f'file,caption\n{folder / "a.mp4"},"one, two"\n')
    (folder / "sub" / "metadata.csv").write_text("file_name,text\nb.mp4,three\n")
    assert found(folder) == (WHOLE, [])


def test_lists_of_videos_and_prompts(tmp_path):
    folder = folder_of(tmp_path, "videos/a.mp4", "videos/b.mp4")
    (folder / "videos.txt").write_text("videos/a.mp4\nvideos/b.mp4\n")
    (folder / "prompts.txt").write_text("one\ntwo\n\n")
    assert found(folder)[0] == {"videos/a.mp4": "one", "videos/b.mp4": "two"}
    (folder / "prompts.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"videos.txt has 2 lines and prompts.txt 1"):
        found(folder)


def test_several_captions_a_clip(tmp_path):
    folder = folder_of(tmp_path, "a.mp4")
    (folder / "captions.json").write_text(json.dumps({"a.mp4": ["one", "two", "one"]}))
    assert found(folder)[0] == {"a.mp4": ["one", "two"]}


def test_labels_stay_and_long_captions_too(tmp_path):
    folder = folder_of(tmp_path, "a.mp4", "b.mp4")
    row = {"file": "a.mp4", "caption": "a", "subject": "dog", "tags": ["x"], "score": None}
    (folder / "captions.jsonl").write_text(json.dumps(row))
    (folder / "metadata.csv").write_text("file_name,text\nb.mp4," + "word " * 40_000)
    sources, skipped = find_videos(folder)
    assert sources[0].labels == {"subject": "dog", "tags": ["x"], "score": None} and not skipped
    assert len(sources[1].caption) == 5 * 40_000 - 1


def test_errors_name_the_file(tmp_path):
    folder = folder_of(tmp_path, "a.mp4")
    (folder / "captions.csv").write_bytes("file,caption\na.mp4,café\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"captions.csv is not UTF-8: byte 0xe9 in line 2; save it as UTF-8"):
        found(folder)
    (folder / "captions.csv").unlink()
    (folder / "captions.json").write_text("{")
    with pytest.raises(ValueError, match="captions.json is not JSON"):
        found(folder)
    (folder / "captions.json").unlink()
    (folder / "a.txt").write_bytes("café".encode("cp1252"))
    assert "a.txt is not UTF-8" in found(folder)[1][0]["reason"]
    (folder / "a.txt").unlink()
    (folder / "other.csv").write_text("x,y\n1,2\n")  # a table of something else is none of our business
    (folder / "dataset.json").write_text('{"a": 1}')
    [line] = found(folder)[1]
    assert line["reason"].startswith("no caption: neither a.txt, captions.csv, captions.jsonl, metadata.csv")


def test_folders_that_are_links_are_followed_once(tmp_path):
    real = folder_of(tmp_path / "elsewhere", "b.mp4")
    folder = folder_of(tmp_path / "videos", "a.mp4")
    (folder / "linked").symlink_to(real, target_is_directory=True)
    (real / "back").symlink_to(folder, target_is_directory=True)
    assert set(found(folder, default_caption="x")[0]) == {"a.mp4", "linked/b.mp4"}


def test_other_containers_and_what_is_none(tmp_path):
    names = [f"v{suffix}" for suffix in (".mts", ".m2ts", ".3gp", ".ogv", ".vob", ".mxf", ".dv", ".MP4")]
    folder = folder_of(tmp_path, *names, "named.bin", "strange.xyz", "._v.mp4", *[f"frames/{i:04d}.png" for i in range(5)])
    (folder / "captions.csv").write_text("file,caption\nnamed.bin,a\ngone.mp4,b\n")
    files, skipped = found(folder, default_caption="x")
    assert set(files) == {*names, "named.bin"}
    reasons = {line["file"]: line["reason"] for line in skipped}
    assert reasons.keys() == {"strange.xyz", "frames", "gone.mp4"}
    assert "a folder of 5 pictures; make a video of it" in reasons["frames"] and "missing" in reasons["gone.mp4"]


def test_accents_of_two_kinds(tmp_path):
    folder = folder_of(tmp_path, "cafe\u0301.mp4")  # as macOS writes it
    (folder / "captions.csv").write_text("file,caption\ncaf\u00e9.mp4,one\n", encoding="utf-8")
    assert os.listdir(folder) and list(found(folder)[0].values()) == ["one"]


def test_a_comma_in_a_caption(tmp_path):
    """After a blank a quote still quotes; without quotes the rest of the caption would be lost, so the line is named."""
    folder = folder_of(tmp_path, "a.mp4", "b.mp4")
    (folder / "captions.csv").write_text('file, caption\na.mp4, "a dog, on grass"\nb.mp4, a cat, on a mat\n')
    captions, skipped = found(folder)
    assert captions == {"a.mp4": "a dog, on grass"}
    assert "line 3 has more columns than the first" in skipped[0]["reason"] and "no caption" in skipped[1]["reason"]


@pytest.mark.parametrize("path", ["/w/dogs_512/1.mp4", "C:\\set\\dogs_512\\1.mp4", "1.mp4"])
def test_a_table_speaks_of_its_own_folder_first(tmp_path, path):
    folder = folder_of(tmp_path, "dogs/1.mp4", "1.mp4")
    (folder / "1.txt").write_text("a house")
    (folder / "dogs" / "captions.jsonl").write_text(json.dumps({"video_path": path, "caption": "a dog"}))
    assert found(folder) == ({"1.mp4": "a house", "dogs/1.mp4": "a dog"}, [])


def test_a_film_that_is_gone_gives_its_caption_to_no_other(tmp_path):
    folder = folder_of(tmp_path, "dogs/1.mp4", "2.mp4")
    (folder / "2.txt").write_text("a house")
    (folder / "dogs" / "metadata.csv").write_text("file_name,text\n1.mp4,one dog\n2.mp4,two dogs\n")
    captions, skipped = found(folder)
    assert captions == {"2.mp4": "a house", "dogs/1.mp4": "one dog"}
    assert [(line["file"], line["reason"][:7]) for line in skipped] == [("dogs/2.mp4", "missing")]


def test_lines_end_where_editors_end_them(tmp_path):
    folder = folder_of(tmp_path, "a.mp4", "b.mp4")
    (folder / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "a dog\u2028on grass"}\r\n{"file": "b.mp4", "caption": "cut in half \\ud83d"}\r\n', newline="")
    assert found(folder) == ({"a.mp4": "a dog on grass", "b.mp4": "cut in half \ufffd"}, [])
    (folder / "captions.jsonl").unlink()
    (folder / "videos.txt").write_text("a.mp4\n\nb.mp4\n")
    (folder / "prompts.txt").write_text("a dog\x85on grass\n\na cat\n")
    assert found(folder) == ({"a.mp4": "a dog on grass", "b.mp4": "a cat"}, [])


def test_rows_below_a_word_for_a_file(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "metadata.json").write_text(json.dumps({"videos": [{"file_name": f, "text": t} for f, t in ROWS]}))
    assert found(folder) == (WHOLE, [])


def test_hidden_folders_are_passed_over(tmp_path):
    folder = folder_of(tmp_path, "a.mp4", ".Trash-1000/files/old.mp4", ".cache/huggingface/a.mp4.metadata", ".ipynb_checkpoints/x.mp4")
    (folder / "captions.csv").write_text("file,caption\na.mp4,a dog\n")
    (folder / ".ipynb_checkpoints" / "captions-checkpoint.csv").write_text("file,caption\na.mp4,a dgo\n")
    assert found(folder) == ({"a.mp4": "a dog"}, [])


@pytest.mark.parametrize(
    "files",
    [
        {"captions.json": json.dumps({"a": "one, two", "sub/b": "three"})},
        {"captions.csv": 'file,caption\na,"one, two"\nsub/b,three\n'},
        {"set.ndjson": "\n".join(json.dumps({"file_name": f, "caption": "", "text": t}) for f, t in ROWS)},
        {"metadata.json": json.dumps({"file_name": [f for f, _ in ROWS], "text": [t for _, t in ROWS], "score": [1, 2]})},
        {"metadata.json": json.dumps({"file_name": dict(enumerate(f for f, _ in ROWS)), "text": dict(enumerate(t for _, t in ROWS))})},
        {"a.json": json.dumps({"caption": "one, two", "url": "http://x", "status": "success"}), "sub/b.json": json.dumps({"prompt": "three", "fps": 3})},
        {"a.mp4.txt": "one, two", "sub/labels/b.txt": "three"},
        {"labels/a.txt": "one, two", "captions/b.txt": "three"},
    ],
)
def test_captions_by_stem_in_columns_beside_and_in_folders_of_texts(tmp_path, files):
    folder = folder_of(tmp_path)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    captions, skipped = found(folder)
    assert captions == WHOLE and not skipped


def test_json_that_is_no_table_names_no_videos(tmp_path):
    """What video2dataset notes of each clip, the settings of a program, and the plan of an --out among the videos."""
    folder = folder_of(tmp_path, "a.mp4")
    (folder / "a.txt").write_text("a dog")
    (folder / "a.json").write_text(json.dumps({"url": "http://x", "caption": "another", "key": "0001", "status": "success", "error_message": None}))
    (folder / "config.json").write_text(json.dumps({"name": "mine", "version": "1", "author": "me"}))
    (folder / "plan.json").write_text(json.dumps({"settings": {}, "sources": [{"file": "a.mp4", "caption": "x", "start": 0.0}], "skipped": [], "seen": {}, "parts": [1]}))
    sources, skipped = find_videos(folder)
    assert [(s.caption, s.labels) for s in sources] == [("a dog", {})] and not skipped


@pytest.mark.parametrize("rows", ['a.mp4,"a dog\nb.mp4,a cat\n', 'a.mp4,"a dog\nb.mp4,"a cat"\n'])
def test_a_quote_that_does_not_close_swallows_no_rows(tmp_path, rows):
    folder = folder_of(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (folder / "captions.csv").write_text('file,caption\n\nc.mp4,"a bird\nthat sings"\n\n' + rows)
    captions, skipped = found(folder)
    assert captions == {"c.mp4": "a bird that sings"}
    assert "opens a quote that does not close" in skipped[0]["reason"] and [line["file"] for line in skipped[1:]] == ["a.mp4", "b.mp4"]


def test_what_is_there_and_not_read_is_named(tmp_path):
    folder = folder_of(tmp_path, "a.mp4", "moving.webp")
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    (folder / "captions.txt").write_text("a.mp4\ta dog\n")
    (folder / "moving.txt").write_text("a cat")
    reasons = {line["file"]: line["reason"] for line in found(folder)[1]}
    assert "metadata.parquet, captions.txt is there, of a kind that is not read" in reasons["a.mp4"]
    assert "a picture with a caption" in reasons["moving.webp"]
