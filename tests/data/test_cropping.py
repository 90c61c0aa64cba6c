"""clap of mp4 and PixelCrop of Matroska: the picture is the part that ffmpeg shows, alone, turned, in pixels that are not square, at odd sizes."""

import random
import struct
import sys
from pathlib import Path

import pytest
from test_zoo import SIZE, decibels, fitted

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import cropping  # noqa: E402
import looking  # noqa: E402
import scanning  # noqa: E402
import videos  # noqa: E402
import zoo  # noqa: E402

PATH = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")


def with_clap(data: bytes, width: int, height: int, left: int, top: int, stored=(160, 120)) -> bytes:
    """An mp4 whose index lies at its end, with a clap box in its first sample entry."""
    offsets = 2 * left + width - stored[0], 2 * top + height - stored[1]  # of the centre, in halves
    box = struct.pack(">I4sIIIIiIiI", 40, b"clap", width, 1, height, 1, offsets[0], 2, offsets[1], 2)
    data, at, end, sizes = bytearray(data), 0, len(data), []
    for name in PATH:
        kind, inside, stop = next(found for found in cropping._boxes(data, at, end) if found[0] == name)
        sizes, at, end = [*sizes, inside - 8], inside, stop
    entry = at + 8
    stop = entry + struct.unpack_from(">I", data, entry)[0]
    data[stop:stop] = box
    for size in [*sizes, entry]:
        struct.pack_into(">I", data, size, struct.unpack_from(">I", data, size)[0] + len(box))
    return bytes(data)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cropped")
    zoo.run(f"{zoo.test_source('160x120')} {zoo.H264} plain.mp4", folder)
    zoo.run(f"{zoo.test_source('160x120')} {zoo.H264} -vf setsar=4/3 wide.mp4", folder)
    zoo.run("-display_rotation 90 -i plain.mp4 -c copy turned.mp4", folder)
    for name in ("plain", "wide", "turned"):
        (folder / f"clap_{name}.mp4").write_bytes(with_clap((folder / f"{name}.mp4").read_bytes(), 120, 80, 32, 16))
    (folder / "clap_odd.mp4").write_bytes(with_clap((folder / "plain.mp4").read_bytes(), 121, 83, 9, 5))
    zoo.run("-i clap_plain.mp4 -c copy crop.mkv", folder)
    zoo.run("-i clap_plain.mp4 -c copy -movflags faststart front.mov", folder)
    return folder


@pytest.mark.parametrize("name", ["clap_plain.mp4", "clap_wide.mp4", "clap_turned.mp4", "clap_odd.mp4", "crop.mkv", "front.mov", "plain.mp4"])
def test_pictures_are_those_that_ffmpeg_shows(files, name):
    path = files / name
    shown, seen = zoo.shown(path, 3), scanning.scan(path)
    assert (seen.crop != cropping.WHOLE) == (name != "plain.mp4")
    assert looking.look_at_file(path).shape == shown.shape[1:3]
    for size in (shown.shape[1:3], SIZE):
        [(_, clip)] = videos.read_clips(path, seen.start, seen.rate, 3, 0, 1, size)
        assert decibels(clip.permute(0, 2, 3, 1), fitted(shown, size)) > 40


def test_what_is_not_sound_hides_nothing(files, tmp_path):
    """A clap beyond the picture, one over nothing, and damaged files: the whole picture, and no exception."""
    plain = (files / "plain.mp4").read_bytes()
    path = tmp_path / "x.mp4"
    for numbers in ((200, 80, 0, 0), (120, 80, 100, 0), (0, 0, 200, 0)):
        path.write_bytes(with_clap(plain, *numbers))
        assert cropping.hidden(path, "mov,mp4", 0) == cropping.WHOLE, numbers
    path.write_bytes(with_clap(plain, 120, 80, 32, 16))
    assert cropping.hidden(path, "mov,mp4", 0) == (32, 16, 8, 24)
    assert cropping.hidden(path, "mov,mp4", 7) == cropping.hidden(path, "avi", 0) == cropping.hidden(tmp_path / "none", "mov", 0) == cropping.WHOLE
    rng = random.Random(0)
    for kind, file in (("mov,mp4", path), ("matroska,webm", files / "crop.mkv")):
        whole = file.read_bytes()
        for _ in range(150):
            data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
            for _ in range(rng.randrange(1, 9)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / "damaged").write_bytes(data)
            crop = cropping.hidden(tmp_path / "damaged", kind, 0)
            assert len(crop) == 4 and min(crop) >= 0
