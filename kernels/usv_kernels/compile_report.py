"""What the compiler makes of every kernel, on a machine without a GPU: `python -m usv_kernels.compile_report`.

The product's own launches are made on GPUs that are not here (`absent_gpu`), so what is compiled is what runs, specialised as at run
time. Tabulated: registers, spills, shared and tensor memory, the occupancy these allow, the work of the matrix instructions over
that of the products, and the instructions of the inner loop; then the companion kernels (`compile_companions`). Figures of compiled
code, not of speed. `--half` takes the representative half that CI looks at.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from ._gpus import GPUS

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Largest query and key block the host knows (0: none), i.e. one tile a block, two tiles a block, and twice the nested loop.
LAYOUTS = {"tile 64": 64, "tile 128": 128, "tile 512": 512, "clusters": 0}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of a tile of queries and keys


def kernels():
    """Name -> Triton function, imported here because triton is slow to import and may be absent."""
    from .block_sparse_attention import triton_backward, triton_forward

    return {"forward": triton_forward.forward_kernel, "dq": triton_backward.dq_kernel, "dkv": triton_backward.dkv_kernel,
            "delta": triton_backward.delta_kernel, "gate_sum": triton_backward.gate_sum_kernel}  # fmt: skip


def launch(name: str, dim: int, dtype: torch.dtype, layout: str, extras: bool) -> None:
    """One of `kernels` as the product launches it; extras: with key bias and block gates."""
    from .block_sparse_attention import triton_launch as launches
    from .selection import BlockSelection, inverted_lists

    batch, heads, largest = 1, 2, LAYOUTS[layout]
    sizes = torch.full((2,), largest or 64)
    mask = torch.ones(batch, heads, 2, 2, dtype=torch.bool)
    sizes = sizes if largest else sizes.expand(batch, heads, 2)
    lists = BlockSelection.from_mask(mask, sizes, sizes)
    lists, length, bounds = lists.tensors(), int(sizes.sum(-1).max()), (largest, largest)
    q, k, v, grad = (torch.zeros(batch, heads, length, dim, dtype=dtype) for _ in range(4))
    bias, gate = (torch.zeros(batch, heads, length), torch.zeros(batch, heads, 2, 2)) if extras else (None, None)
    if name == "forward":
        launches.forward(q, k, v, lists, bias, gate, 1.0, *bounds)
    elif name == "delta":
        launches._delta(grad, grad, torch.zeros(batch, heads, length) if extras else None)
    else:
        rows = torch.zeros(batch, heads, length)
        strides = (0, 0) if bias is None else bias.stride()[:2]
        rest = (q, k, v, grad, rows, rows, bias, strides, gate, lists, 1.0, *bounds)
        if name == "dkv":
            dbias = None if bias is None else torch.zeros(batch, heads, length)
            launches._launch_dkv(torch.zeros_like(k), torch.zeros_like(v), dbias, *inverted_lists(*lists[:2], 2), *rest)
        else:
            launches._launch_dq(torch.zeros_like(q), gate, *rest)


def attention_row(name: str, dim: int, dtype: torch.dtype, layout: str, extras: bool, target: str) -> dict:
    """A row of the report, compiled in this process, whose driver becomes that of the target."""
    from . import absent_gpu
    from .block_sparse_attention import triton_launch
    from .machine_code import figures

    absent_gpu.become(target)
    before = len(absent_gpu.compiled(kernels()[name]))
    launch(name, dim, dtype, layout, extras)
    compiled = absent_gpu.compiled(kernels()[name])
    assert len(compiled) > before, "this process has compiled the same before"
    gpu, largest = GPUS[target], LAYOUTS[layout]
    cfg = triton_launch.config(name, dim, dtype, largest, largest, gpu) if name in PRODUCTS else triton_launch.Config(64, 0, 4, 3)
    found = figures(compiled[-1], gpu)
    useful = PRODUCTS.get(name, 0) * cfg.BM * cfg.BN * (dim if cfg.halves else triton_launch.triton.next_power_of_2(dim))
    return {
        "kernel": name, "D": dim, "dtype": TYPES[dtype], "layout": layout, "bias_and_gate": extras, "BM": cfg.BM, "BN": cfg.BN,
        "warps": cfg.num_warps, "stages": cfg.num_stages, "halves": cfg.halves, **found,
        "matrix_work": found["matrix_work"] / useful if found["matrix_work"] else None,
    }  # fmt: skip
