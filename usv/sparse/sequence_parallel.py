"""Sequence parallelism by head (Ulysses): N processes share one sample, each holding a run of whole tiles of its tokens.

    tokens of one's tiles --q, k, v, gate--> [all-to-all] --1/N of the heads, all tokens--> attention --> [all-to-all] --> one's tokens

Outside attention every operation is a token's own, and token merging is a tile's own, so both stay local; inside, blocks are
selected per head on the full sequence, as by one process. The exchanges are differentiable. Each process of a group sees the
same loss, and every runtime takes the mean of gradients over all processes. One rule makes it the gradient g of one process:

    what all processes hold (weights, text, row-major tokens)     gradients differ by process, their mean is g
    what one of them holds (its tokens, its heads)                N g

Where all come to hold what each has a part of, `gather` and `gather_heads`, the gradients of all are summed; where one takes its part
of what all hold, they stay what they are. Source: DeepSpeed Ulysses (arXiv 2309.14509).

Shape letters: B batch, H heads, h = H / N, S tokens, s one's own tokens, E width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist

from usv.sparse.grid import TileLayout


class ShardError(ValueError):
    """A model or clip that cannot be divided over so many processes."""


@dataclass(frozen=True)
class SequenceGroup:
    """This process, number `rank` of the `size` that share a sample, and their process group."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None

    def check(self, num_heads: int, num_tiles: int) -> None:
        """ShardError where heads cannot be divided evenly, or there are fewer tiles than processes."""
        if num_heads % self.size:
            divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
            raise ShardError(
                f"runtime.sequence_parallel: got {self.size}, but the model has {num_heads} heads; accepted: {divisors}"
            )
        if num_tiles < self.size:
            raise ShardError(
                f"runtime.sequence_parallel: got {self.size}, but a clip has {num_tiles} tiles and every process needs one; accepted: "
                f"at most {num_tiles}, or a smaller model.tile"
            )


def group_of(rank: int, world: int, size: int) -> SequenceGroup | None:
    """The `size` neighbouring processes of `world` that share a sample with process `rank`; None for one. Collective."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return SequenceGroup(rank % size, size, groups[rank // size])


def tile_bounds(num_tiles: int, size: int) -> list[int]:
    """(size + 1) tile numbers: process r holds the tiles bounds[r] to bounds[r + 1]."""
    return [r * num_tiles // size for r in range(size + 1)]


@dataclass(frozen=True)
class Shards:
    """How the clips of one grid lie on a group. layout: one's own tiles; begin, end: one's own tokens, in tile-major order."""

    group: SequenceGroup
    layout: TileLayout
    begin: int
    end: int


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def shards_of(layout: TileLayout, group: SequenceGroup) -> Shards:
    """The division of a grid's tiles. `order` of its layout still names tokens of the whole grid; it has no inverse."""
    first, last = tile_bounds(layout.num_blocks, group.size)[group.rank :][:2]
    lengths = lengths_of(layout.sizes, group.size)
    begin = sum(lengths[: group.rank])
    end = begin + lengths[group.rank]
    own = replace(
        layout, order=layout.order[begin:end], inverse=layout.order[:0], sizes=layout.sizes[first:last],
        starts=layout.starts[first:last] - begin, cells=layout.cells[first:last], num_src=layout.num_src[first:last],
    )  # fmt: skip
    return Shards(group, own, begin, end)


def lengths_of(sizes: torch.Tensor, size: int) -> tuple[int, ...]:
    """Tokens of every process, from the (M,) tokens of every tile."""
    bounds, tokens = tile_bounds(len(sizes), size), sizes.tolist()
    return tuple(sum(tokens[a:b]) for a, b in zip(bounds, bounds[1:]))


@contextmanager
def alone(*models) -> Iterator[None]:
    """Inside, this process runs SparseTransformers on whole sequences by itself."""
    groups = [model.sequence_group for model in models]
    for model in models:
        model.sequence_group = None
    try:
        yield
    finally:
        for model, group in zip(models, groups):
            model.sequence_group = group


# ---- exchanges -------------------------------------------------------------------------------------------------------


def to_heads(tensors: Sequence[torch.Tensor], lengths: Sequence[int], group: SequenceGroup) -> tuple[torch.Tensor, ...]:
    """Each (B, H, s, E), all heads of one's tokens -> (B, h, S, E), one's heads of all tokens; one exchange. Differentiable.

    Args:
        tensors: of one dtype; E may differ.
        lengths: tokens of every process; they may differ.
    """
    return _Exchange.apply(True, tuple(lengths), group, *tensors)


def to_tokens(x: torch.Tensor, lengths: Sequence[int], group: SequenceGroup) -> torch.Tensor:
    """Inverse of `to_heads`, of one tensor: (B, h, S, E) -> (B, H, s, E). Differentiable."""
    return _Exchange.apply(False, tuple(lengths), group, x)[0]


def gather(x: torch.Tensor, lengths: Sequence[int], group: SequenceGroup) -> torch.Tensor:
    """(B, s, …) -> (B, S, …), the tokens of all processes in order. The gradients of all are summed: what follows may differ by process, as
    where blocks of a second list take each its own tokens of the whole."""
    return _Gather.apply(x, tuple(lengths), group)


def own_heads(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """(B, H, T, E) that every process has -> (B, h, T, E), its own heads. The gradient is that of its heads, zeros elsewhere."""
    return _OwnHeads.apply(x, group)


def gather_heads(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """(B, h, T, E), one's own heads -> (B, H, T, E) on every process. The gradients of all are summed."""
    return _GatherHeads.apply(x, group)


class _OwnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, heads = group, x.shape[1] // group.size
        return x[:, group.rank * heads : (group.rank + 1) * heads].contiguous()

    @staticmethod
    def backward(ctx, grad):
        heads, group = grad.shape[1], ctx.group
        whole = grad.new_zeros(grad.shape[0], heads * group.size, *grad.shape[2:])
        whole[:, group.rank * heads : (group.rank + 1) * heads] = grad
        return whole, None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.heads = group, x.shape[1]
        parts = [torch.empty_like(x) for _ in range(group.size)]
        dist.all_gather(parts, x.contiguous(), group=group.group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group.group)
        begin = ctx.group.rank * ctx.heads
        return grad[:, begin : begin + ctx.heads], None


class _Exchange(torch.autograd.Function):
    """`to_heads`, or without it `to_tokens`; the gradient of each goes the other way."""

    @staticmethod
    def forward(ctx, to_heads, lengths, group, *tensors):
        ctx.to_heads, ctx.lengths, ctx.group = to_heads, lengths, group
        return _exchange(to_heads, tensors, lengths, group)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *_exchange(not ctx.to_heads, grads, ctx.lengths, ctx.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lengths, group):
        ctx.lengths, ctx.group = lengths, group
        mine = x.new_zeros(x.shape[0], max(lengths), *x.shape[2:])  # backends want equal sizes
        mine[:, : x.shape[1]] = x
        parts = [torch.empty_like(mine) for _ in lengths]
        dist.all_gather(parts, mine, group=group.group)
        return torch.cat([part[:, :length] for part, length in zip(parts, lengths)], dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group.group)
        begin = sum(ctx.lengths[: ctx.group.rank])
        return grad[:, begin : begin + ctx.lengths[ctx.group.rank]], None, None


def _exchange(to_heads: bool, tensors, lengths: tuple[int, ...], group: SequenceGroup) -> tuple[torch.Tensor, ...]:
    """All tensors in one message to each process: what is sent is cut along heads and joined along tokens, or the reverse."""
    heads, mine = tensors[0].shape[1] // (group.size if to_heads else 1), (lengths[group.rank],) * group.size
    cut, join, leaves, comes = (1, 2, mine, lengths) if to_heads else (2, 1, lengths, mine)
    each = [tensors[0].shape[0] * heads * x.shape[-1] for x in tensors]  # elements a token
    pieces = [x.split(heads if to_heads else lengths, dim=cut) for x in tensors]
    sent = torch.cat([x.flatten() for to in zip(*pieces) for x in to])
    received = sent.new_empty(sum(comes) * sum(each))
    dist.all_to_all_single(received, sent, [n * sum(each) for n in comes], [n * sum(each) for n in leaves], group=group.group)
    parts = []
    for chunk, length in zip(received.split([n * sum(each) for n in comes]), comes):
        flats = chunk.split([n * length for n in each])
        parts.append([flat.view(x.shape[0], heads, length, x.shape[-1]) for flat, x in zip(flats, tensors)])
    return tuple(torch.cat(part, dim=join) for part in zip(*parts))
