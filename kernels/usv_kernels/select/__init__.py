"""From coarse scores to the blocks each query block attends to.

    top-k:  the num_kept highest scores of a row
    top-p:  with m = softmax(scores), in descending order, every block that has less than p of the mass before it:
            up to and including the block that crosses p; and never fewer than ceil(floor * N) blocks

Ties: of equal scores the lower block index wins. A score of -inf, or an empty key block, forbids a block: it is never
listed, not even to fill a count. NaN ranks highest, so that it shows in the result instead of vanishing. Lists ascend.
Sources: top-k tiles of VSA (https://arxiv.org/abs/2505.13389), top-p clusters of SVG2
(https://arxiv.org/abs/2505.18875; scores there are c_q.c_k / sqrt(D) + log(size_k), formed by the caller). A choice has
no gradient: scores are detached. Limits: the Triton kernel holds a row in registers, N <= 8192.
"""

import math

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, looks_at_values, require
from .._impl import check_float, custom_op, require_triton, resolve
from ..selection import BlockSelection
from . import cpu, reference

__all__ = ["select_top_k", "select_top_p"]


def select_top_k(
    scores: Tensor,
    num_kept: int | Tensor,
    q_starts: Tensor,
    q_sizes: Tensor,
    kv_starts: Tensor,
    kv_sizes: Tensor,
    capacity: int | None = None,
    impl: str = "auto",
    q_max: int = 0,
    kv_max: int = 0,
) -> BlockSelection:
    """Lists the `num_kept` highest-scored key blocks of every query block.

    Args:
        scores: (B, H, M, N) floating.
        num_kept: blocks per row in 1..N: one integer, or an integer tensor (H,) or (B, H, M), whose values are clamped
            to 1..capacity (looking at them would stall a GPU).
        q_starts, q_sizes: (M,) or (B, H, M) int32, layout of the query blocks. kv_starts, kv_sizes: (N,) or (B, H, N).
        capacity: slots of each list. Default num_kept if it is an integer, else N.
        impl: auto | reference | cpu | triton.
        q_max, kv_max: bounds on the sizes where the caller knows them, see `BlockSelection`; 0: unknown.

    Returns:
        BlockSelection with lists of `capacity` slots; slots beyond a row's count hold 0.

    Raises:
        ValueError: wrong shape, dtype, device, count or impl.
    """
    scores = _prepare(scores, kv_sizes)
    batch, heads, blocks, num_kv = scores.shape
    fixed = isinstance(num_kept, int)
    if fixed:
        require(1 <= num_kept <= num_kv, "num_kept", num_kept, lambda: f"an integer in 1..{num_kv}")
    else:
        shapes = ((heads,), (batch, heads, blocks))
        require(
            tuple(num_kept.shape) in shapes,
            "num_kept",
            f"shape {tuple(num_kept.shape)}",
            f"(H,) or (B, H, M): {shapes}",
        )
        require(not num_kept.is_floating_point(), "num_kept", num_kept.dtype, "integers")
        require(num_kept.device == scores.device, "num_kept", f"device {num_kept.device}", f"{scores.device}")
    capacity = (num_kept if fixed else num_kv) if capacity is None else capacity
    least = num_kept if fixed else 1
    require(least <= capacity <= num_kv, "capacity", capacity, lambda: f"an integer in {least}..{num_kv}")
    impl = resolve("select_top_k", impl, scores, ("reference", "cpu", "triton"), _limit(num_kv))
    if fixed:
        rows = torch.full((batch, heads, blocks), num_kept, dtype=torch.int32, device=scores.device)
    else:
        rows = num_kept.to(torch.int32).clamp(1, capacity)
        rows = (rows[:, None] if rows.dim() == 1 else rows).expand(batch, heads, blocks).contiguous()
    counts, lists = _select(scores, rows, num_kept if fixed else 0, 2.0, 0, capacity, impl)
    return BlockSelection(counts, lists, q_starts, q_sizes, kv_starts, kv_sizes, q_max, kv_max)


def select_top_p(
    scores: Tensor,
    p: float,
    floor: float,
    q_starts: Tensor,
    q_sizes: Tensor,
    kv_starts: Tensor,
    kv_sizes: Tensor,
    impl: str = "auto",
    q_max: int = 0,
    kv_max: int = 0,
) -> BlockSelection:
    """Lists key blocks in descending order up to and including the one with which a fraction p of the mass is reached.

    Args:
        scores: (B, H, M, N) floating logits; the mass of a block is softmax(scores) over its row, in float32.
        p: in (0, 1]; 1 lists every block that is not forbidden.
        floor: in [0, 1]; at least ceil(floor * N), and at least 1, blocks are listed.
        Others as in `select_top_k`. Lists have N slots.

    Raises:
        ValueError: wrong shape, dtype, device, fraction or impl.
    """
    scores = _prepare(scores, kv_sizes)
    require(0.0 < p <= 1.0, "p", p, "a fraction in (0, 1]")
    require(0.0 <= floor <= 1.0, "floor", floor, "a fraction in [0, 1]")
    num_kv = scores.shape[-1]
    # Rounding first keeps 0.07 * 100 = 7.000000000000001 from becoming 8.
    least = max(1, math.ceil(round(floor * num_kv, 9)))
    impl = resolve("select_top_p", impl, scores, ("reference", "cpu", "triton"), _limit(num_kv))
    rows = torch.full(scores.shape[:3], least, dtype=torch.int32, device=scores.device)
    counts, lists = _select(scores, rows, 0, float(p), least, num_kv, impl)
    return BlockSelection(counts, lists, q_starts, q_sizes, kv_starts, kv_sizes, q_max, kv_max)


def _limit(num_kv: int) -> tuple:
    return num_kv <= 8192, "scores", lambda: f"N = {num_kv}", "at most 8192 for impl='triton'"


def _prepare(scores: Tensor, kv_sizes: Tensor) -> Tensor:
    """Checks scores, and forbids empty key blocks."""
    check_float("scores", scores, 4, "(B, H, M, N)")
    require(scores.dtype in FLOAT_DTYPES and scores.shape[-1] > 0, "scores", f"shape {tuple(scores.shape)}", "N >= 1")
    expected = ((scores.shape[-1],), (*scores.shape[:2], scores.shape[-1]))
    require(
        tuple(kv_sizes.shape) in expected,
        "kv_sizes",
        f"shape {tuple(kv_sizes.shape)}",
        f"{expected[0]} or {expected[1]}",
    )
    require(kv_sizes.device == scores.device, "kv_sizes", f"device {kv_sizes.device}", f"{scores.device}")
    empty = kv_sizes == 0
    if looks_at_values(kv_sizes, debug=False) and not empty.any():
        return scores.detach()  # on a CPU: most layouts have none, and the copy took a tenth of the selection
    return scores.detach().masked_fill(empty.unsqueeze(-2) if empty.dim() == 3 else empty, float("-inf"))


@custom_op("select")
def _select(
    scores: Tensor, rows: Tensor, fixed: int, p: float, floor: int, capacity: int, impl: str
) -> tuple[Tensor, Tensor]:
    """Top-k where p > 1 (`fixed` is the one count of all rows, or 0 where `rows` differ), top-p otherwise."""
    if impl == "triton":
        require_triton(scores)
        from . import triton as backend

        return backend.select(scores, rows, p, capacity)
    if impl == "cpu" and scores.dtype != torch.float64:
        return cpu.top_k(scores, rows, fixed, capacity) if p > 1.0 else cpu.top_p(scores, p, floor, capacity)
    mask = reference.top_k_mask(scores, rows) if p > 1.0 else reference.top_p_mask(scores, p, floor)
    counts = mask.sum(-1)
    order = torch.argsort(~mask, dim=-1, stable=True)[..., :capacity]
    unused = torch.arange(capacity, device=order.device) >= counts[..., None]
    return counts.to(torch.int32), order.masked_fill(unused, 0).to(torch.int32)


@_select.register_fake
def _(scores, rows, fixed, p, floor, capacity, impl):
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    return counts, scores.new_empty((*scores.shape[:3], capacity), dtype=torch.int32)
