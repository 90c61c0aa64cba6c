"""Peak memory of sparse attention against dense SDPA at equal shapes.

On a CPU each side runs in a fresh process, `python -m usv_kernels.bench.memory SIDE ...`, which reports how far its resident
set rose above what it held before the call, inputs included there: outputs, gradients, plans and scratch count, whoever
allocates them. On a GPU it is the allocator's own peak.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import block_sparse_attention
from ..host_memory import give_back_freed_memory
from .timing import random_selection

SIDES = ("sdpa_dense", "ours")
PASSES = (False, True)  # with the backward?


def cuda_peak(function: Callable[[], None]) -> int:
    """Bytes that a call allocates on the GPU at its peak, beyond what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak() -> int:
    """High-water mark of this process's resident set, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def cpu_peak(function: Callable[[], None]) -> int:
    """Bytes by which a call raises the resident set of this process."""
    give_back_freed_memory()
    mark = Path("/proc/self/clear_refs")
    if os.access(mark, os.W_OK):
        mark.write_text("5")  # the high-water mark starts again from what is resident now
    before = resident_peak()
    function()
    return resident_peak() - before


def call(side: str, heads: int, length: int, dim: int, density: float, block: int, dtype: torch.dtype, backward: bool) -> Callable[[], None]:
    """The call to measure, with its inputs already allocated and touched."""
    q, k, v, grad = (torch.randn(1, heads, length, dim, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    selection = random_selection(heads, length, block, density, "cpu")  # on both sides: what it frees would be there to be used again

    def function():
        out = block_sparse_attention(q, k, v, selection, impl="cpu")[0] if side == "ours" else F.scaled_dot_product_attention(q, k, v)
        if backward:
            torch.autograd.grad(out, leaves, grad)

    return function


def compare_on_cpu(heads: int, length: int, dim: int, density: float, block: int, dtype: torch.dtype) -> list[dict]:
    """Rows of one shape, forward, then forward and backward: bytes of both sides and their ratio."""
    rows = []
    for backward in PASSES:
        peaks = {}
        for side in SIDES:
            command = [sys.executable, "-m", "usv_kernels.bench.memory", side, *map(str, (heads, length, dim, density, block)),
                       str(dtype).removeprefix("torch."), *(["--backward"] if backward else [])]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"bench.memory {side}: {done.stderr[-1000:]}")
            peaks[side] = json.loads(done.stdout)["peak_bytes"]
        rows.append({"pass": "forward+backward" if backward else "forward", "S": length, "D": dim, "H": heads, "block": block,
                     "dtype": str(dtype).removeprefix("torch."), "density": density, "peak_bytes": peaks,
                     "ratio": peaks["ours"] / max(peaks["sdpa_dense"], 1)})  # fmt: skip
        print(f"S {length} D {dim} {rows[-1]['dtype']} {rows[-1]['pass']}: peak " + ", ".join(f"{n} {b / 2**20:.1f} MiB" for n, b in peaks.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    for name, kind in (("heads", int), ("length", int), ("dim", int), ("density", float), ("block", int), ("dtype", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--backward", action="store_true")
    args = parser.parse_args()
    given = args.dim, args.density, args.block, getattr(torch, args.dtype), args.backward
    call(args.side, 1, 4 * args.block, *given)()  # libraries load and threads start
    print(json.dumps({"peak_bytes": cpu_peak(call(args.side, args.heads, args.length, *given))}))


if __name__ == "__main__":
    main()
