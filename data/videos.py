"""Videos as training clips: which files, which captions, how long, and frames at a regular rate (decoded by PyAV)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F

EXTENSIONS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif", ".flv", ".wmv"}
TOLERANCE = 1e-3  # seconds by which two time stamps may differ and still mean the same moment


class Unusable(Exception):
    """A file or clip that has to be left out; the text is `<kind>: <reason>`."""


@dataclass(frozen=True)
class Source:
    """One captioned video: path relative to the folder, caption, and what else its row of captions.jsonl says."""

    file: str
    caption: str
    labels: dict = field(default_factory=dict)


def skip(file: str, reason: str, clip: int | None = None) -> dict:
    """A line of skipped.jsonl; `clip` None means the whole file."""
    return {"file": file, "clip": clip, "reason": reason}


def find_videos(folder: Path, default_caption: str | None = None) -> tuple[list[Source], list[dict]]:
    """All captioned videos below `folder` in order of their names, and what has to be left out.

    A caption comes from the folder's captions.jsonl or captions.csv (columns file, caption), else from clip.txt beside
    clip.mp4, else it is `default_caption`. ValueError when the folder or the columns of captions.csv do not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: no such folder; name a folder of videos with captions beside them")
    table, skipped = read_captions(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    sources = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        labels = table.pop(name, {})
        try:
            caption = labels.get("caption") or _text_beside(path) or default_caption
        except UnicodeDecodeError:
            skipped.append(skip(name, f"no caption: {path.stem}.txt is not UTF-8 text"))
            continue
        if not caption:
            skipped.append(
                skip(name, f"no caption: neither {path.stem}.txt, captions.csv, captions.jsonl nor --caption")
            )
            continue
        labels = {key: value for key, value in labels.items() if key not in ("file", "caption")}
        sources.append(Source(name, caption, labels))
    skipped += [skip(name, "missing: named by the captions, but no such video in the folder") for name in table]
    return sources, skipped


def _text_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8-sig").split()) if text.is_file() else ""


def read_captions(folder: Path) -> tuple[dict[str, dict], list[dict]]:
    """Rows of captions.csv and captions.jsonl by file name, and the lines that could not be read."""
    table: dict[str, dict] = {}
    skipped = []
    path = folder / "captions.csv"
    if path.is_file():
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                raise ValueError(
                    f"{path} has columns {rows.fieldnames}; its first line has to name 'file' and 'caption'"
                )
            table = {row["file"]: {"caption": (row["caption"] or "").strip()} for row in rows if row["file"]}
    path = folder / "captions.jsonl"
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                table[row["file"]] = {**row, "caption": row["caption"].strip()}
            except (ValueError, KeyError, TypeError, AttributeError):
                reason = f'unreadable: line {number} is not {{"file": "...", "caption": "..."}}'
                skipped.append(skip(path.name, reason))
    return table, skipped


def extent(path: Path) -> tuple[float, float]:
    """(start, end) of the video stream in seconds, from its packets: headers are often wrong, and decoding is slow.

    Raises Unusable when the file is no video or holds no time stamps.
    """
    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            rate = stream.average_rate or stream.guessed_rate or 25
            start, end = float("inf"), float("-inf")
            for packet in container.demux(stream):
                stamp = packet.dts if packet.pts is None else packet.pts
                if stamp is None:  # the empty packet that ends a stream
                    continue
                time = float(stamp * packet.time_base)
                start, end = (
                    min(start, time),
                    max(end, time + float((packet.duration or 0) * packet.time_base or 1 / rate)),
                )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unusable(f"corrupt: {type(error).__name__}: {_first_line(error)}") from None
    if end <= start:
        raise Unusable("corrupt: it holds no video frames with time stamps")
    return start, end


def count_frames(seconds: float, fps: float) -> int:
    """How many frames a video of this length gives at `fps`: those at times 0, 1/fps, … before its end."""
    return max(0, int(np.ceil((seconds - TOLERANCE) * fps)))


def read_clips(
    path: Path, start: float, fps: float, num_frames: int, first: int, stop: int, size: tuple[int, int]
) -> Iterator[tuple[int, torch.Tensor | str]]:
    """Clips number `first` … `stop` - 1 of a video: (number, frames (T, 3, H, W) uint8), or (number, reason left out).

    Frame j of the video at `fps` is the picture shown at start + j / fps. Clips follow each other without overlap; the
    result does not depend on `first`, which is reached by seeking. `size` is (H, W): scaled to cover, centre-cropped.
    """
    clip = first
    try:
        frames = _shown(_decode(path, start, first * num_frames / fps), fps, first * num_frames)
        for clip in range(first, stop):
            pictures = [_picture(frame, size) for frame in islice(frames, num_frames)]
            if len(pictures) < num_frames:
                raise Unusable(f"corrupt: it ends after {len(pictures)} of this clip's {num_frames} frames")
            if any(picture is None for picture in pictures):
                yield clip, "corrupt: damaged frames"
            else:
                yield clip, torch.stack(pictures)
    except FileNotFoundError:  # it was there when planned: a lost disk must stop the run, not empty the shards
        raise
    except (av.FFmpegError, OSError, ValueError, Unusable) as error:
        reason = str(error) if isinstance(error, Unusable) else f"corrupt: {type(error).__name__}: {_first_line(error)}"
        for left in range(clip, stop):
            yield left, reason


def _stream(container):
    if not container.streams.video:
        raise Unusable("corrupt: it has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # --workers sets the number of busy cores
    return stream


def _decode(path: Path, start: float, since: float) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(time since `start`, duration, frame) in order, beginning at or before `since` (seconds)."""
    with av.open(str(path)) as container:
        stream = _stream(container)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        if since > 0:
            container.seek(int((start + since) / stream.time_base), stream=stream, backward=True)
        early = since > 0
        for frame in container.decode(stream):
            if frame.time is None:
                raise Unusable("corrupt: frames without time stamps")
            time = frame.time - start
            if early and time > since + TOLERANCE:  # some containers seek too far: decode from the beginning instead
                yield from _decode(path, start, 0.0)
                return
            early = False
            yield time, float((frame.duration or 0) * frame.time_base) or 1 / rate, frame


def _shown(frames: Iterator[tuple[float, float, av.VideoFrame]], fps: float, first: int) -> Iterator[av.VideoFrame]:
    """The frame on screen at times first / fps, (first + 1) / fps, …, until the video ends."""
    number, held, until = first, None, 0.0
    for time, duration, frame in chain(frames, [(float("inf"), 0.0, None)]):
        # a frame stays on screen until the next one, the last one for its own duration
        end = min(time, until) if frame is None else time
        while held is not None and number / fps < end - TOLERANCE:
            yield held
            number += 1
        held, until = frame, time + duration


def _picture(frame: av.VideoFrame, size: tuple[int, int]) -> torch.Tensor | None:
    """(3, H, W) uint8: turned upright, scaled to cover `size`, centre-cropped. None for a damaged frame."""
    if frame.is_corrupt:
        return None
    image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    h, w = min(height, round(size[0] / scale)), min(width, round(size[1] / scale))
    top, left = (height - h) // 2, (width - w) // 2
    image = torch.from_numpy(image[top : top + h, left : left + w].copy()).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return image.round().clamp(0, 255).to(torch.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
