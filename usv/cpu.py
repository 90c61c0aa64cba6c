"""What makes PyTorch fast on a CPU, decided once per process."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from usv_kernels import multiplies_bf16
from usv_kernels.host_memory import keep_freed_memory as keep_freed_memory


def use_all_cores(threads: int | None = None) -> int:
    """Threads PyTorch computes with, set to `threads`, else to this process's share of the cores under `accelerate launch`.

    The launcher sets OMP_NUM_THREADS=1 where nobody chose a number, and training then leaves all cores but one idle. Without
    the launcher, or with another number than 1, nothing is changed.
    """
    if threads is None and "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def processor() -> str:
    """The CPU's model and its number of cores, for reports."""
    listing = Path("/proc/cpuinfo")  # Linux
    lines = listing.read_text().splitlines() if listing.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores"


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else float32.

    Without AVX512-BF16 or AMX, bf16 matrix products run 4–5× slower than fp32 (19 against 78 GFLOP/s, docs/log.md).
    """
    return torch.bfloat16 if multiplies_bf16() else torch.float32
