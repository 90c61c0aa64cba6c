"""Timing: alternating repetitions, quantiles, clocks around parts of a forward, peak memory, and what machine it was."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

import torch

import usv.sparse.attention
from usv.cpu import processor
from usv.files import write_result
from usv.models import forward, tokens, wan
from usv.sampling.generate import now
from usv.sparse.plan import SparsityPlan
from usv.training.run import commit


def timed(function: Callable, clock: Callable[[], float] = now) -> float:
    """Seconds of one call."""
    begun = clock()
    function()
    return clock() - begun


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p10, p50, p90 by linear interpolation, and how many samples they come from."""
    values = sorted(samples)
    if len(values) == 1:
        return {"p10": values[0], "p50": values[0], "p90": values[0], "samples": 1}
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p10": cuts[0], "p50": statistics.median(values), "p90": cuts[8], "samples": len(values)}


def interleaved(functions: Mapping[str, Callable], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every function, all of them in turn in every repetition, so that a noisy machine hurts all alike."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-warmup, repeats):
        for name, function in functions.items():
            seconds = timed(function)
            if repeat >= 0:
                samples[name].append(seconds)
    return samples


class Clock:
    """Seconds by part. Of nested parts only the outermost counts; `total` runs beside the parts, around them."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.running: set[str] = set()

    def wrap(self, part: str, function: Callable, group: str = "part") -> Callable:
        """`function`, timed as `part` unless something of its group already runs."""

        @wraps(function)
        def clocked(*args, **kwargs):
            if group in self.running:
                return function(*args, **kwargs)
            self.running.add(group)
            begun = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += now() - begun
                self.running.discard(group)

        return clocked


# Where the parts of a sparse forward are called. Wrapping the names from outside costs nothing when nothing is measured.
PARTS = (
    ("policy", SparsityPlan, "at"),
    ("selection", usv.sparse.attention, "_coarse_scores"),
    ("selection", usv.sparse.attention, "select_top_k"),
    ("statistics", usv.sparse.attention, "_stats"),
    ("coarse", usv.sparse.attention, "_add_coarse"),
    ("attention", usv.sparse.attention, "block_sparse_attention"),
    ("attention", torch.nn.functional, "scaled_dot_product_attention"),
    ("norm_rope", wan, "norm_rope"),
    ("merging", tokens.Tokens, "merged"),
    ("merging", tokens, "gather_kept"),
    ("merging", tokens, "unmerge"),
)
BLOCK = (("block", forward, "_run_layer"), ("block", tokens.Tokens, "all"))
OVERHEAD = ("policy", "selection", "statistics", "merging")


@contextmanager
def clocked(model: forward.SparseTransformer):
    """A Clock over every forward of `model` inside the block: the PARTS, the blocks' modules, and "block", all blocks."""
    clock, undo = Clock(), []
    for entries, group in ((PARTS, "part"), (BLOCK, "block")):
        for part, owner, name in entries:
            original = getattr(owner, name)
            setattr(owner, name, clock.wrap(part, original, group))
            undo.append(lambda owner=owner, name=name, original=original: setattr(owner, name, original))
    for block in model.transformer.blocks:
        attn = block.attn1
        modules = [("projections", m) for m in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])]
        for part, module in [*modules, ("cross_attention", block.attn2), ("ffn", block.ffn)]:
            module.forward = clock.wrap(part, module.forward)
            undo.append(lambda module=module: delattr(module, "forward"))
    try:
        yield clock
    finally:
        for step in undo:
            step()


def overhead(seconds: Mapping[str, float], whole: float) -> float:
    """Share of `whole` seconds that went into deciding, selecting and merging."""
    return sum(seconds.get(part, 0.0) for part in OVERHEAD) / whole


def environment() -> dict:
    """What a reader needs to judge the figures."""
    import diffusers

    info = {
        "torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "commit": commit(),
    }  # fmt: skip
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **info}
    capability = torch.backends.cpu.get_cpu_capability()
    load = round(os.getloadavg()[0], 2)  # beyond `threads` somebody else was computing too
    return {"device": processor(), "capability": capability, "load_before": load, **info}


def write(report: dict, out: Path | None) -> None:
    """The report with the command that made it, as JSON."""
    report["command"] = "python -m usv.bench " + " ".join(sys.argv[1:])
    if out is not None:
        write_result(out, report)


def peak_bytes() -> int:
    """Most memory held so far: of the GPU's allocator, else resident memory of the process since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Let `peak_bytes` begin at what is held now, where the system can (Linux, CUDA); elsewhere it includes loading."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
