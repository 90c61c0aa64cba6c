"""Scaled pictures against the exact one: chroma where the codec puts it, BT.709 and an antialiased triangle, all in float64."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("imageio_ffmpeg")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "data"), str(Path(__file__).parent)]

import av  # noqa: E402
import display  # noqa: E402
import zoo  # noqa: E402

SIZE = (480, 832)
KR, KB = 0.2126, 0.0722


def covered(rgb: torch.Tensor) -> np.ndarray:
    """(3, H, W) scaled to cover SIZE and cropped in the middle."""
    top, left, h, w = display.cover(rgb.shape[1:], SIZE)
    return F.interpolate(rgb[None, :, top : top + h, left : left + w], size=SIZE, mode="bilinear", antialias=True)[0].numpy()


def exact(frame: av.VideoFrame) -> np.ndarray:
    """(3, H, W) float64 in 0 … 255 of a yuv420p frame of limited range: chroma lies on even columns, between rows."""
    y, cb, cr = (np.frombuffer(p, np.uint8).reshape(p.height, -1)[:, : p.width].astype(np.float64) for p in frame.planes)

    def raised(chroma):
        rows = F.interpolate(torch.from_numpy(chroma)[None, None], size=(y.shape[0], chroma.shape[1]), mode="bilinear")[0, 0].numpy()
        whole = np.empty(y.shape)
        whole[:, 0::2], whole[:, 1::2] = rows, (rows + np.concatenate([rows[:, 1:], rows[:, -1:]], 1)) / 2
        return (whole - 128) / 224

    luma, cb, cr = (y - 16) / 219, raised(cb), raised(cr)
    r, b = luma + 2 * (1 - KR) * cr, luma + 2 * (1 - KB) * cb
    rgb = np.stack([r, (luma - KR * r - KB * b) / (1 - KR - KB), b])
    return covered(torch.from_numpy((255 * rgb).clip(0, 255)))


def decibels(a, b) -> float:
    return 10 * np.log10(255**2 / np.square(np.asarray(a, np.float64) - b).mean())


@pytest.mark.parametrize("source", ["testsrc2=s=1920x1080", "mandelbrot=s=1920x1080"])
def test_1080p_is_nearer_the_exact_picture_than_whole_frames_converted_first(tmp_path, source):
    """FFmpeg's own R'G'B' of the whole picture, scaled in float, is what was done before: a level too dark, chroma half a column off."""
    path = tmp_path / "film.mkv"
    colours = "-colorspace bt709 -color_primaries bt709 -color_trc bt709"
    zoo.run(f"-f lavfi -i {source} -frames:v 2 -vf scale=out_color_matrix=bt709:flags=accurate_rnd -pix_fmt yuv420p {colours} -c:v libx264 -crf 8 -preset ultrafast {path}", tmp_path)
    with av.open(str(path)) as film:
        frame = list(film.decode(video=0))[1]
    truth, now = exact(frame), display.Display(SIZE).picture(frame, 1.0).numpy()
    before = covered(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float()).round()
    assert abs(now - truth).mean() < abs(before - truth).mean()
    assert decibels(now, truth) > decibels(before, truth)  # by 6.0 and 3.7 dB; with chroma between columns it would be 0.8 and 0.4 dB farther
    assert np.abs((now - truth).mean((1, 2))).max() < 0.1, "no level is lost on average"
