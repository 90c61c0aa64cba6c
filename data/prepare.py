"""Turn videos and captions into shards of normalised latents and text embeddings for a Wan-format diffusers folder:

    python data/prepare.py --videos DIR --model data/wan-mini --out data/shards/mine --split val=0.05
    python data/prepare.py --camera-motion 1920 --seed 1 --model data/wan-mini --out data/shards/camera

plan.json fixes which clip goes to which shard before anything is encoded, and a shard appears by one rename: kill the
program at any moment and run the same command again, and it writes what is missing, to the same bytes. What cannot be
used is left out and listed in skipped.jsonl. index.json, written last, is what usv.training.data.ShardDataset reads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from safetensors.torch import save
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import camera_motion  # noqa: E402
import shards  # noqa: E402
import videos  # noqa: E402
from encoder import Encoder, check_model, check_size, model_defaults  # noqa: E402
from shard_plan import Job, Settings, load_plan, make_jobs  # noqa: E402

from usv.cpu import keep_freed_memory  # noqa: E402
from usv.training.data import FORMAT, model_identity  # noqa: E402

BATCH_PIXELS = 8 * 9 * 96 * 96  # clips encoded together: 8 of Wan-mini's take 42 ms each on one core, one alone 77 ms


# ---- encoding, in this process or in workers -------------------------------------------------------------------------

_worker: dict = {}  # what a worker process keeps between shards


def start_worker(settings: Settings, plan: dict) -> None:
    """Load the model once per process; end with the parent, even when it is killed without a word."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        torch.set_num_threads(1)
    keep_freed_memory()
    disable_progress_bar()
    dtype = getattr(torch, settings.text_dtype)
    encoder = Encoder(settings.model, settings.max_sequence_length, dtype, settings.device, settings.text)
    _worker.update(settings=settings, plan=plan, encoder=encoder)


def write_job(job: Job) -> tuple[str, int, int]:
    """Write one shard; returns its name, samples and clips left out."""
    skipped: list[dict] = []  # filled while the samples are drawn, written after them
    count = shards.write_shard(_worker["settings"].out / job.name, samples(job, skipped), report=skipped)
    return job.name, count, len(skipped)


def samples(job: Job, skipped: list[dict]) -> Iterator[tuple[str, dict[str, torch.Tensor], dict]]:
    """The samples of one shard, encoded a few at a time; what is left out is appended to `skipped`."""
    settings, encoder = _worker["settings"], _worker["encoder"]
    most = max(1, BATCH_PIXELS // (settings.num_frames * settings.height * settings.width))
    waiting: list[tuple[int, torch.Tensor, dict]] = []

    def encode():
        latents = encoder.latents(torch.stack([frames for _, frames, _ in waiting]))
        for (number, _, info), latent in zip(waiting, latents, strict=True):
            if not latent.isfinite().all():
                reason = "corrupt: latents are not finite in fp16"
                skipped.append(videos.skip(info["source"], reason, info["clip"]))
                continue
            tensors = {"latents": latent}
            if settings.text:
                tensors["text"] = encoder.text(info["caption"])
            yield f"{number:08d}", tensors, info
        waiting.clear()

    for clip in clips(job, skipped):
        waiting.append(clip)
        if len(waiting) == most:
            yield from encode()
    if waiting:
        yield from encode()


def clips(job: Job, skipped: list[dict]) -> Iterator[tuple[int, torch.Tensor, dict]]:
    """(number, frames (T, 3, H, W) uint8, caption and labels) of one shard."""
    settings, plan = _worker["settings"], _worker["plan"]
    if settings.camera_motion:
        for number, _, _ in job.clips:
            clip = camera_motion.sample_clip(number, settings.seed, settings.num_frames, settings.height)
            labels = {"subject": clip.subject, "motion": clip.motion}
            source = {"source": f"camera-motion seed {settings.seed}", "clip": number}
            yield number, clip.frames, {"caption": clip.caption, **labels, **source}
        return
    size = settings.height, settings.width
    for index, entries in groupby(job.clips, key=lambda clip: clip[1]):
        source, group = plan["sources"][index], list(entries)
        numbers = {clip: number for number, _, clip in group}
        path, first, stop = settings.videos / source["file"], group[0][2], group[-1][2] + 1
        for clip, frames in videos.read_clips(
            path, source["start"], settings.fps, settings.num_frames, first, stop, size
        ):
            if isinstance(frames, str):
                skipped.append(videos.skip(source["file"], frames, clip))
            else:
                info = {**source["labels"], "caption": source["caption"], "source": source["file"], "clip": clip}
                yield numbers[clip], frames, info


# ---- the whole run ---------------------------------------------------------------------------------------------------


def run(settings: Settings, overwrite: bool = False) -> dict:
    """Write all that is missing of a folder; returns its index.

    Raises ValueError (settings the model cannot take, a folder begun with others, nothing usable), OSError as the file
    system does, RuntimeError when a worker process dies. Finished shards stay valid in all cases.
    """
    check_model(settings.model, settings.text)
    check_size(settings.model, settings.height, settings.width, settings.num_frames)
    if settings.camera_motion and settings.height != settings.width:
        raise ValueError(f"CameraMotion clips are square; got {settings.height} x {settings.width}")
    settings.out.mkdir(parents=True, exist_ok=True)
    with locked(settings.out):
        for path in settings.out.glob(shards.TEMPORARY):  # of a run that was killed; the lock says that none is alive
            path.unlink()
        if overwrite:
            for path in [settings.out / "index.json", settings.out / "plan.json", *settings.out.glob("*-?????.tar")]:
                path.unlink(missing_ok=True)
        plan = load_plan(settings)
        jobs = make_jobs(plan)
        todo = [job for job in jobs if not is_whole(settings.out / job.name)]
        empty = settings.out / "empty.safetensors"
        if todo or (jobs and settings.text and not empty.exists()):
            write_all(settings, plan, todo, sum(len(job.clips) for job in jobs))
        return finish(settings, plan, jobs)


@contextmanager
def locked(folder: Path):
    """Hold the folder for this process; the system lets go of it however the process ends."""
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


def write_all(settings: Settings, plan: dict, todo: list[Job], total: int) -> None:
    """Encode the missing shards, here or in worker processes, with a progress bar over clips."""
    missing = sum(len(job.clips) for job in todo)
    bar = tqdm(total=total, initial=total - missing, desc="encoding", unit="clip")
    left_out = 0

    def done(job: Job, result: tuple[str, int, int]) -> None:
        nonlocal left_out
        left_out += result[2]
        bar.set_postfix(shard=result[0], skipped=left_out)
        bar.update(len(job.clips))

    with bar:
        if settings.workers <= 1:
            start_worker(settings, plan)
            write_empty(settings)
            for job in todo:
                done(job, write_job(job))
            return
        context = multiprocessing.get_context("spawn")  # forking a process that has used torch can hang it
        workers = min(settings.workers, max(1, len(todo)))
        pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(settings, plan))
        try:
            first = pool.submit(write_empty, settings)
            futures = {pool.submit(write_job, job): job for job in todo}
            for future in as_completed(futures):
                done(futures[future], future.result())
            first.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died, most often for lack of memory; use fewer --workers and run the command again "
                "(finished shards are kept)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def write_empty(settings: Settings) -> None:
    """The embedding of the empty prompt, (n, D)."""
    path = settings.out / "empty.safetensors"
    if settings.text and not path.exists():
        shards.write_atomic(path, save({"text": _worker["encoder"].text("").contiguous()}))


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
    shards.write_atomic(settings.out / "skipped.jsonl", lines.encode())
    if sample is None:
        for name in (
            "index.json",
            *[job.name for job in jobs],
            "plan.json",
        ):  # so that mended videos are looked at anew
            (settings.out / name).unlink(missing_ok=True)
        reasons = _count_reasons(skipped) or f"no video in {settings.videos} (accepted: {sorted(videos.EXTENSIONS)})"
        raise ValueError(f"nothing to write: {reasons}; each file is listed in {settings.out / 'skipped.jsonl'}")
    index = {
        "format": FORMAT,
        "model": {"name": settings.model.resolve().name, **model_identity(settings.model)},
        "latent_shape": list(sample["latents"].shape),
        "text_dim": sample["text"].shape[1] if settings.text else None,
        **{name: getattr(settings, name) for name in ("max_sequence_length", "height", "width", "num_frames", "fps")},
        "splits": splits,
        "num_skipped": len(skipped),
    }
    shards.write_atomic(settings.out / "index.json", json.dumps(index, indent=1).encode())
    return index


def _count_reasons(skipped: list[dict]) -> str:
    kinds = Counter(line["reason"].partition(":")[0] for line in skipped)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def parse(argv: list[str] | None = None) -> tuple[Settings, bool]:
    """Command line -> settings and whether to overwrite; sizes default to what the model folder states in usv.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--videos", type=Path, help="folder of videos; captions in clip.txt, captions.csv or captions.jsonl"
    )
    what.add_argument("--camera-motion", type=int, metavar="N", help="make N CameraMotion clips instead")
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder of a Wan-format model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    for name in ("height", "width", "num-frames", "max-sequence-length"):
        parser.add_argument(
            f"--{name}", type=int, help="default: usv.json of the model, else Wan's 480 x 832 x 81, 512"
        )
    parser.add_argument("--fps", type=float, help="frames a second that clips have; default 8 for Wan-mini, 16 for Wan")
    parser.add_argument("--caption", help="caption of videos that have none")
    parser.add_argument("--seed", type=int, default=0, help="of CameraMotion and of the split")
    parser.add_argument("--split", nargs="*", default=[], metavar="NAME=SHARE", help="e.g. val=0.05; the rest is train")
    parser.add_argument("--shard-size", type=int, default=64, help="clips a shard")
    parser.add_argument("--workers", type=int, default=1, help="processes; each holds VAE and text encoder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (then with one worker)")
    parser.add_argument("--no-text", dest="text", action="store_false", help="latents and captions only")
    parser.add_argument("--text-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--overwrite", action="store_true", help="delete the shards in --out and begin again")
    args = vars(parser.parse_args(argv))
    overwrite, split = args.pop("overwrite"), {}
    for part in args.pop("split"):
        name, _, share = part.partition("=")
        try:
            split[name] = float(share)
        except ValueError:
            split[name] = -1.0
        if not name.isidentifier() or name == "train" or not 0 < split[name] < 1:
            parser.error(
                f"--split {part}: NAME=SHARE is accepted, NAME not train, SHARE between 0 and 1, e.g. val=0.05"
            )
    if sum(split.values()) >= 1:
        parser.error(f"--split {split}: the shares leave nothing for train")
    for name in ("camera_motion", "shard_size", "workers", "fps", "max_sequence_length"):
        if args[name] is not None and args[name] <= 0:
            parser.error(f"--{name.replace('_', '-')} {args[name]}: a number above 0 is accepted")
    defaults = model_defaults(args["model"])
    given = {name: value if value is not None else defaults.get(name) for name, value in args.items()}
    return Settings(**given, split=split), overwrite


def main(argv: list[str] | None = None) -> int:
    settings, overwrite = parse(argv)
    started = time.monotonic()
    try:
        index = run(settings, overwrite)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nprepare: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    for split, part in index["splits"].items():
        print(f"{split}: {part['num_samples']} clips in {len(part['shards'])} shards")
    if index["num_skipped"]:
        lines = (settings.out / "skipped.jsonl").read_text().splitlines()
        print(f"skipped: {_count_reasons([json.loads(line) for line in lines])}; see {settings.out / 'skipped.jsonl'}")
    print(f"latents {tuple(index['latent_shape'])} in {settings.out}, {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
