"""`Attend`: the self-attention that a sparse forward hands to one call of a block, in place of softmax(q kᵀ) v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from usv_kernels.selection import known_bound
from usv_kernels.token_merge import MergeLayout, MergeMap

from usv.sparse.attention import AttentionStats, Fine, sparse_attention
from usv.sparse.grid import TileLayout
from usv.sparse.joint import Text, dense_attention, with_beside
from usv.sparse.plan import LayerPlan, merged_tokens
from usv.sparse.sequence_parallel import Shards, gather, gather_heads, lengths_of, own_heads, to_heads, to_tokens


def any_size(x: Tensor, *dims: int) -> Tensor:
    """The tensor, of which a compiler is told that these sizes differ from call to call."""
    torch._dynamo.maybe_mark_dynamic(x, dims)
    return x


@lru_cache(maxsize=64)
def largest_tile(layout: TileLayout) -> int:
    return known_bound(layout.sizes.cpu())


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def merge_layout(layout: TileLayout, fraction: float) -> MergeLayout:
    counts = merged_tokens(LayerPlan(1, fraction), layout)
    return MergeLayout.build(layout.cells.cpu(), layout.sizes.cpu(), counts, device=layout.order.device)


@lru_cache(maxsize=64)
def merged_share(layout: TileLayout, fraction: float) -> float:
    """Share of the grid's tokens that merging by this fraction takes away: less than it where tiles or their cells are partial."""
    return sum(merged_tokens(LayerPlan(1, fraction), layout)) / layout.grid.num_tokens


@lru_cache(maxsize=64)
def shard_lengths(layout: TileLayout, fraction: float, size: int) -> tuple[int, ...]:
    """Tokens of each of `size` processes, merged by this fraction."""
    return lengths_of(merge_layout(layout, fraction).kept_sizes if fraction else layout.sizes, size)


Dense = Callable[[Tensor, Tensor, Tensor, Text | None], Tensor]  # q, k, v (B, H, ·, D) of all tokens, in the order of the run


@dataclass
class Attend:
    """One call of a block's self-attention.

    Attributes:
        rotary: what the block's carrier held, a row for each video token of this process, tile-major.
        layout: tiles of the whole grid. plan: None is dense. gate: makes the coarse branch's weight of `hidden`.
        merge_map: where the call is on merged tokens, which. shards: where processes share the sample, how.
        fine: in place of selection and fine branch (`usv.patterns.planned`). impl: how the kernel runs.
        dense: (q, k, v, text) -> the shape of q, in place of dense attention where plan is None.
        beside: tokens of the call behind those of the grid that are of none; dense, as text is.
        stats: of the call, when it was made under a plan.
        starts, sizes, largest: the blocks, and a bound on their sizes; of the plan and the layout, worked out here so that a compiled
            block finds them done.
    bounds: (num_kept, largest, 0), empty: both numbers as sizes, which a compiled block need not be compiled anew for.
    """

    rotary: Any
    layout: TileLayout
    plan: LayerPlan | None
    gate: nn.Module
    merge_map: MergeMap | None = None
    shards: Shards | None = None
    fine: Fine | None = None
    impl: str = "auto"
    stats: AttentionStats | None = None
    starts: Tensor | None = None
    sizes: Tensor | None = None
    largest: int = 0
    beside: int = 0
    dense: Dense | None = None
    bounds: Tensor | None = None

    def __post_init__(self):
        if self.plan is not None and self.plan.merged_fraction:
            whole = merge_layout(self.layout, self.plan.merged_fraction)
            self.starts, self.sizes, self.largest = whole.kept_starts, whole.kept_sizes, whole.kept_max
        elif self.plan is not None:
            self.starts, self.sizes, self.largest = self.layout.starts, self.layout.sizes, largest_tile(self.layout)
        if self.plan is not None:
            self.bounds = any_size(torch.empty(self.plan.num_kept, self.largest, 0), 0, 1)

    @property
    def positions(self) -> Tensor | None:
        """(B, K + E), rows of `rotary` that belong to the tokens of this call; None: all in their order."""
        if self.merge_map is None:
            return None
        kept, num = self.merge_map.kept_index, self.layout.grid.num_tokens
        if not self.beside:
            return kept
        beside = torch.arange(num, num + self.beside, device=kept.device, dtype=kept.dtype)
        return torch.cat((kept, beside.expand(len(kept), -1)), 1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, text: Text | None = None, bias: Tensor | None = None) -> Tensor:
        """Attention of the video tokens, and of the text where it is joint.

        Args:
            q, k, v: (B, H, S, D), or (B, H, T + S, D) with text; after norm and RoPE. S counts the tokens beside the grid.
            hidden: (B, S, C), the video tokens that q, k, v were made of.
            text: which of the tokens are text.
            bias: (B or 1, S, S) over all tokens in the order of the run, added to the logits of rows and of columns beside the grid; the
                grid's rows share their columns' (`Blocks.pairwise`).

        Returns:
            the shape of q.
        """
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms leave them in fp32
        if self.beside:
            text, hidden = with_beside(text, self.beside), hidden[:, : hidden.shape[1] - self.beside]
            text = text if bias is None else self._biased(text, bias)
        gate = None if self.plan is None else self.gate(hidden).transpose(1, 2)[..., None]
        sizes = None if self.merge_map is None else self.merge_map.log_sizes()[:, None]
        if self.shards is None:
            return self._attention(q, k, v, gate, sizes, text)
        return self._shared(q, k, v, gate, sizes, text)

    def _biased(self, text: Text, bias: Tensor) -> Text:
        """The tokens beside the grid with what `bias` adds to their rows and columns."""
        num, positions = self.layout.grid.num_tokens, self.positions
        rows = bias[:, num:]
        if positions is not None:
            rows = rows.expand(len(positions), -1, -1).gather(2, positions[:, None].expand(-1, self.beside, -1))
        return replace(text, columns=bias[:, 0, num:], rows=rows)

    def _attention(self, q, k, v, gate, bias, text: Text | None) -> Tensor:
        if self.plan is None:
            return (self.dense or dense_attention)(q, k, v, text)
        num_kept, largest = self.bounds.shape[:2] if torch.compiler.is_compiling() else (self.plan.num_kept, self.largest)
        group = None if self.shards is None else self.shards.group
        options = (num_kept, gate, bias, self.impl, self.fine, largest, self.plan.mass, text, group)
        out, self.stats = sparse_attention(q, k, v, self.starts, self.sizes, *options)
        return out

    def _shared(self, q, k, v, gate, bias, text: Text | None) -> Tensor:
        """`_attention` over all tokens, this process with its share of the heads; what comes in and goes out is of its own
        tokens, and all of the text."""
        group = self.shards.group
        fraction = 0.0 if self.plan is None else self.plan.merged_fraction
        lengths = shard_lengths(self.layout, fraction, group.size)
        parts, words = (q, k, v), ()
        if text is not None:
            words = tuple(own_heads(text.text(x), group) for x in parts)
            parts = tuple(text.video(x) for x in parts)
        parts = parts if gate is None else (*parts, gate.to(v.dtype))
        q, k, v, *gates = to_heads(parts, lengths, group)
        if bias is not None:
            bias = gather(bias.transpose(1, 2), lengths, group).transpose(1, 2)
        if text is not None:
            q, k, v = (text.join(x, y) for x, y in zip((q, k, v), words))
        out = self._attention(q, k, v, gates[0] if gates else None, bias, text)
        if text is None:
            return to_tokens(out, lengths, group)
        return text.join(to_tokens(text.video(out), lengths, group), gather_heads(text.text(out), group))
