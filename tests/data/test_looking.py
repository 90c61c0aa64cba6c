"""The look before the work, buckets, --append, splits in time, still clips; on a tiny Wan folder."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "data"), str(Path(__file__).parent)]

import looking  # noqa: E402
import prepare  # noqa: E402
import shards  # noqa: E402
from test_prepare import ARGS, make_video  # noqa: E402

from usv.training.buckets import open_shards  # noqa: E402


@pytest.fixture(scope="module")
def settings(tiny_wan):
    def make(videos, out, **changes):
        base = prepare.Settings(tiny_wan, out, 32, 32, 5, 8, 16, videos=videos, caption="a cat", shard_size=4)
        return replace(base, **changes)

    return make


def infos(folder):
    return [info for path in sorted(folder.glob("*.tar")) for *_, info in shards.read_shard(path)]


def test_each_clip_goes_into_the_bucket_of_its_shape(settings, tmp_path):
    for name, size in (("wide", (32, 64)), ("tall", (64, 36)), ("square", (40, 44)), ("wider", (30, 70))):
        make_video(tmp_path / "v" / f"{name}.mp4", 30, size=size)
    out = tmp_path / "out"
    index = prepare.run(settings(tmp_path / "v", out, buckets=((32, 32), (32, 64), (64, 32))))
    assert {f.name: {i["source"] for i in infos(f)} for f in out.iterdir() if f.is_dir()} == {
        "32x32": {"square.mp4"}, "32x64": {"wide.mp4", "wider.mp4"}, "64x32": {"tall.mp4"},
    }  # fmt: skip
    assert {name: part["num_samples"] for name, part in index["splits"].items()} == {
        "32x32/train": 2, "32x64/train": 4, "64x32/train": 2,
    }  # fmt: skip
    assert len(open_shards(sorted(out.iterdir()), 1).shapes) == 3
    assert looking.nearest((1920, 1080), [(480, 832), (832, 480)]) == (832, 480)
    assert looking.nearest((720, 1280), [(240, 416), (480, 832)]) == (480, 832)


def test_append_adds_and_keeps(settings, tmp_path, capsys):
    folder, out = tmp_path / "v", tmp_path / "out"
    for name in "abc":
        make_video(folder / f"{name}.mp4", 30)
    own = settings(folder, out, split={"val": 0.3})
    prepare.run(own)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.tar")}
    for path in folder.glob("*.mp4"):
        os.utime(path, ns=(1, 1))  # copied to another disk: the same content, other times
    prepare.run(own)
    make_video(folder / "d.mp4", levels=[5 * j for j in range(45)])
    with pytest.raises(ValueError, match="d.mp4 was added.*--append adds it"):
        prepare.run(own)
    (folder / "copy.mp4").write_bytes((folder / "a.mp4").read_bytes())
    index = prepare.run(own, append=True)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.tar") if p.name in before} == before
    assert sum(part["num_samples"] for part in index["splits"].values()) == 3 * 2 + 3
    assert sorted(i["source"] for i in infos(out)).count("d.mp4") == 3 and "copy.mp4" not in {i["source"] for i in infos(out)}
    (folder / "copy.mp4").unlink()
    assert prepare.run(own) == index
    keys = [key for path in out.glob("*.tar") for key, *_ in shards.read_shard(path)]
    assert len(set(keys)) == len(keys)


def test_one_video_is_split_in_time(settings, tmp_path):
    make_video(tmp_path / "v" / "film.mp4", levels=[j % 200 for j in range(150)])  # 10 clips
    index = prepare.run(settings(tmp_path / "v", tmp_path / "out", split={"val": 0.2}))
    assert {name: part["num_samples"] for name, part in index["splits"].items()} == {"train": 8, "val": 2}
    held_out = {i["clip"] for p in (tmp_path / "out").glob("val-*.tar") for *_, i in shards.read_shard(p)}
    assert held_out == {8, 9}
    make_video(tmp_path / "w" / "short.mp4", 15)
    with pytest.raises(ValueError, match="--split val=0.2: there is one usable video, and it has 1 clips"):
        prepare.run(settings(tmp_path / "w", tmp_path / "out2", split={"val": 0.2}))


def test_check_says_what_is_odd_and_writes_no_shards(tiny_wan, tmp_path, capsys):
    folder, out = tmp_path / "v", tmp_path / "out"
    make_video(folder / "small.mp4", 30, size=(16, 16))
    make_video(folder / "slow.mp4", 10, fps=4)
    make_video(folder / "wide.mp4", 30, size=(32, 128))
    make_video(folder / "short.mp4", 10)
    (folder / "slow.txt").write_text("a very long caption " * 30)
    (folder / "broken.mp4").write_bytes(b"no video")
    command = ["--videos", str(folder), "--model", str(tiny_wan), "--out", str(out), *ARGS, "--caption", "a cat", "--check"]
    assert prepare.main(command) == 0
    said = capsys.readouterr().err
    for line in ("3 videos, 8 clips of 5 frames at 8 fps", "1 blown up, by up to 2.0x", "down to 25% of the picture",
                 "1 slower than --fps 8, down to 4 a second", "1 captions longer than 16 tokens",
                 "left out: 1 corrupt, 1 too short"):  # fmt: skip
        assert line in said, said
    assert {p.name for p in out.iterdir()} == {"skipped.jsonl", "contact_sheet.png"}
    assert "--num-frames" not in [json.loads(x)["reason"] for x in (out / "skipped.jsonl").read_text().splitlines()][0]


def test_still_clips_are_left_out_by_option(settings, tmp_path):
    levels = [8 * j for j in range(15)] + [120] * 30 + [8 * j for j in range(15)]
    make_video(tmp_path / "v" / "film.mp4", levels=levels)
    index = prepare.run(settings(tmp_path / "v", tmp_path / "out", skip_still=True))
    assert index["splits"]["train"]["num_samples"] == 2 and index["num_skipped"] == 2
    assert index == prepare.run(settings(tmp_path / "v", tmp_path / "out", skip_still=True))


def test_each_caption_of_a_clip_makes_a_sample(settings, tmp_path):
    make_video(tmp_path / "v" / "a.mp4", levels=[5 * j for j in range(45)])
    (tmp_path / "v" / "captions.json").write_text(json.dumps({"a.mp4": ["one", "two"]}))
    index = prepare.run(settings(tmp_path / "v", tmp_path / "out"))
    assert index["splits"]["train"]["num_samples"] == 6
    assert [(i["clip"], i["caption"]) for i in infos(tmp_path / "out")] == [(c, t) for c in range(3) for t in ("one", "two")]


def seen(times, length=None, **more):
    times = np.asarray(times, float)
    return looking.Look("", 0.0, times[-1] + 1 / 24 if length is None else length, times, 24.0, (32, 32), **more)


def test_a_wrong_time_stamp_makes_no_clips(settings, tmp_path):
    own = settings(tmp_path, tmp_path)
    film = np.arange(48) / 24
    assert looking.windows(seen(film), own) == ([[0.0, 3]], "")
    windows, reason = looking.windows(seen([*film, 10_000.0]), own)
    assert windows == [[0.0, 3]] and "one picture stands for 9,998 s" in reason
    windows, _ = looking.windows(seen([*film, *(film + 10_000)]), own)
    assert windows == [[0.0, 3], [10_000.0, 3]]
    assert looking.windows(seen([0.0, 4.0, 8.0], 12.0), own)[0] == [[0.0, 19]], "a slide show is no mistake"


def test_clips_do_not_run_over_cuts(settings, tmp_path):
    windows, _ = looking.windows(seen(np.arange(72) / 24, cuts=(1.0, 1.2)), settings(tmp_path, tmp_path))
    assert windows == [[0.0, 1], [1.2, 3]]


def test_settings_that_cannot_be(tiny_wan, tmp_path, capsys):
    base = ["--videos", str(tmp_path), "--model", str(tiny_wan), "--out", str(tmp_path / "o"), *ARGS[:6], "--max-sequence-length", "16"]
    for wrong in (["--fps", "1e9"], ["--fps", "nan"], ["--fps", "inf"], ["--fps", "-1"]):
        with pytest.raises(SystemExit):
            prepare.main([*base, *wrong])
        assert "--fps" in capsys.readouterr().err
    for wrong in (["--buckets", "480"], ["--buckets", "32x32"], ["--append", "--overwrite"]):
        with pytest.raises(SystemExit):
            prepare.main([*base, *wrong])
    make_video(tmp_path / "a.mp4", 30)
    assert prepare.main([*base, "--fps", "8", "--caption", "x", "--device", "cuda"]) == 1
    assert "sees no CUDA device; use --device cpu" in capsys.readouterr().err


def test_a_name_that_is_no_text(settings, tmp_path):
    made = make_video(tmp_path / "v" / "a.mp4", 15)
    made.rename(os.fsdecode(os.fsencode(tmp_path / "v") + b"/caf\xe9.mp4"))
    (tmp_path / "v" / "b.mp4").write_bytes(b"no video")
    prepare.run(settings(tmp_path / "v", tmp_path / "out"))
    assert [os.fsencode(i["source"]) for i in infos(tmp_path / "out")] == [b"caf\xe9.mp4"]


def test_labels_of_any_type_train(settings, tmp_path):
    folder = tmp_path / "v"
    for name in "ab":
        make_video(folder / f"{name}.mp4", 15)
    rows = [{"file": "a.mp4", "caption": "a", "subject": "dog"}, {"file": "b.mp4", "caption": "b", "subject": 3, "motion": None}]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare.run(settings(folder, tmp_path / "out"))
    batch = next(iter(open_shards(tmp_path / "out", 2, drop_text=0.0)))
    assert sorted(batch["captions"]) == ["a", "b"] and "subject" not in batch and "motion" not in batch


def test_captions_that_are_not_cleaned_need_no_cleaning():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    letters = [*map(chr, range(128)), "  ", "é", "’", "&amp;", "\u2028"]
    captions = [f"a{letter}b" for letter in letters] + letters + [f"{letter} cat" for letter in letters] + ["a <b>cat</b>; 'so' [31m"]
    kept = [caption for caption in captions if looking.CLEAN.fullmatch(caption)]
    assert len(kept) > 250
    assert [prompt_clean(caption) for caption in kept] == kept
