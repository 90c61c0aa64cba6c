"""A look at all videos before the work: which clips each gives, what is odd about it, and a sheet of the first ones."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import videos
from decoding import LONGEST_HOLD, TOLERANCE, Unusable, Video
from display import cover, has_alpha, look, shown_size, turn
from scanning import median, scan
from tqdm import tqdm

THREADS = min(4, os.cpu_count() or 1)  # files looked at together: FFmpeg lets go of Python while it reads
CLEAN = re.compile(r"[!-%'-~]+( [!-%'-~]+)*")  # a caption that the pipeline does not change: ASCII without entities, single blanks


@dataclass(frozen=True)
class Look:
    """What one file shows; `reason` says why it cannot be used, the rest is then empty."""

    reason: str = ""
    start: float = 0.0
    end: float = 0.0
    times: np.ndarray | None = None  # seconds after start at which pictures appear
    rate: float = 0.0
    shape: tuple[int, int] = (0, 0)  # H, W as displayed
    sequential: bool = False
    kinds: tuple[str, ...] = ()  # what is odd about its pictures
    cuts: tuple[float, ...] = ()  # seconds after start at which a scene ends

    def oddities(self, settings, windows: list) -> dict[str, float]:
        """What is odd about it as clips of these settings: kind -> clips, or a factor."""
        found: dict[str, float] = {kind: 1 for kind in self.kinds}
        size, whole = (settings.height, settings.width), self.shape
        factor = max(size[0] / whole[0], size[1] / whole[1])
        _, _, height, width = cover(whole, size)
        if factor > 1.25:
            found["blown up"] = factor
        if height * width < 0.6 * whole[0] * whole[1]:
            found["cropped"] = height * width / (whole[0] * whole[1])
        if len(self.times) > 1 and 1 / median(self.times[1:] - self.times[:-1]) < 0.95 * settings.fps:
            found["slow"] = self.rate
        stills = sum(int(still(self, settings, at, count).sum()) for at, count in windows)
        if stills:
            found["still"] = stills
        return found


def look_at(found: list, settings, progress: bool = True) -> dict[str, Look]:
    """A look at every source by its file name."""

    def one(source) -> Look:
        return look_at_file(settings.videos / source.file, settings.scenes)

    with ThreadPoolExecutor(THREADS) as pool:
        looks = tqdm(pool.map(one, found), total=len(found), desc="looking at videos", unit="file", disable=not progress)
        return {source.file: seen for source, seen in zip(found, looks)}


def look_at_file(path: Path, scenes: bool = False) -> Look:
    try:
        seen = scan(path)
        picture = look(seen.frame, seen.sar, crop=seen.crop)
    except Unusable as reason:
        return Look(str(reason))
    way, kinds = turn(picture.turn_matrix), []
    kinds += [f"HDR {picture.hdr}"] if picture.hdr else []
    kinds += ["interlaced"] if seen.frame.interlaced_frame else []
    kinds += ["anamorphic"] if picture.sar != 1 else []
    kinds += ["turned"] if way.transpose or way.angle or (way.hflip and way.vflip) else []
    kinds += ["mirrored"] if way.hflip + way.vflip + way.transpose in (1, 3) and not _rotation(way) else []
    kinds += ["transparent"] if has_alpha(seen.frame) else []
    kinds += ["untagged HD"] if picture.guessed and picture.matrix == 1 else []
    kinds += ["joined"] if seen.sequential else []
    cuts = scene_cuts(path, seen.start) if scenes else ()
    return Look("", seen.start, seen.end, seen.times, seen.rate, shown_size(picture), seen.sequential, tuple(kinds), cuts)


def _rotation(way) -> bool:
    return way.transpose and way.hflip != way.vflip or (not way.transpose and way.hflip == way.vflip)


def scene_cuts(path: Path, start: float) -> tuple[float, ...]:
    """Seconds after the start at which PySceneDetect sees a cut. Unusable-free: a file it cannot read has none."""
    try:
        from scenedetect import ContentDetector, SceneManager, open_video
    except ImportError:
        raise ValueError('--scenes needs PySceneDetect: pip install "usv[scenes]"') from None
    video = open_video(str(path.absolute()), backend="pyav")
    manager = SceneManager()
    manager.add_detector(ContentDetector())
    manager.detect_scenes(video)
    with Video(path) as film:  # PySceneDetect counts from the start that the container states, which may be no picture that is shown
        stated = float((film.stream.start_time or 0) * film.stream.time_base)
    return tuple(scene[0].get_seconds() + stated - start for scene in manager.get_scene_list()[1:])


def nearest(shape: tuple[int, int], sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Of several clip sizes (H, W) the one of the nearest shape; among equal shapes the one nearest in area."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        form = abs(math.log(shape[0] / shape[1]) - math.log(size[0] / size[1]))
        return round(form, 3), abs(math.log(shape[0] * shape[1] / (size[0] * size[1])))

    return min(sizes, key=distance)


# ---- windows ---------------------------------------------------------------------------------------------------------


def windows(seen: Look, settings) -> tuple[list[list], str]:
    """([[seconds after the start, number of consecutive clips], …], why something is left out or "").

    A video is one window, unless a picture stands for so long that its time stamp cannot be right, or scenes end.
    """
    times, step = seen.times, 1 / seen.rate
    length = seen.end - seen.start
    gaps = times[1:] - times[:-1]
    # a stamp far off makes one hold that is longer than all the rest together
    longest = min(LONGEST_HOLD, max(5.0, 4 * (length - float(gaps.max(initial=0)))))
    void = np.flatnonzero(gaps > longest)
    begins = [0.0, *(float(times[i + 1]) for i in void)]
    ends = [*(float(times[i]) + step for i in void), length]
    parts = []
    for begin, end in zip(begins, ends):
        inner = [cut for cut in seen.cuts if begin + TOLERANCE < cut < end - TOLERANCE]
        parts += zip([begin, *inner], [*inner, end])
    found = []
    for begin, end in parts:
        if end in seen.cuts:  # the picture on the cut is the next scene's
            count = videos.count_frames(end - begin, settings.fps) // settings.num_frames
        else:
            count = videos.count_clips(end - begin, settings.fps, settings.num_frames)
        if count:
            found.append([begin, count])
    reason = ""
    if len(void):
        reason = (f"time stamps: one picture stands for {float(gaps.max()):,.0f} s, which is not believed; what is on "
                  "either side is used")  # fmt: skip
    if not found:
        frames = max(videos.count_frames(end - begin, settings.fps) for begin, end in parts)
        fits = (frames - 1) // 4 * 4 + 1
        hint = f"; --num-frames {fits} would fit" if frames >= 1 and fits >= 5 else ""
        where = "between two cuts " if seen.cuts else ""
        return [], f"too short: {where}{frames} frames at {settings.fps:g} fps, a clip has {settings.num_frames}{hint}"
    if settings.skip_still:
        kept = []
        for begin, count in found:
            moving = ~still(seen, settings, begin, count)
            edges = np.flatnonzero(np.diff(np.r_[False, moving, False]))
            clip = settings.num_frames / settings.fps
            kept += [[begin + int(a) * clip, int(b - a)] for a, b in zip(edges[::2], edges[1::2])]
        dropped = sum(count for _, count in found) - sum(count for _, count in kept)
        if dropped:
            reason = f"still: {dropped} clips show one picture only" + (f"; {reason}" if reason else "")
        found = kept
    return found, reason


def still(seen: Look, settings, begin: float, count: int) -> np.ndarray:
    """(count,) bool: which clips of a window show one picture only, by the time stamps."""
    at = begin + np.arange(count * settings.num_frames) / settings.fps
    shown = np.searchsorted(seen.times, at + TOLERANCE, "right").reshape(count, settings.num_frames)
    return shown[:, 0] == shown[:, -1] if settings.num_frames > 1 else np.zeros(count, bool)


# ---- the summary -----------------------------------------------------------------------------------------------------

SAID = {  # kind: (what the line says, what a number with it is)
    "HDR PQ": "HDR (PQ): reference white becomes 255, highlights beyond are clipped",
    "HDR HLG": "HDR (HLG): reference white becomes 255, highlights beyond are clipped",
    "interlaced": "interlaced: deinterlaced",
    "anamorphic": "pixels that are not square: scaled to square ones",
    "turned": "filmed with a turned camera: set upright",
    "mirrored": "marked as mirrored: mirrored, as players do",
    "transparent": "may be transparent: shown on white",
    "untagged HD": "untagged colour of 720 lines or more: read as BT.709, as players do",
    "joined": "joined recordings, or no time stamps: read from the beginning each time",
}


def summary(plan: dict, settings, cut_captions: list[str]) -> list[str]:
    """One line a kind of oddity, with counts, and one for what is left out."""
    from shard_plan import count_clips

    videos_of: Counter = Counter()
    numbers: dict[str, list[float]] = {}
    seen_files = set()
    for source in plan["sources"]:
        if source["file"] in seen_files:  # a video that is split in time stands twice
            continue
        seen_files.add(source["file"])
        for kind, number in source.get("oddities", {}).items():
            videos_of[kind] += 1
            numbers.setdefault(kind, []).append(number)
    lines = [f"{videos_of[kind]} {text}" for kind, text in SAID.items() if videos_of[kind]]
    if videos_of["blown up"]:
        lines.append(f"{videos_of['blown up']} blown up, by up to {max(numbers['blown up']):.1f}x: they are smaller than "
                     f"{settings.height} x {settings.width}")  # fmt: skip
    if videos_of["cropped"]:
        lines.append(f"{videos_of['cropped']} cropped to another shape, down to {min(numbers['cropped']):.0%} of the picture; "
                     "--buckets gives each shape its own size")  # fmt: skip
    if videos_of["slow"]:
        lines.append(f"{videos_of['slow']} slower than --fps {settings.fps:g}, down to {min(numbers['slow']):.3g} a second: "
                     "pictures repeat")  # fmt: skip
    if videos_of["still"]:
        lines.append(f"{videos_of['still']} with clips that show one picture only, {sum(numbers['still']):.0f} clips in all; "
                     "--skip-still leaves them out")  # fmt: skip
    several = sum(bool(source.get("more")) for source in plan["sources"])
    if several:
        lines.append(f"{several} with several captions: each clip becomes a sample with each")
    if cut_captions:
        lines.append(f"{len(cut_captions)} captions longer than {settings.max_sequence_length} tokens, which are cut, e.g. "
                     f"{cut_captions[0][:60]!r}; --max-sequence-length raises it")  # fmt: skip
    left_out = Counter(line["reason"].partition(":")[0] for line in plan["skipped"])
    if left_out:
        what = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
        lines.append(f"left out: {what}; each is listed in {settings.out / 'skipped.jsonl'}")
    total = sum(source.get("stop", count_clips(source)) - source.get("first", 0) for source in plan["sources"])
    return [f"{len(seen_files)} videos, {total} clips of {settings.num_frames} frames at {settings.fps:g} fps", *lines]


def cut_captions(plan: dict, settings) -> list[str]:
    """Captions that have more tokens than max_sequence_length, cleaned as the pipeline does."""
    captions = list(dict.fromkeys(c for source in plan["sources"] for c in (source["caption"], *source.get("more", ()))))
    # a token is at least a byte, but for the one that ends the text: short captions need no look
    captions = [caption for caption in captions if len(caption.encode()) + 2 > settings.max_sequence_length]
    if not settings.text or not captions:
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model / "tokenizer")
    tokens = tokenizer(_cleaned(captions)).input_ids
    return [caption for caption, ids in zip(captions, tokens) if len(ids) > settings.max_sequence_length]


def _cleaned(captions: list[str]) -> list[str]:
    """As the pipeline cleans them, which is imported (five seconds) only where it would change one."""
    if all(CLEAN.fullmatch(caption) for caption in captions):
        return captions
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return [prompt_clean(caption) for caption in captions]


def contact_sheet(plan: dict, settings, path: Path, clips: int = 12, pictures: int = 6, height: int = 120) -> None:
    """A PNG of the first clip of each of the first videos, as the model will see them: a row a clip."""
    from PIL import Image, ImageDraw

    rows, files = [], set()
    for source in plan["sources"]:
        if len(rows) == clips or source["file"] in files:
            continue
        files.add(source["file"])
        at, name = source["windows"][0][0], settings.videos / source["file"]
        size = settings.height, settings.width
        [(_, frames)] = videos.read_clips(name, source["start"], settings.fps, settings.num_frames, 0, 1, size, at, source["sequential"])
        rows.append((source, frames))
    if not rows:
        return
    width = max(1, round(height * settings.width / settings.height))
    label = 14
    sheet = Image.new("RGB", (pictures * width, len(rows) * (height + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (source, frames) in enumerate(rows):
        top = row * (height + label)
        text = f"{source['file']}: " + (frames if isinstance(frames, str) else source["caption"])
        draw.text((2, top + 1), text.encode("latin-1", "replace").decode("latin-1")[: pictures * width // 6], fill="black")
        if isinstance(frames, str):
            continue
        for column, index in enumerate(np.linspace(0, len(frames) - 1, pictures).round().astype(int)):
            picture = Image.fromarray(frames[index].permute(1, 2, 0).numpy()).resize((width, height))
            sheet.paste(picture, (column * width, top + label))
    with path.open("wb") as file:
        sheet.save(file, "PNG")
