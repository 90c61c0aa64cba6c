"""A folder that is written again: --append, --overwrite and the folders of --buckets."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "data"), str(Path(__file__).parent)]

import prepare  # noqa: E402
import shards  # noqa: E402
from test_prepare import make_video  # noqa: E402

from usv.training.buckets import open_shards  # noqa: E402
from usv.training.data import DataError  # noqa: E402

SIZES = (32, 32), (32, 64), (64, 32)


@pytest.fixture
def settings(tiny_wan, tmp_path):
    return prepare.Settings(tiny_wan, tmp_path / "out", 32, 32, 5, 8, 16, videos=tmp_path / "v", caption="a cat", shard_size=4)


def film(settings, name: str, frames=30, step=5, size=(48, 64)) -> Path:
    return make_video(settings.videos / name, levels=[step * j % 240 for j in range(frames)], size=size)


def samples(index: dict) -> dict[str, int]:
    return {name: part["num_samples"] for name, part in index["splits"].items()}


def left_out(settings) -> dict[str, str]:
    return {line["file"]: line["reason"] for line in map(json.loads, (settings.out / "skipped.jsonl").read_text().splitlines())}


def other_text_encoder(model: Path, folder: Path) -> Path:
    from transformers import UMT5EncoderModel

    shutil.copytree(model, folder)
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    encoder.shared.weight.data.mul_(-1)
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def test_overwrite_makes_the_empty_prompt_anew(settings, tmp_path):
    """It stands for captions that training drops: the old model's would be trained on without a word."""
    film(settings, "a.mp4")
    prepare.run(settings)
    before = load_file(settings.out / "empty.safetensors")["text"]
    other = replace(settings, model=other_text_encoder(settings.model, tmp_path / "other"))
    prepare.run(other, overwrite=True)
    prepare.run(replace(other, out=tmp_path / "fresh"))
    now, fresh = (load_file(folder / "empty.safetensors")["text"] for folder in (settings.out, tmp_path / "fresh"))
    assert now.equal(fresh) and not now.equal(before)


def test_the_sizes_have_folders_whatever_the_name_of_the_whole(settings):
    for name, size in (("square.mp4", (48, 48)), ("wide.mp4", (32, 64)), ("tall.mp4", (64, 36))):
        film(settings, name, size=size)
    index = prepare.run(replace(settings, out=settings.out / "32x32", buckets=SIZES))
    assert samples(index) == {"32x32/train": 2, "32x64/train": 2, "64x32/train": 2}


def test_a_size_that_no_clip_has(settings, capsys):
    film(settings, "wide.mp4", size=(32, 64))
    film(settings, "square.mp4", size=(48, 48))
    prepare.run(replace(settings, buckets=SIZES))
    assert "64x32: nothing to write: no video has this shape" in capsys.readouterr().err
    assert len(open_shards(str(settings.out / "*"), 1).shapes) == 2
    with pytest.raises(DataError, match="64x32"):  # named, it is missed
        open_shards(str(settings.out / "64x32"), 1)


def test_a_short_film_alone_in_its_size_is_trained_on(settings):
    for number in range(3):
        film(settings, f"{number}.mp4", step=3 + number, size=(48, 48))
    film(settings, "tall.mp4", 15, size=(64, 36))
    index = prepare.run(replace(settings, buckets=SIZES[::-1], split={"val": 0.3}))
    assert samples(index) == {"64x32/train": 1, "32x32/train": 4, "32x32/val": 2}


def test_fewer_new_films_than_splits_are_trained_on(settings):
    own = replace(settings, split={"val": 0.2, "test": 0.2})
    for number in range(4):
        film(settings, f"{number}.mp4", step=3 + number)
    before = samples(prepare.run(own))
    for number in range(2):
        film(settings, f"new{number}.mp4", step=9 + number)
    assert samples(prepare.run(own, append=True)) == {**before, "train": before["train"] + 4}


def test_append_says_what_it_leaves_out_and_forgets_what_is_mended(settings):
    own = replace(settings, caption=None)
    film(settings, "a.mp4").with_suffix(".txt").write_text("one")
    film(settings, "b.mp4", step=4)
    prepare.run(own)
    assert list(left_out(own)) == ["b.mp4"]
    film(settings, "c.mp4", step=7)
    (settings.videos / "d.insv").write_bytes(b"x")
    assert samples(prepare.run(own, append=True)) == {"train": 2} and sorted(left_out(own)) == ["b.mp4", "c.mp4", "d.insv"]
    (settings.videos / "b.txt").write_text("two")
    assert samples(prepare.run(own, append=True)) == {"train": 4} and sorted(left_out(own)) == ["c.mp4", "d.insv"]


def test_append_takes_a_film_that_was_half_copied(settings):
    film(settings, "a.mp4")
    path = film(settings, "b.mp4", step=6)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    prepare.run(settings)
    assert "no index" in left_out(settings)["b.mp4"]
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="b.mp4 changed"):
        prepare.run(settings)
    assert samples(prepare.run(settings, append=True)) == {"train": 4} and not left_out(settings)
    film(settings, "a.mp4", step=8)
    with pytest.raises(ValueError, match="a.mp4 changed"):  # of it there are clips
        prepare.run(settings, append=True)


def test_copies_of_a_film_are_held_out_together_and_no_news(settings):
    own = replace(settings, split={"val": 0.34})
    for number in range(3):
        shutil.copy(film(settings, f"{number}.mp4", step=3 + number), settings.videos / f"{number} (1).mp4")
    index = prepare.run(own)
    assert samples(index) == {"train": 8, "val": 4}
    held_out, trained = ({info["source"][0] for path in own.out.glob(f"{split}-*.tar") for *_, info in shards.read_shard(path)} for split in ("val", "train"))
    assert len(held_out) == 1 and not held_out & trained
    shutil.copy(settings.videos / "0.mp4", settings.videos / "another.mp4")
    assert prepare.run(own) == index


def test_a_look_at_a_folder_that_is_done_keeps_what_encoding_found(settings):
    film(settings, "a.mp4")
    prepare.run(settings)
    (settings.out / "skipped.jsonl").write_text('{"file": "a.mp4", "clip": 1, "reason": "corrupt: damaged frames"}\n')
    prepare.look_only(settings)
    assert left_out(settings) == {"a.mp4": "corrupt: damaged frames"}


def test_an_out_among_the_videos_is_gone_on_with(settings):
    """Its plan.json has rows of files and captions, too."""
    for number in range(2):
        film(settings, f"{number}.mp4", step=3 + number)
    for out in (settings.videos, settings.videos / "shards"):
        own = replace(settings, out=out)
        index = prepare.run(own)
        assert prepare.run(own) == index and not left_out(own)


def test_names_with_other_ends_of_lines_are_counted(settings, capsys):
    film(settings, "a.mp4")
    (settings.videos / "x\u2028y.mp4").write_bytes(b"")
    (settings.videos / "z\x85.mp4").write_bytes(b"")
    assert prepare.perform(settings, "prepare") == 0
    assert "skipped: 2 corrupt" in capsys.readouterr().out
