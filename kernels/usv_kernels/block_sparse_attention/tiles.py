"""Which tile each attention kernel takes, by GPU, head size, dtype and the largest block that the host knows.

Chosen from compiled code, not from timings: nothing spills inside a loop, no product is computed twice, the shared memory leaves
2 KiB of the device's, and as many programs fit on a multiprocessor as can (`python -m usv_kernels.compile_report`).
"""

from dataclasses import dataclass

import torch
import triton

from .._gpus import GPUS, Gpu

MAX_TILES = 4  # tiles of a block that one flat loop handles; larger or unknown blocks take the nested loop


@dataclass(frozen=True)
class Config:
    """Tile of one kernel: rows of queries, columns of keys, warps, pipeline stages; whether a head is walked in two parts of its
    channels (`triton_forward`); rows of AMD's matrix instruction, 0 for the compiler's choice."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    halves: bool = False
    nonkdim: int = 0


def _tile(largest: int, top: int) -> int:
    """Power of two in 16..top that holds a block of `largest` tokens (0: unknown) or is `top`."""
    return top if largest == 0 else max(16, min(top, triton.next_power_of_2(largest)))


def tiles_per_block(largest: int, tile: int) -> int:
    """Tiles in a block if the host knows it and they are few, else 0."""
    count = triton.cdiv(largest, tile)
    return count if 0 < count <= MAX_TILES else 0


def config(kernel: str, dim: int, dtype: torch.dtype, q_max: int, kv_max: int, gpu: Gpu = GPUS["sm_90"],
           proxy: bool = False) -> Config:  # fmt: skip
    """The tile of `forward`, `dq` or `dkv`. q_max, kv_max: the largest block of either side, 0 where the host does not know it. proxy:
    with a second loop, over proxies, which needs registers of its own."""
    loop = "q_max" if kernel == "dkv" else "kv_max"
    walked = {"q_max": q_max, "kv_max": kv_max}[loop]
    nested = tiles_per_block(walked, 64) == 0
    chosen = BY_UNIT[gpu.unit](kernel, dim, nested or proxy and gpu.unit == "mma.sync", q_max, kv_max, gpu) if dtype != torch.float32 else _full(kernel, dim, nested, q_max, kv_max)
    tile = chosen.BM if kernel == "dkv" else chosen.BN
    if not nested and tiles_per_block(walked, tile) == 0:  # too many of so small a tile: the nested loop, which needs more registers
        return config(kernel, dim, dtype, **{"q_max": q_max, "kv_max": kv_max, loop: 0}, gpu=gpu, proxy=proxy)
    return chosen


def _full(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int) -> Config:
    """fp32 products run on the scalar units: small tiles, and at D 128 more warps, keep the operands in registers."""
    wide = dim > 64
    bm, bn = (16, 16 if nested and kernel == "dq" else 32) if wide else (32, 32)
    warps = 4 if not wide or bn == 16 or (nested and kernel == "forward") else 8
    if kernel == "dkv" and nested and dim == 64:
        warps = 8
    pipelined = nested or kernel != "dq" if wide else kernel == "forward" and dim == 32
    return Config(_tile(q_max, bm), _tile(kv_max, bn), warps, 2 if pipelined else 1)


def _half(kernel: str, q_max: int, kv_max: int) -> tuple[int, int]:
    """Rows of queries and keys of a tile in half precision, before what a generation of GPUs makes smaller."""
    return _tile(q_max, 128 if kernel == "forward" and q_max > 64 else 64), _tile(kv_max, 64)


def _wgmma(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int, gpu: Gpu) -> Config:
    """Hopper reads operands from shared memory. A warpgroup, four warps, takes 64 rows: eight warps on fewer would compute the same
    product twice."""
    wide, (bm, bn) = dim > 64, _half(kernel, q_max, kv_max)
    if kernel == "forward":
        return Config(bm, bn, 8 if bm == 128 else 4, 2 if nested else 3)
    if not wide:
        return Config(bm, bn, 4, 3)
    # dQ, or dK and dV of 128 channels are held beside the scores: a full tile of those would spill, or a third stage leave one program.
    if kernel == "dq":
        return Config(bm, min(bn, 32), 4, 3) if nested else Config(bm, bn, 4, 2)
    return Config(min(bm, 16 if nested else 32), bn, 4, 2)


def _tcgen05(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int, gpu: Gpu) -> Config:
    """Blackwell's data centre parts, whose accumulators lie in tensor memory; in nested loops more warps hold what would spill."""
    wide, (bm, bn) = dim > 64, _half(kernel, q_max, kv_max)
    if not nested:
        return _wgmma(kernel, dim, nested, q_max, kv_max, gpu)
    narrow = min(bn, 32) if kernel == "dq" and wide else bn
    return Config(min(bm, 32 if kernel == "dkv" else 64), narrow, 8 if wide else 4, 2)


def _mma_sync(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int, gpu: Gpu) -> Config:
    """Ampere, Ada and consumer Blackwell: both operands of a product come from registers, and heads of more than 64 channels are
    walked in two parts (`triton_forward`). The smallest of these GPUs have 99 KiB of shared memory."""
    wide, (bm, bn) = dim > 64, _half(kernel, q_max, kv_max)
    consumer = gpu.name in ("sm_120", "sm_121")  # whose compiler keeps fewer of the same values in registers
    if wide:
        if kernel == "dkv":
            return Config(min(bm, 16), bn, 4, 2, halves=True)
        narrow = min(bn, 32) if kernel == "dq" or nested or consumer else bn
        bm = min(bm, 64) if nested else bm
        return Config(bm, narrow, 8 if bm == 128 else 4, 2, halves=True)
    if kernel == "dkv" and (nested or dim == 64):
        bm = min(bm, 32)
    if nested and kernel != "dkv" or consumer and kernel == "dq":
        bn = min(bn, 32)
    stages = 3 if not nested and (kernel == "forward" or kernel == "dq" and dim == 64) else 2
    return Config(bm, bn, 8 if bm == 128 else 4, stages)


def _mfma(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int, gpu: Gpu) -> Config:
    """CDNA: 512 registers a lane with four warps, 256 with eight; a pipeline's second stage lies in registers too. Matrix instructions
    of 16 rows: of 32, which the compiler would take, four warps on 64 rows compute every product one and a half times."""
    wide, (bm, bn) = dim > 64, _half(kernel, q_max, kv_max)
    if kernel == "dkv":
        return Config(min(bm, 32), bn, 4, 1 if wide else 2, nonkdim=16)
    narrow = min(bn, 32) if wide or kernel == "forward" else bn
    return Config(bm, narrow, 8 if bm == 128 else 4, 1 if wide and kernel == "dq" else 2, nonkdim=16)


def _wmma(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int, gpu: Gpu) -> Config:
    """RDNA: 256 registers a lane whatever the number of warps, and operands twice in the registers of a wave on RDNA 3."""
    wide, (bm, bn) = dim > 64, _half(kernel, q_max, kv_max)
    if kernel == "dkv":
        return Config(min(bm, 16), bn, 4, 1)
    narrow = min(bn, 16) if wide or kernel == "dq" else min(bn, 32)
    return Config(bm, narrow, 8 if bm == 128 else 4, 1)


BY_UNIT = {"wgmma": _wgmma, "tcgen05": _tcgen05, "mma.sync": _mma_sync, "mfma": _mfma, "wmma": _wmma}
