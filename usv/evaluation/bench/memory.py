"""`memory`: peak memory of a forward, dense against plans at the same shape; a fresh process for every side.

On a CPU resident memory, its high-water mark from just before the first forward; on a GPU what torch's allocator held.
"""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
from dataclasses import dataclass

import torch
from diffusers import WanPipeline
from usv_kernels.host_memory import give_back_freed_memory

from usv.config import ModelConfig
from usv.cpu import keep_freed_memory
from usv.evaluation.bench import training
from usv.evaluation.bench.measure import environment, peak_bytes, reset_peak
from usv.evaluation.bench.sides import pipeline_sides
from usv.sampling.generate import best_place, load_pipeline


@dataclass(frozen=True)
class Spec:
    """One side, in words that another process can build it from. plan: (density, merged); neither plan nor checkpoint: dense."""

    work: str  # forward | train
    model: ModelConfig
    batch_size: int
    name: str = "dense"
    checkpoint: str | None = None
    plan: tuple[float, float] | None = None
    repeats: int = 2
    threads: int | None = None


def specs(
    work: str, model: ModelConfig, checkpoints: dict[str, str], densities, merges, batch_size: int, repeats: int = 2
) -> list[Spec]:
    """Dense, then checkpoints, then plans: the order of `sides.pipeline_sides`."""
    shared = dict(work=work, model=model, batch_size=batch_size, repeats=repeats, threads=torch.get_num_threads())
    plans = [(density, merged) for density in densities for merged in merges]
    return [
        Spec(**shared),
        *(Spec(name=name, checkpoint=path, **shared) for name, path in checkpoints.items()),
        *(Spec(name=f"density {d:g}" + (f", {m:.0%} merged" if m else ""), plan=(d, m), **shared) for d, m in plans),
    ]


def in_fresh_process(spec: Spec) -> dict[str, int]:
    """`peak` of the side, in a process that has run nothing else."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak, spec).result()


def pipeline(path: str, work: str) -> WanPipeline:
    """The model as it is used: on a GPU in bf16, but for training, whose weights stay fp32 under autocast."""
    dtype, device = best_place()
    return load_pipeline(path, torch.float32 if work == "train" else dtype, device)


def peak(spec: Spec) -> dict[str, int]:
    """peak_bytes while working, and held_bytes just before: weights, libraries, teacher."""
    torch.set_num_threads(spec.threads or torch.get_num_threads())
    keep_freed_memory()  # as train.py and infer.py do
    pipe = pipeline(spec.model.path, spec.work)
    named = {} if spec.checkpoint is None else {spec.name: spec.checkpoint}
    densities, merges = ((spec.plan[0],), (spec.plan[1],)) if spec.plan else ((), ())
    sides, inputs = pipeline_sides(pipe, spec.model, named, densities, merges, spec.batch_size)
    side, teacher = sides[-1], sides[0].model  # dense is the only one where neither is given
    pipe.text_encoder, pipe.vae = None, None
    if spec.work == "train":
        own = None if spec.checkpoint is None else side.model  # already a network of its own beside the teacher
        run = training.trainers([side], teacher, inputs, spec.model.guidance_scale, own)[0].step
    else:
        run = lambda index: inputs.run(side, index)  # noqa: E731
        pipe.transformer = None  # a student does not need the model that it came from
    del sides, teacher
    gc.collect()
    give_back_freed_memory()
    reset_peak()
    held = peak_bytes()
    for _ in range(spec.repeats):
        for index in range(len(side.rows)):
            run(index)
    return {"peak_bytes": peak_bytes(), "held_bytes": held}


def bench(model: ModelConfig, checkpoints: dict[str, str], densities, merges, batch_size: int, repeats: int) -> dict:
    rows = {}
    for spec in specs("forward", model, checkpoints, densities, merges, batch_size, repeats):
        rows[spec.name] = {"batch_size": batch_size, **in_fresh_process(spec)}
    dense = rows["dense"]
    for r in rows.values():
        r["working_bytes"] = r["peak_bytes"] - r["held_bytes"]
        r["memory_ratio"] = r["peak_bytes"] / dense["peak_bytes"]
        r["working_ratio"] = r["working_bytes"] / max(1, dense["working_bytes"])
    return {"environment": environment(), "sides": rows}


def table(report: dict) -> str:
    lines = [f"{'':28}{'peak MiB':>10}{'ratio':>8}{'working MiB':>13}{'ratio':>8}"]
    for name, r in report["sides"].items():
        lines.append(
            f"{name:28}{r['peak_bytes'] / 2**20:10.0f}{r['memory_ratio']:8.2f}{r['working_bytes'] / 2**20:13.0f}{r['working_ratio']:8.2f}"
        )
    return "\n".join(lines)
