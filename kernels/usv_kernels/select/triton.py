"""Block choice in Triton without a sort: one program a row finds the threshold score bit by bit.

Scores become integers that order like them. The threshold is the largest integer t for which the blocks at or above t
are enough, in number (top-k) or in number and mass (top-p); both only shrink as t grows, so 32 counts find it. Blocks
equal to t are then admitted by ascending index, which is the tie rule.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_its_device


@triton.jit
def _ordered(x):
    """int32 keys with the order of float32; -0 equals 0 and NaN is highest."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF))


@triton.jit
def _enough(at_or_above, mass, least, p, TOP_P: tl.constexpr):
    enough = tl.sum(at_or_above.to(tl.int32), 0) >= least
    if TOP_P:
        enough = enough & (tl.sum(tl.where(at_or_above, mass, 0.0), 0) >= p)
    return enough


@triton.jit(do_not_specialize=["p", "capacity"])
def _select_kernel(
    scores_ptr, rows_ptr, counts_ptr, lists_ptr, p, num_kv, capacity, TOP_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    score = tl.load(scores_ptr + row * num_kv + n, mask=n < num_kv, other=float("-inf")).to(tl.float32)
    allowed = score != float("-inf")
    key = _ordered(score)
    mass = tl.zeros([BLOCK_N], tl.float32)
    if TOP_P:
        # Finite also where every block is forbidden, so that no inf - inf and no 0 / 0 is ever formed.
        top = tl.maximum(tl.max(score, 0), -3.0e38)
        mass = tl.where(allowed, tl.exp(tl.where(allowed, score, top) - top), 0.0)
        total = tl.sum(mass, 0)
        # A score of NaN or +inf leaves no mass to compare: such a row keeps its least number of blocks.
        defined = total == total
        mass = tl.where(defined, mass / tl.maximum(total, 1e-30), 0.0)
        p = tl.where(defined | (p > 1.0), p, 0.0)
    least = tl.minimum(tl.load(rows_ptr + row), tl.sum(allowed.to(tl.int32), 0))

    # Bit 31 is the sign: all of the non-negative keys lie above all of the negative ones.
    threshold = tl.where(_enough(allowed & (key >= 0), mass, least, p, TOP_P), 0, -2147483648).to(tl.int32)
    step = tl.full((), 1073741824, tl.int32)
    for _ in range(31):
        candidate = threshold + step
        threshold = tl.where(_enough(allowed & (key >= candidate), mass, least, p, TOP_P), candidate, threshold)
        step = step >> 1

    above, at = allowed & (key > threshold), allowed & (key == threshold)
    num_above = tl.sum(above.to(tl.int32), 0)
    before = tl.cumsum(at.to(tl.int32), 0) - at.to(tl.int32)
    admitted = num_above + before < least
    if TOP_P:
        each = tl.max(tl.where(at, mass, 0.0), 0)
        mass_above = tl.sum(tl.where(above, mass, 0.0), 0)
        admitted = admitted | (mass_above + before.to(tl.float32) * each < p)
    kept = above | (at & admitted)

    count = tl.sum(kept.to(tl.int32), 0)
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(lists_ptr + row * capacity + slot, n, mask=kept & (slot < capacity))
    tl.store(lists_ptr + row * capacity + n, 0, mask=(n >= count) & (n < capacity))
    tl.store(counts_ptr + row, count)


@on_its_device
def select(scores: Tensor, rows: Tensor, p: float, capacity: int) -> tuple[Tensor, Tensor]:
    """Top-p where p <= 1 (1 keeps every block that is not forbidden), top-k otherwise; rows are the least counts."""
    num_kv = scores.shape[-1]
    counts = torch.empty(scores.shape[:3], dtype=torch.int32, device=scores.device)
    lists = torch.empty(*scores.shape[:3], capacity, dtype=torch.int32, device=scores.device)
    if counts.numel():
        block = triton.next_power_of_2(num_kv)
        # Above 1 no mass is enough: nothing is ever cut, whatever the sum of the masses rounds to.
        _select_kernel[(counts.numel(),)](scores.contiguous(), rows, counts, lists, 2.0 if p == 1.0 else p, num_kv,
                                          capacity, TOP_P=p <= 1.0, BLOCK_N=block,
                                          num_warps=1 if block <= 512 else 4 if block <= 4096 else 8)  # fmt: skip
    return counts, lists
