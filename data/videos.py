"""Videos as training clips: how many a file gives, and their frames at a regular rate (decoding.py, display.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from decoding import BROKEN, TOLERANCE, Moment, Unusable, moments, reason_of, scan
from display import Deinterlacer, Display


def extent(path: Path) -> tuple[float, float]:
    """(start, end) in seconds of what a file shows. Raises Unusable when it is no video or shows nothing."""
    found = scan(path)
    return found.start, found.end


def count_frames(seconds: float, fps: float) -> int:
    """How many frames a video of this length gives at `fps`: those at times 0, 1/fps, … before its end."""
    return max(0, int(np.ceil((seconds - TOLERANCE) * fps)))


def count_clips(seconds: float, fps: float, num_frames: int) -> int:
    """How many clips: the last frame of the last one may fall on the very end, where the last picture still stands.

    Wan's 81 frames at 16 fps are exactly 5 s, and so are many clips.
    """
    return max(0, int((seconds + TOLERANCE) * fps + 1)) // num_frames


def read_clips(
    path: Path, start: float, fps: float, num_frames: int, first: int, stop: int, size: tuple[int, int],
    at: float = 0.0, sequential: bool = False,
) -> Iterator[tuple[int, torch.Tensor | str]]:  # fmt: skip
    """Clips number `first` … `stop` - 1 of a video: (number, frames (T, 3, H, W) uint8), or (number, reason left out).

    Frame j of the video at `fps` is the picture shown at start + at + j / fps. Clips follow each other without overlap;
    the result does not depend on `first`, which is reached by seeking unless `sequential`. `size` is (H, W): scaled to
    cover, centre-cropped.
    """
    clip = first
    try:
        with closing(moments(path, start + at, first * num_frames / fps if first or not at else TOLERANCE, sequential)) as source:
            pictures = _shown(_woven(source), fps, first * num_frames, Display(size))
            for clip in range(first, stop):
                shown = list(islice(pictures, num_frames))
                wrong = next((picture for picture in shown if isinstance(picture, str)), "")
                if wrong:
                    yield clip, wrong
                elif len(shown) < num_frames:
                    raise Unusable(f"corrupt: it ends after {len(shown)} of this clip's {num_frames} frames")
                else:
                    yield clip, torch.stack(shown)
    except BROKEN as error:
        reason = reason_of(error)
        for left in range(clip, stop):
            yield left, reason


def _woven(source: Iterator[Moment]) -> Iterator[Moment]:
    """Interlaced frames as whole pictures."""
    weaver = Deinterlacer()
    for moment in source:
        for done, frame in weaver.push(moment, moment.frame):
            yield replace(done, frame=frame)
    for done, frame in weaver.flush():
        yield replace(done, frame=frame)


def _shown(source: Iterator[Moment], fps: float, first: int, display: Display) -> Iterator[torch.Tensor | str]:
    """The picture on screen at times first / fps, (first + 1) / fps, …, until the video ends; a reason for spoilt ones."""
    number, held, until = first, None, 0.0
    for moment in chain(source, [None]):
        # a frame stays on screen until the next one, the last one for its own duration
        end = until + 2 * TOLERANCE if moment is None else moment.time
        picture = None
        while held is not None and number / fps < end - TOLERANCE:
            if picture is None:
                picture = _picture(held, display)
            gap = held.lost and number / fps > held.time + 1.5 * held.duration
            yield "corrupt: pictures are missing" if gap else picture
            number += 1
        held, until = moment, 0.0 if moment is None else moment.time + moment.duration


def _picture(moment: Moment, display: Display) -> torch.Tensor | str:
    if moment.spoilt:
        return f"corrupt: damaged frames ({moment.spoilt})"
    return display.picture(moment.frame, moment.sar)
