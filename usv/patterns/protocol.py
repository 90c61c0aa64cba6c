"""What every training-free pattern shares: its inputs, its plan, and the one call that runs it.

    q, k --plan--> (order of queries, order of keys, BlockSelection)
    out = inverse order( block_sparse_attention( ordered q, k, v ) )

A pattern decides from post-RoPE queries and keys, in row-major (frame-major) order, which blocks are computed. Text that
attends jointly with the video (CogVideoX before it, HunyuanVideo after it) stays dense in rows and columns: it is one more
block, outside the pattern. Shape letters: B batch, H heads, S video tokens, T text tokens, D head width, M and N query and
key blocks, K slots of a list.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from usv_kernels import BlockSelection, block_proxy, block_sparse_attention, inverse_permutation, permute

from usv.sparse.grid import TokenGrid
from usv.sparse.joint import Text

# "measure" counts density and recall: no part of the method
STAGES = ("profile", "cluster", "select", "permute", "attention", "measure")


def require(condition: bool, name: str, got, accepted: str) -> None:
    """Raises a ValueError `name: got …, accepted: …` unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: got {got}, accepted: {accepted}")


def check_kinds(settings) -> None:
    """ValueError for a setting that is not of its field's kind: a whole number, a number, or three whole numbers."""
    for one in fields(settings):
        kind, value = one.type.removesuffix(" | None"), getattr(settings, one.name)
        if value is None and kind != one.type:
            continue
        if kind in ("int", "float"):
            number, words = (Integral, "a whole number") if kind == "int" else (Real, "a number")
            require(isinstance(value, number) and not isinstance(value, bool), one.name, repr(value), words)
        elif kind.startswith("tuple"):
            three = isinstance(value, Sequence) and len(value) == 3 and all(isinstance(x, Integral) for x in value)
            require(three, one.name, value, "three positive extents (t, h, w), whole numbers")


def check_warm_up(settings) -> None:
    """ValueError unless both warm-up fractions lie in [0, 1]."""
    for name in ("dense_layers", "dense_steps"):
        value = getattr(settings, name)
        require(0 <= value <= 1, name, value, "a fraction in [0, 1]")


def block_sizes(num_tokens: int, block: int) -> Tensor:
    """(M,) int32 sizes of consecutive blocks, the last one partial."""
    count = math.ceil(num_tokens / block)
    sizes = torch.full((count,), block, dtype=torch.int32)
    sizes[-1] = num_tokens - (count - 1) * block
    return sizes


@dataclass
class PatternState:
    """What the attention calls of one network share; the caller sets the position before each call.

    layer of num_layers, step of num_steps: where the call is, for the dense warm-up. branch: which forward of the step
    (conditional, unconditional). centroids: SVG2's cache, by (layer, branch). recall_rows: query rows for measuring
    attention recall, 0 measures nothing.
    """

    layer: int = 0
    num_layers: int = 1
    step: int = 0
    num_steps: int = 1
    branch: int = 0
    recall_rows: int = 0
    centroids: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class PatternPlan:
    """One call's decision about the S video tokens.

    q_order, kv_order: (S,) or (B, H, S) int64, x_ordered = x[order]; None leaves the order. selection: over ordered tokens.
    proxy: key blocks that are not listed are there by their means (`usv_kernels.block_proxy`) instead of not at all.
    """

    q_order: Tensor | None
    kv_order: Tensor | None
    selection: BlockSelection
    proxy: bool = False


class Pattern(Protocol):
    """Frozen settings with a plan. Layers and steps below the two fractions stay dense."""

    dense_layers: float
    dense_steps: float

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, state: PatternState, text: Text | None, clock: Clock
    ) -> PatternPlan:
        """Plan for q, k, v (B, H, S [+ T], D); `clock.lap(stage)` after each stage. Only SVG's profiling looks at v."""


@dataclass(frozen=True)
class CallStats:
    """One attention call. density: executed token pairs / all pairs of real tokens. seconds: by stage. recall: share of the
    dense attention mass that was kept, on sampled rows; None if not measured. dense: a warm-up call."""

    layer: int
    step: int
    density: float
    seconds: dict[str, float]
    recall: float | None
    dense: bool


class Clock:
    """Seconds by stage. On a GPU a lap waits for the device, so that the time belongs to the stage."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict.fromkeys(STAGES, 0.0)
        self.last = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.seconds[stage] += now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def is_dense(pattern: Pattern, state: PatternState) -> bool:
    """True in the dense warm-up: layer < dense_layers · num_layers or step < dense_steps · num_steps."""
    # Rounding keeps 0.07 · 100 = 7.000000000000001 from becoming eight layers.
    layers, steps = pattern.dense_layers * state.num_layers, pattern.dense_steps * state.num_steps
    return state.layer < round(layers, 9) or state.step < round(steps, 9)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    pattern: Pattern,
    state: PatternState,
    text: Text | None = None,
    impl: str = "auto",
    key_bias: Tensor | None = None,
) -> tuple[Tensor, CallStats]:
    """Attention under a pattern.

    Args:
        q, k, v: (B, H, S, D) or, with text, (B, H, T + S, D); floating, post-RoPE, video tokens in row-major order.
        grid: of the S video tokens.
        pattern: settings, e.g. `SVG2(top_p=0.9)`.
        state: position of the call and cached centroids; written by SVG2 only.
        text: the text tokens of the sequence.
        impl: how the kernel runs.
        key_bias: (B, 1, S) added to the logits, the log of what each key stands for. SVG2 only, without text.

    Returns:
        out (B, H, ·, D) in the order and dtype of the inputs, and statistics.

    Raises:
        ValueError: a grid that does not fit the tokens, or settings that do not fit the grid.
    """
    _check(q, k, v, grid, text)
    require(key_bias is None or text is None, "key_bias", "a tensor beside text", "one of the two")
    clock = Clock(q.device)
    if is_dense(pattern, state):
        out = _dense(q, k, v, grid, text, key_bias)
        clock.lap("attention")
        recall = 1.0 if state.recall_rows else None
        return out, CallStats(state.layer, state.step, 1.0, clock.seconds, recall, True)
    with torch.no_grad():
        merged = {} if key_bias is None else {"key_bias": key_bias}
        plan = pattern.plan(q, k, v, grid, state, text, clock, **merged)
        recall = float(plan_recall(q, k, plan, text, state.recall_rows, key_bias)) if state.recall_rows else None
    clock.lap("measure")
    selection = plan.selection if text is None else join_text(plan.selection, text, grid.num_tokens)
    clock.lap("select")
    q_order, kv_order = (_joint_order(order, text, grid.num_tokens) for order in (plan.q_order, plan.kv_order))
    q, (k, v) = _ordered(q, q_order), (_ordered(x, kv_order) for x in (k, v))
    if key_bias is not None and kv_order is not None:
        key_bias = key_bias.expand(*k.shape[:2], -1).gather(-1, kv_order.expand(k.shape[:3]))
    clock.lap("permute")
    proxy = block_proxy(k, v, selection, key_bias) if plan.proxy else None
    out, _ = block_sparse_attention(q, k, v, selection, key_bias=key_bias, impl=impl, proxy=proxy)
    clock.lap("attention")
    if q_order is not None:
        out = permute(out, inverse_permutation(q_order))
        clock.lap("permute")
    density = executed_density(selection)
    clock.lap("measure")
    return out, CallStats(state.layer, state.step, density, clock.seconds, recall, False)


def _check(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid | None, text: Text | None) -> None:
    require(isinstance(grid, TokenGrid), "grid", grid, "the TokenGrid(t, h, w) of the video tokens")
    tokens = grid.num_tokens + (0 if text is None else text.num)
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == 4 and x.shape[2] == tokens, name, f"shape {tuple(x.shape)}",
                f"(B, H, {tokens}, D): {grid} has {grid.num_tokens} tokens, and text {tokens - grid.num_tokens}")  # fmt: skip


def _dense(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, text: Text | None, key_bias: Tensor | None) -> Tensor:
    if key_bias is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias.unsqueeze(-2).to(q.dtype))
    mask = None if text is None else text.key_mask(grid.num_tokens)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]) * mask[..., None]


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else permute(x, order)


def _joint_order(order: Tensor | None, text: Text | None, num_video: int) -> Tensor | None:
    """The order of the whole sequence: text stays where it is."""
    if order is None or text is None:
        return order
    offset, start = (text.num, 0) if text.before else (0, num_video)
    fixed = (start + torch.arange(text.num, device=order.device)).expand(*order.shape[:-1], text.num)
    return torch.cat((fixed, order + offset) if text.before else (order, fixed), -1)


def shared(selection: BlockSelection) -> bool:
    """Whether all heads use the same lists and layout, as one expanded tensor."""
    same = (x.stride()[:2] == (0, 0) for x in (selection.kv_indices, selection.kv_num_blocks))
    return all(same) and selection.q_sizes.dim() == selection.kv_sizes.dim() == 1


def join_text(selection: BlockSelection, text: Text, num_video: int) -> BlockSelection:
    """The selection of the joint sequence: text is the last block of either side, listed by and listing every block."""
    batch, heads, blocks, capacity = selection.kv_indices.shape
    num_kv, device = selection.num_kv_blocks, selection.kv_indices.device
    offset, start = (text.num, 0) if text.before else (0, num_video)
    counts, lists = selection.kv_num_blocks, selection.kv_indices
    if shared(selection):
        counts, lists = counts[:1, :1], lists[:1, :1]
    joint = torch.zeros(*lists.shape[:2], blocks + 1, num_kv + 1, dtype=torch.int32, device=device)
    joint[:, :, :blocks, :capacity] = lists
    joint[:, :, :blocks].scatter_(3, counts[..., None].long(), num_kv)
    joint[:, :, blocks] = torch.arange(num_kv + 1, device=device)
    counts = F.pad(counts + 1, (0, 1), value=num_kv + 1)

    def layout(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        if text.valid is None:
            return F.pad(starts + offset, (0, 1), value=start), F.pad(sizes, (0, 1), value=text.num)
        starts, sizes = (x.expand(batch, heads, x.shape[-1]) for x in (starts, sizes))
        real = text.valid.to(device=device, dtype=torch.int32)[:, None, None].expand(batch, heads, 1)
        return F.pad(starts + offset, (0, 1), value=start), torch.cat((sizes, real), -1)

    return BlockSelection(
        counts.expand(batch, heads, -1),
        joint.expand(batch, heads, -1, -1),
        *layout(selection.q_starts, selection.q_sizes),
        *layout(selection.kv_starts, selection.kv_sizes),
    )


def executed_pairs(selection: BlockSelection) -> tuple[int, int]:
    """Token pairs that attention over `selection` computes, and all pairs of the tokens its blocks cover; one head at a
    time, so the memory is one (M, K) list."""
    batch, heads = selection.kv_indices.shape[:2]
    repeat = batch * heads if shared(selection) else 1
    done = total = 0
    q_sizes, kv_sizes = (x.expand(batch, heads, x.shape[-1]).long() for x in (selection.q_sizes, selection.kv_sizes))
    for b, h in [(0, 0)] if repeat > 1 else [(b, h) for b in range(batch) for h in range(heads)]:
        lists, counts = selection.kv_indices[b, h], selection.kv_num_blocks[b, h]
        used = torch.arange(lists.shape[-1], device=lists.device) < counts[:, None]
        keys = torch.where(used, kv_sizes[b, h][torch.where(used, lists, 0).long()], 0).sum(-1)
        done += repeat * int((keys * q_sizes[b, h]).sum())
        total += repeat * int(q_sizes[b, h].sum() * kv_sizes[b, h].sum())
    return done, total


def executed_density(selection: BlockSelection) -> float:
    """Executed token pairs / all pairs."""
    done, total = executed_pairs(selection)
    return done / max(total, 1)


@torch.no_grad()
def plan_recall(
    q: Tensor, k: Tensor, plan: PatternPlan, text: Text | None, rows: int = 64, key_bias: Tensor | None = None
) -> Tensor:
    """Share of the dense attention mass that a plan keeps, on evenly spaced video rows: a 0-d fp32 tensor.

    q, k: (B, H, S [+ T], D). key_bias: (B, 1, S). Probabilities of the sampled rows exist for one head at a time, (rows, S + T), never S × S.
    """
    video = q if text is None else text.video(q)
    length, selection = video.shape[2], plan.selection
    index = torch.linspace(0, length - 1, min(rows, length), device=q.device).long()
    batch, heads = q.shape[:2]
    real = None if text is None else text.key_mask(length)
    total = q.new_zeros((), dtype=torch.float32)
    q_sizes, kv_sizes = (x.expand(batch, heads, x.shape[-1]).long() for x in (selection.q_sizes, selection.kv_sizes))
    for b in range(batch):
        for h in range(heads):
            q_block, kv_block = (
                _block_of(order if order is None or order.dim() == 1 else order[b, h], sizes[b, h])
                for order, sizes in ((plan.q_order, q_sizes), (plan.kv_order, kv_sizes))
            )
            lists, counts = (x[b, h][q_block[index]] for x in (selection.kv_indices, selection.kv_num_blocks))
            used = torch.arange(lists.shape[-1], device=q.device) < counts[:, None]
            listed = torch.zeros(len(index), selection.num_kv_blocks + 1, dtype=torch.bool, device=q.device)
            listed.scatter_(1, torch.where(used, lists, selection.num_kv_blocks).long(), True)
            kept = listed[:, kv_block]
            if text is not None:
                columns = kept.new_ones(len(index), text.num)
                kept = torch.cat((columns, kept) if text.before else (kept, columns), 1)
            scores = video[b, h, index].float() @ k[b, h].float().T / q.shape[-1] ** 0.5
            if key_bias is not None:
                scores = scores + key_bias[b].float()
            if real is not None:
                scores = scores.masked_fill(~real[b], float("-inf"))
            total += (scores.softmax(-1) * kept).sum(-1).mean()
    return total / (batch * heads)


def _block_of(order: Tensor | None, sizes: Tensor) -> Tensor:
    """(S,) block of each token in its original order."""
    block = torch.repeat_interleave(sizes)
    return block if order is None else block[inverse_permutation(order)]
