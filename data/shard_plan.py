"""The plan of a folder of shards: which clip stands in which shard, decided before anything is encoded.

It is written as plan.json and depends on the settings and the videos only, so a run that goes on after a kill, with any
number of workers, puts every clip where the first run would have put it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import looking
import shards
import torch
from encoder import given_frames
from sources import Source, find_videos, skip

from usv.training.shards import model_identity


@dataclass(frozen=True)
class Teacher:
    """The dense model as a source of clips (data/generate.py): so many of each prompt, by its own sampler."""

    prompts: tuple[str, ...]  # each once
    clips: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    dtype: str
    batch_size: int  # clips denoised together; part of the content, for a batch of another size rounds otherwise

    def content(self, model: Path) -> dict:
        """All that decides a clip but its prompt."""
        numbers = {name: value for name, value in asdict(self).items() if name != "prompts"}
        return numbers | model_identity(model, {name: [name] for name in ("transformer", "transformer_2")})


@dataclass(frozen=True)
class Settings:
    """What a folder of shards is made from. Exactly one of `videos`, `camera_motion`, `moving_things` and `teacher` is set."""

    model: Path
    out: Path
    height: int
    width: int
    num_frames: int
    fps: float
    max_sequence_length: int
    videos: Path | None = None
    camera_motion: int | None = None
    moving_things: int | None = None
    caption: str | None = None  # for videos without one
    seed: int = 0  # of the drawn clips and of the split
    split: dict[str, float] = field(default_factory=dict)
    shard_size: int = 64
    text: bool = True
    text_dtype: str = "float32"
    buckets: tuple[tuple[int, int], ...] = ()  # sizes (H, W) of the run; this folder takes the clips nearest to its own
    skip_still: bool = False
    scenes: bool = False  # windows end where the picture is cut
    teacher: Teacher | None = None
    workers: int = 1  # 0, with ray: all that the cluster has room for
    device: str = "cpu"
    engine: str = "local"  # or ray
    address: str | None = None  # of a Ray cluster that is running

    def content(self) -> dict:
        """The part that decides what stands in the shards, for comparison with a plan made earlier."""
        free = ("out", "model", "videos", "workers", "device", "engine", "address", "teacher")  # videos and prompts are compared one by one
        if self.moving_things is None:  # a folder that was begun before there was the world does not name it
            free += ("moving_things",)
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        kept["teacher"] = None if self.teacher is None else self.teacher.content(self.model)
        given = given_frames(self.model) or None  # a folder that was begun before there was the question has none
        return {**kept, "given_frames": given, "buckets": [list(size) for size in self.buckets], "model": model_identity(self.model)}


@dataclass(frozen=True)
class Job:
    """One shard: its file name and its clips as (number of the clip, number of its source, clip within the source)."""

    name: str
    clips: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Videos:
    """The videos of a folder, what has to be left out of them, and a look at each: the same for all `buckets`."""

    found: list[Source]
    skipped: list[dict]
    looks: dict[str, looking.Look]


def look_over(settings: Settings) -> Videos:
    found, skipped = find_videos(settings.videos, settings.caption)
    return Videos(found, skipped, looking.look_at(found, settings))


def load_plan(settings: Settings, append: bool = False, over: Videos | None = None) -> dict:
    """The plan of this folder, made now or by an earlier run of the same command. ValueError if that was another one.

    `append` adds videos that were not there; `over`: the videos where they were looked at before.
    """
    path = settings.out / "plan.json"
    if not path.exists():
        if any(settings.out.glob("*.tar")):
            raise ValueError(f"{settings.out} holds shards but no plan.json; use another --out, or --overwrite")
        plan = {"settings": settings.content(), **make_plan(settings, over)}
        shards.write_atomic(path, json.dumps(plan).encode())
        return plan
    plan = json.loads(path.read_text())
    remedy = "use another --out, or --overwrite to begin again"
    if "parts" not in plan:
        raise ValueError(f"{settings.out} was begun by an earlier version of prepare.py; {remedy}")
    for name, now in settings.content().items():
        before = plan["settings"].get(name)
        if before != now:
            raise ValueError(f"{settings.out} was begun with {name} = {before}, now it is {now}; {remedy}")
    if settings.teacher and _add_prompts(plan, settings, append, remedy):
        shards.write_atomic(path, json.dumps(plan).encode())
    if settings.videos:
        found, skipped = find_videos(settings.videos, settings.caption)
        before, known = plan["seen"], {tuple(seen["content"]) for seen in plan["seen"].values()}
        used, added = {entry["file"] for entry in plan["sources"]}, []
        for source in found:
            seen = before.get(source.file)
            now = _seen(settings, source, seen)
            if seen is not None and all(now[name] == seen[name] for name in ("content", "captions", "labels")):
                continue
            if seen is None and tuple(now["content"]) in known:
                continue  # the same film under another name
            if not append or source.file in used:  # one of which nothing could be used may be mended
                what = "changed" if seen else "was added, or got its caption,"
                more = "" if seen else "; --append adds it"
                raise ValueError(f"{settings.videos / source.file} {what} since {settings.out} was begun; {remedy}{more}")
            added.append(source)
        if added:
            _extend(plan, settings, Videos(added, skipped, looking.look_at(added, settings)))
            shards.write_atomic(path, json.dumps(plan).encode())
        elif append and skipped != (others := [line for line in plan["skipped"] if line["file"] not in plan["seen"]]):
            plan["skipped"] = [line for line in plan["skipped"] if line not in others] + skipped
            shards.write_atomic(path, json.dumps(plan).encode())
    return plan


def _add_prompts(plan: dict, settings: Settings, append: bool, remedy: str) -> bool:
    """Give prompts that are new a part of their own; whether there were any. ValueError for another file without `append`."""
    before, now = {source["caption"] for source in plan["sources"]}, settings.teacher.prompts
    added = [prompt for prompt in now if prompt not in before]
    if not append and (added or before - set(now)):
        what = f"{len(before)} prompts, of which the file now lacks {len(before - set(now))} and adds {len(added)}"
        raise ValueError(f"{settings.out} was begun with {what}; {remedy}; --append adds what is new")
    if added:
        plan["sources"] += assign_splits(_prompt_sources(added, settings), settings.split if len(added) > len(settings.split) else {}, settings.seed + len(plan["parts"]))
        plan["parts"].append(len(plan["sources"]))
    return bool(added)


def _prompt_sources(prompts, settings: Settings) -> list[dict]:
    return [{"caption": prompt, "windows": [[0.0, settings.teacher.clips]]} for prompt in prompts]


def _seen(settings: Settings, source: Source, before: dict | None = None) -> dict:
    """What tells a changed video or caption: its content (size in bytes and hash), captions and labels.

    The hash is of the first, middle and last MiB; it is taken again only where size or time of change are others.
    """
    path = settings.videos / source.file
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    if before is not None and before["stamp"] == stamp:
        content = before["content"]
    else:
        digest, chunk = hashlib.sha256(), 1 << 20
        with open(path, "rb") as file:
            for begin in sorted({0, max(0, stat.st_size // 2 - chunk // 2), max(0, stat.st_size - chunk)}):
                file.seek(begin)
                digest.update(file.read(chunk))
        content = [stat.st_size, digest.hexdigest()[:32]]
    return {"stamp": stamp, "content": content, "captions": source.captions, "labels": source.labels}


def make_plan(settings: Settings, over: Videos | None = None) -> dict:
    """Sources with their split and windows, in order, the files that cannot be used, and all files seen."""
    if drawn := settings.camera_motion or settings.moving_things:
        sources = [{"windows": [[0.0, 1]]} for _ in range(drawn)]
        return {"sources": assign_splits(sources, settings.split, settings.seed), "skipped": [], "parts": [drawn]}
    if settings.teacher:
        sources = assign_splits(_prompt_sources(settings.teacher.prompts, settings), settings.split, settings.seed)
        return {"sources": sources, "skipped": [], "parts": [len(sources)]}
    plan = {"sources": [], "skipped": [], "seen": {}, "parts": []}
    _extend(plan, settings, over or look_over(settings))
    return plan


def _extend(plan: dict, settings: Settings, over: Videos) -> None:
    """Add videos to a plan: a part of their own, so that the shards before keep their clips."""
    seen = {source.file: _seen(settings, source) for source in over.found}
    sources, skipped = [], list(over.skipped)
    for source in over.found:
        look = over.looks[source.file]
        if look.reason:
            skipped.append(skip(source.file, look.reason))
            continue
        if settings.buckets and looking.nearest(look.shape, settings.buckets) != (settings.height, settings.width):
            continue
        windows, left_out = looking.windows(look, settings)
        if left_out and not windows:
            skipped.append(skip(source.file, left_out))
            continue
        if left_out:
            skipped.append(skip(source.file, f"partly {left_out}"))
        sources.append({**vars(source), "start": look.start, "windows": windows, "sequential": look.sequential,
                        "oddities": look.oddities(settings, windows)})  # fmt: skip
    films = [tuple(seen[source["file"]]["content"]) for source in sources]
    later = bool(plan["parts"]) and len(set(films)) <= len(settings.split)
    alone = bool(settings.buckets) and len(set(films)) == 1 and count_clips(sources[0]) <= len(settings.split)
    if later or alone:  # too few to share: a film or two that come later, or one that has a size to itself, are trained on
        sources = [{**source, "split": "train"} for source in sources]
    else:
        sources = assign_splits(sources, settings.split, settings.seed + len(plan["parts"]), films)
    listed = {source.file for source in over.found}
    plan["skipped"] = [line for line in plan["skipped"] if line["file"] in plan["seen"] and line["file"] not in listed]
    known = {(line["file"], line["clip"], line["reason"]) for line in plan["skipped"]}
    plan["skipped"] += [line for line in skipped if (line["file"], line["clip"], line["reason"]) not in known]
    plan["sources"] += sources
    plan["seen"].update(seen)
    plan["parts"].append(len(plan["sources"]))


def count_clips(source: dict) -> int:
    """Samples a source gives: its clips, once for every caption."""
    return sum(count for _, count in source["windows"]) * len([1, *source.get("more", ())])


def assign_splits(sources: list[dict], shares: dict[str, float], seed: int, films: list | None = None) -> list[dict]:
    """Give every source a split; all clips of a video stay together, and copies of it, so none is seen in training and held out.

    A single video is split in time: its last clips are held out. ValueError where there is nothing to split. films: what is equal of copies.
    """
    if not shares or not sources:
        return [{**source, "split": "train"} for source in sources]
    films = list(range(len(sources))) if films is None else films
    distinct = list(dict.fromkeys(films))
    if len(distinct) == 1:
        return [part for source in sources for part in _split_in_time(source, shares)]
    if len(shares) >= len(distinct):
        raise ValueError(f"--split {_spelt(shares)}: {len(distinct)} usable {_kind(sources)}s cannot be shared by {len(shares)} splits "
                         f"and train, for all clips of a {_kind(sources)} stay together; add some, or leave a split out")  # fmt: skip
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    names = {}
    for number, (split, share) in enumerate(shares.items()):
        rest = len(shares) - number  # one is left for every split that follows, and for train
        count = min(max(1, round(share * len(distinct))), len(distinct) - len(names) - rest)
        names |= {distinct[index]: split for index in order[len(names) : len(names) + count]}
    return [{**source, "split": names.get(film, "train")} for source, film in zip(sources, films)]


def _kind(sources: list[dict]) -> str:
    return "video" if "file" in sources[0] else "prompt"


def _spelt(shares: dict[str, float]) -> str:
    return " ".join(f"{name}={share:g}" for name, share in shares.items())


def _split_in_time(source: dict, shares: dict[str, float]) -> list[dict]:
    total = sum(count for _, count in source["windows"])
    if total <= len(shares):
        raise ValueError(f"--split {_spelt(shares)}: there is one usable {_kind([source])}, and it has {total} clips; "
                         f"splitting it takes {len(shares) + 1}; add some, or leave --split out")  # fmt: skip
    parts, end = [], total
    for number, (split, share) in enumerate(shares.items()):
        count = min(max(1, round(share * total)), end - (len(shares) - number))
        parts.append((split, end - count, end))
        end -= count
    parts.append(("train", 0, end))
    return [{**source, "split": split, "first": first, "stop": stop} for split, first, stop in reversed(parts)]


def make_jobs(plan: dict) -> list[Job]:
    """Shards of `shard_size` consecutive clips of one split; videos that were appended later begin shards of their own."""
    size, number, jobs, written, first = plan["settings"]["shard_size"], 0, [], {}, 0
    for stop in plan["parts"]:
        by_split: dict[str, list] = {}
        for index in range(first, stop):
            source = plan["sources"][index]
            captions = len([1, *source.get("more", ())])
            inside = range(source.get("first", 0) * captions, source.get("stop", count_clips(source) // captions) * captions)
            for clip in inside:
                by_split.setdefault(source["split"], []).append((number, index, clip))
                number += 1
        for split, clips in sorted(by_split.items()):
            for i in range(0, len(clips), size):
                jobs.append(Job(f"{split}-{written.setdefault(split, 0):05d}.tar", clips[i : i + size]))
                written[split] += 1
        first = stop
    return jobs
