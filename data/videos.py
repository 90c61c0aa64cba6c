"""Videos as training clips: how many a file gives, and their frames at a regular rate (decoding.py, display.py)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from decoding import BROKEN, TOLERANCE, Moment, Unusable, moments, reason_of
from display import Deinterlacer, Display
from scanning import scan

HELD_BACK = 1 << 28  # bytes of clips that wait until their group of pictures has been decoded to its end


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
    begin = first
    since = first * num_frames / fps if first or not at else TOLERANCE
    most = max(1, HELD_BACK // (num_frames * 3 * size[0] * size[1]))
    waiting: deque[tuple[int, torch.Tensor | str, set[int], dict]] = deque()

    def settle(group: float, most: int) -> Iterator[tuple[int, torch.Tensor | str]]:
        """Clips of groups of pictures before `group`, which have been decoded to their end, and those beyond `most`."""
        nonlocal begin
        while waiting and (len(waiting) > most or max(waiting[0][2]) < group):
            begin, clip, groups, ruined = waiting.popleft()
            why = next((ruined[g] for g in groups if g in ruined), "")
            yield begin, f"corrupt: damaged frames ({why})" if why and not isinstance(clip, str) else clip
            begin += 1

    try:
        with closing(moments(path, start + at, since, sequential)) as source:
            woven = _woven(source)
            shown = _shown(woven, fps, first * num_frames, Display(size))
            for clip in range(first, stop):
                pictures = list(islice(shown, num_frames))
                if len(pictures) < num_frames:
                    yield from settle(math.inf, 0)
                    raise Unusable(f"corrupt: it ends after {len(pictures)} of this clip's {num_frames} frames")
                wrong = next((picture for picture, *_ in pictures if isinstance(picture, str)), "")
                groups, ruined = {group for _, group, _ in pictures}, pictures[-1][2]
                waiting.append((clip, wrong or torch.stack([picture for picture, *_ in pictures]), groups, ruined))
                last = pictures[-1][1]
                del pictures
                yield from settle(last, most)
            while waiting and (moment := next(woven, None)) is not None:
                yield from settle(moment.group, most)
            yield from settle(math.inf, 0)
    except BROKEN as error:
        reason = reason_of(error)
        yield from settle(math.inf, 0)
        for left in range(begin, stop):
            yield left, reason


def _woven(source: Iterator[Moment]) -> Iterator[Moment]:
    """Interlaced frames as whole pictures."""
    weaver = Deinterlacer()
    for moment in source:
        for done, frame in weaver.push(moment, moment.frame):
            yield replace(done, frame=frame)
    for done, frame in weaver.flush():
        yield replace(done, frame=frame)


def _shown(
    source: Iterator[Moment], fps: float, first: int, display: Display
) -> Iterator[tuple[torch.Tensor | str, int, dict[int, str]]]:
    """(picture, its group, ruined groups) on screen at times first / fps, (first + 1) / fps, …, until the video ends.

    A reason stands for a spoilt picture. No frame is handed on: one of 4K is 12 MB, and a clip has 81.
    """
    number, held, until = first, None, 0.0
    for moment in chain(source, [None]):
        # a frame stays on screen until the next one, the last one for its own duration
        end = until if moment is None else moment.time
        picture = None
        while held is not None and number / fps < end - TOLERANCE:
            if picture is None:
                picture = _picture(held, display)
            gap = held.lost and number / fps > held.time + 1.5 * held.duration
            yield ("corrupt: pictures are missing" if gap else picture), held.group, held.ruined
            number += 1
        # the clip that ends with the film may ask for the picture on its very end
        held, until = moment, 0.0 if moment is None else moment.time + 1.5 * moment.duration


def _picture(moment: Moment, display: Display) -> torch.Tensor | str:
    if moment.spoilt:
        return f"corrupt: damaged frames ({moment.spoilt})"
    return display.picture(moment.frame, moment.sar, moment.crop)
