"""The plan of a folder of shards: which clip stands in which shard, decided before anything is encoded.

It is written as plan.json and depends on the settings and the videos only, so a run that goes on after a kill, with any
number of workers, puts every clip where the first run would have put it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import shards
import torch
import videos
from tqdm import tqdm

from usv.training.data import model_identity


@dataclass(frozen=True)
class Settings:
    """What a folder of shards is made from. Exactly one of `videos` and `camera_motion` is set."""

    model: Path
    out: Path
    height: int
    width: int
    num_frames: int
    fps: float
    max_sequence_length: int
    videos: Path | None = None
    camera_motion: int | None = None
    caption: str | None = None  # for videos without one
    seed: int = 0  # of CameraMotion and of the split
    split: dict[str, float] = field(default_factory=dict)
    shard_size: int = 64
    text: bool = True
    text_dtype: str = "float32"
    workers: int = 1
    device: str = "cpu"

    def content(self) -> dict:
        """The part that decides what stands in the shards, for comparison with a plan made earlier."""
        free = ("out", "model", "videos", "workers", "device")  # videos are compared one by one
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        return {**kept, "model": model_identity(self.model)}


@dataclass(frozen=True)
class Job:
    """One shard: its file name and its clips as (number of the clip, number of its source, clip within the source)."""

    name: str
    clips: list[tuple[int, int, int]]


def load_plan(settings: Settings) -> dict:
    """The plan of this folder, made now or by an earlier run of the same command. ValueError if that was another one."""
    path = settings.out / "plan.json"
    if not path.exists():
        if any(settings.out.glob("*.tar")):
            raise ValueError(f"{settings.out} holds shards but no plan.json; use another --out, or --overwrite")
        plan = {"settings": settings.content(), **make_plan(settings)}
        shards.write_atomic(path, json.dumps(plan).encode())
        return plan
    plan = json.loads(path.read_text())
    remedy = "use another --out, or --overwrite to begin again"
    for name, now in settings.content().items():
        before = plan["settings"].get(name)
        if before != now:
            raise ValueError(f"{settings.out} was begun with {name} = {before}, now it is {now}; {remedy}")
    if settings.videos:
        now, before = _seen(settings, videos.find_videos(settings.videos, settings.caption)[0]), plan["seen"]
        for file in now:
            if now[file] != before.get(file):
                what = "changed" if file in before else "was added, or got its caption,"
                raise ValueError(f"{settings.videos / file} {what} since {settings.out} was begun; {remedy}")
    return plan


def _seen(settings: Settings, sources: list[videos.Source]) -> dict[str, list]:
    """What tells a changed video or caption: size in bytes, time of change in ns, caption and labels, by file."""
    stats = {source.file: (settings.videos / source.file).stat() for source in sources}
    return {s.file: [stats[s.file].st_size, stats[s.file].st_mtime_ns, s.caption, s.labels] for s in sources}


def make_plan(settings: Settings) -> dict:
    """Sources with their split and number of clips, in order, the files that cannot be used, and all files seen."""
    if settings.camera_motion:
        sources = [{"clips": 1} for _ in range(settings.camera_motion)]
        return {"sources": assign_splits(sources, settings.split, settings.seed), "skipped": []}
    found, skipped = videos.find_videos(settings.videos, settings.caption)
    sources = []
    for source in tqdm(found, desc="looking at videos", unit="file"):
        try:
            start, end = videos.extent(settings.videos / source.file)
            frames = videos.count_frames(end - start, settings.fps)
            if frames < settings.num_frames:
                raise videos.Unusable(f"too short: {frames} frames at {settings.fps:g} fps, "
                                      f"a clip has {settings.num_frames}")  # fmt: skip
        except videos.Unusable as reason:
            skipped.append(videos.skip(source.file, str(reason)))
            continue
        sources.append({**asdict(source), "start": start, "clips": frames // settings.num_frames})
    sources = assign_splits(sources, settings.split, settings.seed)
    return {"sources": sources, "skipped": skipped, "seen": _seen(settings, found)}


def assign_splits(sources: list[dict], shares: dict[str, float], seed: int) -> list[dict]:
    """Give every source a split; all clips of a video stay together, so none is seen in training and held out."""
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed)).tolist()
    names = {}
    for split, share in shares.items():
        count = max(1, round(share * len(sources))) if len(sources) > 1 else 0
        names |= {index: split for index in order[len(names) : len(names) + count]}
    return [{**source, "split": names.get(i, "train")} for i, source in enumerate(sources)]


def make_jobs(plan: dict) -> list[Job]:
    """Shards of `shard_size` consecutive clips of one split."""
    by_split: dict[str, list] = {}
    number = 0
    for index, source in enumerate(plan["sources"]):
        for clip in range(source["clips"]):
            by_split.setdefault(source["split"], []).append((number, index, clip))
            number += 1
    size = plan["settings"]["shard_size"]
    return [
        Job(f"{split}-{i // size:05d}.tar", clips[i : i + size])
        for split, clips in sorted(by_split.items())
        for i in range(0, len(clips), size)
    ]
