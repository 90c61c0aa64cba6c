"""Pictures that stay, bytes that mean nothing, cuts of a film that begins late."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import decoding  # noqa: E402
import display  # noqa: E402
import looking  # noqa: E402
import scanning  # noqa: E402
import videos  # noqa: E402

WIDTH, HEIGHT = 96, 64


def not_coded(picture: bytes) -> bytes:
    """The header of an MPEG-4 picture with vop_coded = 0: it says that the picture before stays."""
    begin = picture.find(b"\0\0\1\xb6") + 4
    bits = "".join(f"{byte:08b}" for byte in picture[begin : begin + 5])
    end = bits.index("0", 2) + 1 + 1 + 5 + 1  # modulo_time_base, marker, vop_time_increment at 24 a second, marker
    bits = bits[:end] + "00"
    bits += "1" * (-len(bits) % 8)
    return picture[:begin] + bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))


def frame(level: int, at: int) -> av.VideoFrame:
    picture = np.full((HEIGHT, WIDTH, 3), level, np.uint8)
    picture[:, at % 90 : at % 90 + 6] = 255
    return av.VideoFrame.from_ndarray(picture, format="rgb24")


@pytest.mark.parametrize("kind", ["mp4", "avi", "mkv"])
def test_pictures_that_are_not_coded_are_not_lost(tmp_path, kind):
    still, path, shown = range(12, 19), tmp_path / f"film.{kind}", []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 300, 800_000
        for number in range(48):
            shown.append(shown[-1] if number in still else 4 * number)
            picture = frame(shown[-1], shown[-1] // 2)
            picture.pts = number
            for packet in stream.encode(picture):
                if number in still:
                    said = av.Packet(not_coded(bytes(packet)))
                    said.pts, said.dts, said.time_base, said.duration, said.stream = packet.pts, packet.dts, packet.time_base, packet.duration, stream
                    packet = said
                container.mux(packet)
        container.mux(stream.encode())
    start = scanning.scan(path).start
    clips = [clip for _, clip in videos.read_clips(path, start, 24, 5, 0, 9, (HEIGHT, WIDTH))]
    assert not [clip for clip in clips if isinstance(clip, str)]
    levels = [float(picture.float().median()) for clip in clips for picture in clip]
    assert np.abs(np.array(levels) - shown[:45]).max() < 6


def test_the_fourth_byte_of_a_bitmap_is_no_alpha(tmp_path):
    path = tmp_path / "screen.avi"
    picture = np.zeros((HEIGHT, WIDTH, 4), np.uint8)  # blue, green, red and a byte that Windows leaves 0
    picture[..., 0], picture[..., 2] = 200, 40
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgra"
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgra")))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "bgra"  # what is to be known better
    seen = display.Display((HEIGHT, WIDTH)).picture(scanning.scan(path).frame, 1.0)
    assert np.abs(seen.float().mean((1, 2)).numpy() - (40, 0, 200)).max() <= 2


def test_cuts_of_a_recording_that_begins_within_a_group(tmp_path):
    """The first pictures cannot be shown: PySceneDetect counts from where they would be."""
    pytest.importorskip("scenedetect")
    whole, path = tmp_path / "whole.ts", tmp_path / "cut.ts"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"g": "48", "sc_threshold": "0", "bf": "2"}
        for number in range(216):
            container.mux(stream.encode(frame(40 if number // 48 % 2 else 200, number)))
        container.mux(stream.encode())
    data = whole.read_bytes()
    path.write_bytes(data[len(data) // 188 // 6 * 188 :])
    start = scanning.scan(path).start
    levels = [(moment.time, float(np.median(moment.frame.to_ndarray(format="gray")))) for moment in decoding.moments(path, start)]
    cuts = [time for (_, before), (time, now) in zip(levels, levels[1:]) if abs(now - before) > 100]
    assert len(cuts) >= 3 and looking.scene_cuts(path, start) == pytest.approx(cuts, abs=0.01)
