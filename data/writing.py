"""Encoding: a job of the plan to a shard, in this process or in worker processes that each hold the model."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby

import camera_motion
import moving_things
import shards
import torch
import videos
from encoder import Encoder
from safetensors.torch import save
from shard_plan import Job, Settings
from sources import skip
from tqdm import tqdm

from usv.cpu import keep_freed_memory

BATCH_PIXELS = 8 * 9 * 96 * 96  # clips encoded together: 8 of Wan-mini's take 42 ms each on one core, one alone 77 ms
STILL = 0.5  # levels of 255 by which the pictures of a clip differ at most on average if nothing moves in it

_worker: dict = {}  # what a worker process keeps between shards


def start_worker(settings: Settings, plan: dict, progress=None) -> None:
    """Load the model once per process; end with the parent, even when it is killed without a word.

    `progress`: a queue that gets 1 for every clip that is done.
    """
    from diffusers.utils.logging import disable_progress_bar

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        torch.set_num_threads(1)
    keep_freed_memory()
    disable_progress_bar()
    dtype = getattr(torch, settings.text_dtype)
    denoiser = None if settings.teacher is None else getattr(torch, settings.teacher.dtype)
    encoder = Encoder(settings.model, settings.max_sequence_length, dtype, settings.device, settings.text, denoiser)
    done = progress.put if progress is not None else lambda count: None
    _worker.update(settings=settings, plan=plan, encoder=encoder, done=done)


def write_job(job: Job) -> tuple[str, int, int]:
    """Write one shard; returns its name, samples and clips left out."""
    skipped: list[dict] = []  # filled while the samples are drawn, written after them
    settings = _worker["settings"]
    if settings.teacher is None:
        found = samples(job, skipped)
    else:
        from teacher import taught  # all of diffusers comes with it, and a look at videos needs none

        found = taught(settings, _worker["plan"], job, skipped, _worker["encoder"], _worker["done"])
    count = shards.write_shard(settings.out / job.name, found, report=skipped)
    return job.name, count, len(skipped)


def samples(job: Job, skipped: list[dict]) -> Iterator[tuple[str, dict[str, torch.Tensor], dict]]:
    """The samples of one shard, encoded a few at a time; what is left out is appended to `skipped`."""
    settings, encoder = _worker["settings"], _worker["encoder"]
    most = max(1, BATCH_PIXELS // (settings.num_frames * settings.height * settings.width))
    waiting: list[tuple[int, torch.Tensor, dict]] = []

    def encode():
        videos_of = list({id(frames): frames for _, frames, _ in waiting}.values())  # once for all captions of a clip
        given = {id(f): encoder.conditions(f) for f in videos_of}
        encoded = {id(f): latent for f, latent in zip(videos_of, encoder.latents(torch.stack(videos_of)), strict=True)}
        for number, frames, info in waiting:
            tensors = {"latents": encoded[id(frames)], **given[id(frames)]}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                skipped.append(skip(info["source"], "corrupt: latents are not finite in fp16", info["clip"]))
                continue
            if settings.text:
                tensors["text"] = encoder.text(info["caption"])
            yield f"{number:08d}", tensors, info
        waiting.clear()

    for clip in clips(job, skipped):
        waiting.append(clip)
        if len({id(frames) for _, frames, _ in waiting}) == most:
            yield from encode()
    if waiting:
        yield from encode()


def clips(job: Job, skipped: list[dict]) -> Iterator[tuple[int, torch.Tensor, dict]]:
    """(number, frames (T, 3, H, W) uint8, caption and labels) of one shard."""
    settings, plan = _worker["settings"], _worker["plan"]
    if settings.camera_motion or settings.moving_things:
        world, name, said = (camera_motion, "camera-motion", ("subject", "motion")) if settings.camera_motion else (moving_things, "moving-things", ("subject", "place", "motion", "camera"))
        for number, _, _ in job.clips:
            clip = world.sample_clip(number, settings.seed, settings.num_frames, settings.height)
            labels = {label: getattr(clip, label) for label in said}
            source = {"source": f"{name} seed {settings.seed}", "clip": number}
            _worker["done"](1)
            yield number, clip.frames, {"caption": clip.caption, **labels, **source}
        return
    for index, entries in groupby(job.clips, key=lambda clip: clip[1]):
        yield from _clips_of(plan["sources"][index], list(entries), skipped)


def _clips_of(source: dict, entries: list[tuple[int, int, int]], skipped: list[dict]):
    """The clips of one video, of whatever windows and captions."""
    settings = _worker["settings"]
    captions = [source["caption"], *source.get("more", ())]
    numbers: dict[int, list[tuple[int, str]]] = {}  # clip -> (number of the sample, its caption)
    for number, _, variant in entries:
        numbers.setdefault(variant // len(captions), []).append((number, captions[variant % len(captions)]))
    size, path, begin = (settings.height, settings.width), settings.videos / source["file"], 0
    for at, count in source["windows"]:
        inside = [clip - begin for clip in numbers if begin <= clip < begin + count]
        if inside:
            read = videos.read_clips(path, source["start"], settings.fps, settings.num_frames, min(inside),
                                     max(inside) + 1, size, at, source.get("sequential", False))  # fmt: skip
            for clip, frames in read:
                if not isinstance(frames, str) and settings.skip_still and _is_still(frames):
                    frames = "still: nothing moves"
                for number, caption in numbers[begin + clip]:
                    _worker["done"](1)
                    if isinstance(frames, str):
                        skipped.append(skip(source["file"], frames, begin + clip))
                        continue
                    info = {"caption": caption, "source": source["file"], "clip": begin + clip}
                    yield number, frames, {**source["labels"], **info}
        begin += count


def _is_still(frames: torch.Tensor) -> bool:
    return len(frames) > 1 and bool(((frames[1:].float() - frames[:1].float()).abs().mean((1, 2, 3)) < STILL).all())


def write_empty(settings: Settings) -> None:
    """The embedding of the empty prompt, (n, D)."""
    path = settings.out / "empty.safetensors"
    if settings.text and not path.exists():
        shards.write_atomic(path, save({"text": _worker["encoder"].text("").contiguous()}))


# ---- the local engine ------------------------------------------------------------------------------------------------


class _Put:
    """A queue's put, for one process."""

    def __init__(self, call: Callable[[int], None]):
        self.put = call


def write_all(settings: Settings, plan: dict, todo: list[Job], total: int) -> None:
    """Encode the missing shards, here, in worker processes or on a Ray cluster, with a progress bar over clips."""
    missing = sum(len(job.clips) for job in todo)
    bar = tqdm(total=total, initial=total - missing, desc="encoding", unit="clip")
    left_out = 0

    def done(result: tuple[str, int, int]) -> None:
        nonlocal left_out
        left_out += result[2]
        bar.set_postfix(shard=result[0], skipped=left_out)

    with bar:
        if settings.engine == "ray":
            from ray_engine import write_on_ray

            write_on_ray(settings, plan, todo, bar.update, done)
            return
        if settings.workers <= 1:
            start_worker(settings, plan, _Put(bar.update))
            write_empty(settings)
            for job in todo:
                done(write_job(job))
            return
        context = multiprocessing.get_context("spawn")  # forking a process that has used torch can hang it
        workers = min(settings.workers, max(1, len(todo)))
        queue = context.SimpleQueue()
        follower = threading.Thread(target=lambda: [bar.update(count) for count in iter(queue.get, 0)], daemon=True)
        follower.start()
        pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(settings, plan, queue))
        try:
            first = pool.submit(write_empty, settings)
            futures = {pool.submit(write_job, job): job for job in todo}
            for future in as_completed(futures):
                done(future.result())
            first.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died, most often for lack of memory; use fewer --workers and run the command again "
                "(finished shards are kept)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
            queue.put(0)
            follower.join(timeout=5)
