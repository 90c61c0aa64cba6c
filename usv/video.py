"""Videos to files: mp4 (H.264, plays in browsers) and contact sheets, each written whole or not at all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from usv.files import replacing

BT709 = 1  # matrix, primaries and transfer in ITU-T H.273
LIMITED = 1  # AVCOL_RANGE_MPEG
SHEET_WIDTH = 416  # pixels of a frame on a contact sheet, at most


def _uint8(video: torch.Tensor) -> np.ndarray:
    """(T, 3, H, W) in [0, 1], or uint8 already -> (T, H, W, 3) uint8."""
    if video.dtype == torch.uint8:
        return video.permute(0, 2, 3, 1).cpu().numpy()
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def write_mp4(path: Path, video: torch.Tensor, fps: int = 8, scale: int = 1) -> None:
    """Write (T, 3, H, W) in [0, 1]. `scale` enlarges small clips by pixel repetition. Sides are cropped to even.

    Colours are stored as BT.709 of limited range and tagged so: players guess the matrix of what is untagged by its
    height, and were up to 40 levels off.
    """
    frames = _uint8(video).repeat(scale, 1).repeat(scale, 2)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with replacing(path) as temporary:
        with av.open(str(temporary), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
            stream.options = {"crf": "16"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED
            for frame in frames:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                stored = rgb.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)
                container.mux(stream.encode(stored))
            container.mux(stream.encode())


def magnified(width: int, most: int = 1 << 30) -> int:
    """How often a pixel of a video is repeated so that a small one can be seen: 1 from 384 / 2 pixels of width on."""
    return max(1, min(most, 384 // width))


def thumbnails(video: torch.Tensor, columns: int = 5) -> torch.Tensor:
    """(T, 3, H, W) in [0, 1] -> (columns, 3, h, w) uint8, evenly spaced frames no wider than a contact sheet shows them."""
    picks = video[torch.from_numpy(np.linspace(0, len(video) - 1, columns).round().astype(int))]
    if picks.shape[-1] > SHEET_WIDTH:
        size = (max(1, round(picks.shape[-2] * SHEET_WIDTH / picks.shape[-1])), SHEET_WIDTH)
        picks = torch.nn.functional.interpolate(picks, size, mode="area")
    return (picks.clamp(0, 1) * 255).round().to(torch.uint8)


def contact_sheet(path: Path, rows: list[tuple[str, torch.Tensor]], columns: int = 5) -> None:
    """One row a video: its label, then `columns` evenly spaced frames. rows: (label, (T, 3, H, W) in [0, 1])."""
    height, width = rows[0][1].shape[-2:]
    bar = 16
    sheet = Image.new("RGB", (columns * (width + 2), len(rows) * (height + bar)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (label, video) in enumerate(rows):
        top = r * (height + bar)
        draw.text((3, top + 2), " ".join(label.split()), fill="black")
        picks = np.linspace(0, len(video) - 1, columns).round().astype(int)
        for c, frame in enumerate(_uint8(video[torch.from_numpy(picks)])):
            sheet.paste(Image.fromarray(frame), (c * (width + 2), top + bar))
    with replacing(path) as temporary:
        sheet.save(temporary)
