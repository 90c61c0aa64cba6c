"""Turn videos and captions into shards of normalised latents and text embeddings for a Wan-format diffusers folder:

    python data/prepare.py --videos DIR --model data/wan-mini --out data/shards/mine --split val=0.05
    python data/prepare.py --videos DIR --model data/wan-mini --out data/shards/mine --check
    python data/prepare.py --camera-motion 1920 --seed 1 --model data/wan-mini --out data/shards/camera

Of an image-to-video model (a folder whose model_index.json names WanImageToVideoPipeline) also what the model is given of a clip's first
frame, in FLF2V of its first and last: its latents and mask, and CLIP's embeddings where the model takes them.

plan.json fixes which clip goes to which shard before anything is encoded, and a shard appears by one rename: kill the
program at any moment and run the same command again, and it writes what is missing, to the same bytes. What cannot be
used is left out and listed in skipped.jsonl. index.json, written last, is what usv.training.data.ShardDataset reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import looking  # noqa: E402
import shards  # noqa: E402
from arguments import MOST_FPS, add_common, common  # noqa: E402
from encoder import check_model, check_size  # noqa: E402
from shard_plan import Job, Settings, Videos, load_plan, look_over, make_jobs, make_plan  # noqa: E402
from sources import EXTENSIONS  # noqa: E402
from writing import write_all  # noqa: E402

from usv.training.shards import FORMAT, model_identity  # noqa: E402


def run(settings: Settings, overwrite: bool = False, append: bool = False) -> dict:
    """Write all that is missing of a folder; returns its index.

    With `settings.buckets`, one folder for each size below `settings.out` and the clips nearest to it; returns the
    index of all their splits, keyed by `size/split`.

    Raises ValueError (settings the model cannot take, a folder begun with others, nothing usable), OSError as the file
    system does, RuntimeError when a worker process dies. Finished shards stay valid in all cases.
    """
    check(settings)
    return run_buckets(settings, overwrite, append) if settings.buckets else run_size(settings, overwrite, append)


def run_size(settings: Settings, overwrite: bool, append: bool, over: Videos | None = None) -> dict:
    """`run` of one size, whose settings are checked. over: its videos, where they were looked at before."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with locked(settings.out):
        for path in settings.out.glob(shards.TEMPORARY):  # of a run that was killed; the lock says that none is alive
            path.unlink()
        if overwrite:
            for path in [*(settings.out / name for name in ("index.json", "plan.json", "empty.safetensors")), *settings.out.glob("*-?????.tar")]:
                path.unlink(missing_ok=True)
        fresh = not (settings.out / "plan.json").exists()
        plan = load_plan(settings, append, over)
        if fresh and settings.videos:
            tell(plan, settings)
        jobs = make_jobs(plan)
        todo = [job for job in jobs if not is_whole(settings.out / job.name)]
        empty = settings.out / "empty.safetensors"
        if todo or (jobs and settings.text and not empty.exists()):
            write_all(settings, plan, todo, sum(len(job.clips) for job in jobs))
        return finish(settings, plan, jobs)


def check(settings: Settings) -> None:
    """ValueError for settings that the model or this machine cannot take."""
    check_model(settings.model, settings.text, settings.max_sequence_length, settings.teacher is not None)
    for height, width in settings.buckets or ((settings.height, settings.width),):
        check_size(settings.model, height, width, settings.num_frames)
    if (settings.camera_motion or settings.moving_things) and settings.height != settings.width:
        world = "CameraMotion" if settings.camera_motion else "MovingThings"
        raise ValueError(f"{world} clips are square; got {settings.height} x {settings.width}")
    if not 0 < settings.fps <= MOST_FPS:
        raise ValueError(f"--fps {settings.fps:g}: above 0 and up to {MOST_FPS:g} is accepted")
    elsewhere = settings.engine == "ray" and settings.address  # this machine then encodes nothing
    if settings.device.startswith("cuda") and not elsewhere and not torch.cuda.is_available():
        raise ValueError(f"--device {settings.device}: this PyTorch ({torch.__version__}) sees no CUDA device; use --device cpu")


def folder_of(settings: Settings) -> str:
    return f"{settings.height}x{settings.width}"


def run_buckets(settings: Settings, overwrite: bool, append: bool) -> dict:
    """One folder of shards for each size that any clip is nearest to."""
    total: dict = {"splits": {}, "num_skipped": 0, "latent_shape": []}
    folders = [replace(own, out=settings.out / folder_of(own)) for own in (replace(settings, height=h, width=w) for h, w in settings.buckets)]
    over = None
    if overwrite or not all((own.out / "plan.json").exists() for own in folders):  # once for all sizes
        over = look_over(settings)
    for own in folders:
        try:
            index = run_size(own, overwrite, append, over)
        except Empty as nothing:
            print(f"{own.out.name}: {nothing}", file=sys.stderr)
            continue
        total["splits"] |= {f"{own.out.name}/{name}": part for name, part in index["splits"].items()}
        total["num_skipped"] = max(total["num_skipped"], index["num_skipped"])
        total["latent_shape"].append(tuple(index["latent_shape"]))
    if not total["splits"]:
        raise ValueError(f"nothing to write into any of the --buckets; see skipped.jsonl in the folders of {settings.out}")
    return total


def tell(plan: dict, settings: Settings) -> None:
    """What is odd about the videos, and a picture of the first clips, before the work."""
    cut = looking.cut_captions(plan, settings)
    for line in looking.summary(plan, settings, cut):
        print(line, file=sys.stderr, flush=True)
    if not (settings.out / "index.json").exists():  # a look at a folder that is done keeps what encoding has found
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in plan["skipped"])
        shards.write_atomic(settings.out / "skipped.jsonl", lines.encode("utf-8", "backslashreplace"))
    if plan["sources"]:
        sheet = settings.out / "contact_sheet.png"
        looking.contact_sheet(plan, settings, sheet)
        print(f"the first clips, as the model will see them: {sheet}", file=sys.stderr, flush=True)


def look_only(settings: Settings) -> None:
    """--check: the summary, the contact sheet and skipped.jsonl, and no shards."""
    check(settings)
    sizes = settings.buckets or ((settings.height, settings.width),)
    over = look_over(settings)
    for height, width in sizes:
        own = replace(settings, height=height, width=width)
        if settings.buckets:
            own = replace(own, out=settings.out / folder_of(own))
            print(f"{folder_of(own)}:", file=sys.stderr)
        own.out.mkdir(parents=True, exist_ok=True)
        tell(make_plan(own, over), own)


class Empty(ValueError):
    """No clip can be used."""


@contextmanager
def locked(folder: Path):
    """Hold the folder for this process; the system lets go of it however the process ends. A store has no locks: there it is the user's to see to."""
    if not shards.is_local(folder):
        yield
        return
    import fcntl

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is being written by another prepare.py; wait for it, or use another --out"
            ) from None
        yield


def is_whole(path: Path) -> bool:
    """Whether a shard stands and can be read; one that cannot is removed, and said."""
    if not path.exists():
        return False
    try:
        if shards.read_report(path) is not None:
            return True
    except (tarfile.TarError, ValueError, OSError):
        pass
    print(f"{path} is damaged and will be written again", file=sys.stderr)
    path.unlink()
    return False


def finish(settings: Settings, plan: dict, jobs: list[Job]) -> dict:
    """Write skipped.jsonl and index.json from the plan and the reports in the shards."""
    skipped, splits, sample = list(plan["skipped"]), {}, None
    for job in jobs:
        path = settings.out / job.name
        report = shards.read_report(path)
        skipped += report
        count = len(job.clips) - len(report)
        if count:
            split = splits.setdefault(job.name.rpartition("-")[0], {"num_samples": 0, "shards": {}})
            split["num_samples"] += count
            split["shards"][job.name] = count
            sample = sample or next(shards.read_shard(path))[1]
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
    shards.write_atomic(settings.out / "skipped.jsonl", lines.encode("utf-8", "backslashreplace"))
    if sample is None:
        for name in (
            "index.json",
            *[job.name for job in jobs],
            "plan.json",
            "empty.safetensors",
        ):  # so that mended videos are looked at anew
            (settings.out / name).unlink(missing_ok=True)
        none = "no video has this shape" if settings.buckets and plan.get("seen") else f"no video in {settings.videos} (accepted: {sorted(EXTENSIONS)})"
        reasons = _count_reasons(skipped) or none
        raise Empty(f"nothing to write: {reasons}; each file is listed in {settings.out / 'skipped.jsonl'}")
    given = {name: list(tensor.shape) for name, tensor in sorted(sample.items()) if name not in ("latents", "text")}
    index = {
        "format": FORMAT,
        "model": {"name": settings.model.resolve().name, **model_identity(settings.model)},
        "latent_shape": list(sample["latents"].shape),
        "text_dim": sample["text"].shape[1] if settings.text else None,
        **({"conditions": given} if given else {}),
        **{name: getattr(settings, name) for name in ("max_sequence_length", "height", "width", "num_frames", "fps")},
        "splits": splits,
        "num_skipped": len(skipped),
    }
    if settings.teacher:
        index["teacher"] = settings.teacher.content(settings.model)
    shards.write_atomic(settings.out / "index.json", json.dumps(index, indent=1).encode())
    return index


def _count_reasons(skipped: list[dict]) -> str:
    kinds = Counter(line["reason"].partition(":")[0] for line in skipped)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def parse(argv: list[str] | None = None) -> tuple[Settings, bool]:
    """Command line -> settings and whether to overwrite; sizes default to what the model folder states in usv.json."""
    settings, how = parse_all(argv)
    return settings, how["overwrite"]


def parse_all(argv: list[str] | None = None) -> tuple[Settings, dict[str, bool]]:
    """As `parse`, with all that says how to run: overwrite, append, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--videos", type=Path, help="folder of videos, captioned by clip.txt or a table (data/README.md)")
    what.add_argument("--camera-motion", type=int, metavar="N", help="make N CameraMotion clips instead")
    what.add_argument("--moving-things", type=int, metavar="N", help="or N of MovingThings; --seed 7 to 20 are free, others are its teacher's or the metrics'")
    parser.add_argument("--caption", help="caption of videos that have none")
    parser.add_argument("--buckets", nargs="+", default=[], metavar="HxW", help="sizes, e.g. 480x832 832x480: each clip goes "
                        "into the nearest, in a folder of its own below --out")  # fmt: skip
    parser.add_argument("--skip-still", action="store_true", help="leave out clips in which nothing moves")
    parser.add_argument("--scenes", action="store_true", help="no clip runs over a cut (PySceneDetect)")
    parser.add_argument("--check", action="store_true", help="look at the videos, say what is odd, and write no shards")
    parser.add_argument("--no-text", dest="text", action="store_false", help="latents and captions only")
    add_common(parser)
    args = vars(parser.parse_args(argv))
    how = {name: args.pop(name) for name in ("overwrite", "append", "check")}
    if sum(how.values()) > 1:
        parser.error("--overwrite, --append and --check exclude each other")
    if (how["check"] or how["append"] or args["buckets"] or args["scenes"] or args["skip_still"]) and not args["videos"]:
        parser.error("--check, --append, --buckets, --scenes and --skip-still are for --videos")
    sizes = []
    for part in args.pop("buckets"):
        height, _, width = part.lower().partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            parser.error(f"--buckets {part}: HxW in pixels is accepted, e.g. 480x832")
        sizes.append((int(height), int(width)))
    if sizes and (args["height"] or args["width"]):
        parser.error("--buckets gives the sizes; leave out --height and --width")
    args["buckets"] = tuple(dict.fromkeys(sizes))
    return Settings(**common(parser, args, ("camera_motion", "moving_things"))), how


def main(argv: list[str] | None = None) -> int:
    settings, how = parse_all(argv)
    return perform(settings, "prepare", **how)


def perform(settings: Settings, name: str, overwrite: bool = False, append: bool = False, check: bool = False) -> int:
    """Write the shards, or only look, and say in words what came of it; returns the exit status. name: of the command, before its messages."""
    started = time.monotonic()
    try:
        if check:
            look_only(settings)
            return 0
        index = run(settings, overwrite, append)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    for split, part in index["splits"].items():
        print(f"{split}: {part['num_samples']} clips in {len(part['shards'])} shards")
    if index["num_skipped"]:
        paths = [settings.out / "skipped.jsonl"]
        if settings.buckets:
            paths = sorted(settings.out.glob("*/skipped.jsonl"))
        lines = dict.fromkeys(line for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line)
        print(f"skipped: {_count_reasons([json.loads(line) for line in lines])}; see {paths[0]}")
    shape = index["latent_shape"] if settings.buckets else tuple(index["latent_shape"])
    print(f"latents {shape} in {settings.out}, {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
