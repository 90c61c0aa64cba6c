"""Token merging inside small cells, with exact identities: nothing merged, or equal tokens, change nothing.

    match    in every tile the num_merged src tokens with the highest cosine similarity to their cell's dst
    merge    z_dst <- (z_dst + sum of its merged z_src) / (1 + count)
    unmerge  every merged src receives its dst's update (not its state: the src keeps its own residual)

Source: USV (https://arxiv.org/abs/2512.05754). Counts per tile are fixed, so every shape is static and a tile of T
tokens stays one block of T - num_merged. Ties in similarity go to the lower position; a zero descriptor has similarity
0. A merged key carries + log(size) in attention logits: `MergeMap.log_sizes`. Matching has no gradient; merge and
unmerge have, once. Limits: Triton's `match` holds a tile in registers, at most 256 tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_shape, require
from .._impl import check_float, custom_op, require_triton, resolve
from . import cpu, reference
from .layout import MergeLayout

__all__ = ["MergeLayout", "MergeMap", "gather_kept", "match", "merge", "unmerge"]

IMPLS = ("reference", "cpu", "triton")


@dataclass(frozen=True)
class MergeMap:
    """Which tokens stay and where each one went.

    Attributes:
        layout: the `MergeLayout` it was matched with. Kept tokens stay in tile-major order; tile i of the merged
            sequence is `layout.kept_starts[i]` .. + `layout.kept_sizes[i]`.
        kept_index: (B, S_kept) int64, positions of the kept tokens in the original sequence, ascending.
        token_slot: (B, S) int64, for each original token its row of the merged sequence.
        sizes: (B, S_kept) int32, original tokens in each row, >= 1.
    """

    layout: MergeLayout
    kept_index: Tensor
    token_slot: Tensor
    sizes: Tensor

    def log_sizes(self) -> Tensor:
        """(B, S_kept) float32, the bias a merged key carries in attention logits."""
        return self.sizes.to(torch.float32).log()

    @property
    def is_identity(self) -> bool:
        return self.layout.num_kept_tokens == self.layout.num_tokens


def match(descriptor: Tensor, layout: MergeLayout, impl: str = "auto") -> MergeMap:
    """Chooses the tokens to merge.

    Args:
        descriptor: (B, S, C) floating, tokens in tile-major order, e.g. the mean of the attention keys over heads.
        layout: tiles, cells and counts, on descriptor's device.

    Raises:
        ValueError: wrong shape, dtype, device or impl.
    """
    check_float("descriptor", descriptor, 3, "(B, S, C)")
    batch, _, channels = descriptor.shape
    check_shape("descriptor", descriptor, (batch, layout.num_tokens, channels), "(B, S of the layout, C)")
    require(layout.dst.device == descriptor.device, "layout", f"device {layout.dst.device}", f"{descriptor.device}")
    limit = (layout.max_tile <= 256, "layout", lambda: f"tiles of {layout.max_tile} tokens", "at most 256 for impl='triton'")
    impl = resolve("token_merge", impl, descriptor, IMPLS, limit)
    tensors = (layout.dst, layout.tile_starts, layout.tile_sizes, layout.num_merged, layout.kept_starts)
    return MergeMap(layout, *_match(descriptor.detach(), *tensors, layout.num_kept_tokens, layout.max_tile, impl))


def merge(x: Tensor, merge_map: MergeMap, impl: str = "auto") -> Tensor:
    """(B, S, C) -> (B, S_kept, C), the mean of each row's tokens, summed in float32. Differentiable in x."""
    _check_rows("x", x, merge_map.layout.num_tokens, merge_map)
    if merge_map.is_identity:
        return x
    impl = resolve("token_merge", impl, x, IMPLS)
    arrays = (merge_map.kept_index, merge_map.token_slot, merge_map.sizes)
    if impl == "reference":
        return reference.merge(x, *arrays)
    return _merge(x, *arrays, merge_map.layout.members, impl)


def unmerge(update: Tensor, merge_map: MergeMap, impl: str = "auto") -> Tensor:
    """(B, S_kept, C) -> (B, S, C), each original token receives its row of `update`. Differentiable in update."""
    _check_rows("update", update, merge_map.layout.num_kept_tokens, merge_map)
    if merge_map.is_identity:
        return update
    impl = resolve("token_merge", impl, update, IMPLS)
    if impl == "reference":
        return reference.unmerge(update, merge_map.token_slot)
    return _unmerge(update, merge_map.kept_index, merge_map.token_slot, merge_map.layout.members, impl)


def gather_kept(x: Tensor, merge_map: MergeMap) -> Tensor:
    """(B or 1, S, ...) -> (B, S_kept, ...): the kept tokens' own rows, not averaged, e.g. positions or RoPE tables."""
    index = merge_map.kept_index
    require(
        x.dim() >= 2 and x.shape[0] in (1, index.shape[0]),
        "x",
        f"shape {tuple(x.shape)}",
        lambda: f"({index.shape[0]} or 1, S, ...)",
    )
    tokens = merge_map.layout.num_tokens
    require(x.shape[1] == tokens, "x", f"shape {tuple(x.shape)}", lambda: f"(B or 1, {tokens}, ...), S of the layout")
    batch = torch.arange(index.shape[0], device=index.device)[:, None] if x.shape[0] > 1 else 0
    return x[batch, index]


def _check_rows(name: str, x: Tensor, rows: int, merge_map: MergeMap) -> None:
    check_float(name, x, 3, "(B, S, C)")
    batch = merge_map.kept_index.shape[0]
    check_shape(name, x, (batch, rows, x.shape[2]), "(B, S or S_kept, C) of the map")
    require(x.device == merge_map.kept_index.device, name, f"device {x.device}", f"{merge_map.kept_index.device}")


@custom_op("token_match")
def _match(
    descriptor: Tensor, dst: Tensor, tile_starts: Tensor, tile_sizes: Tensor, num_merged: Tensor, kept_starts: Tensor,
    num_kept: int, max_tile: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if impl == "triton":
        require_triton(descriptor)
        from . import triton as backend

        return backend.match(descriptor, dst, tile_starts, tile_sizes, num_merged, kept_starts, num_kept, max_tile)
    regular = cpu.match(descriptor, dst, tile_sizes, num_merged, num_kept) if impl == "cpu" and len(tile_sizes) else None
    return regular or reference.match(descriptor, dst, tile_starts, tile_sizes, num_merged, num_kept)


@_match.register_fake
def _(descriptor, dst, tile_starts, tile_sizes, num_merged, kept_starts, num_kept, max_tile, impl):
    batch, length, _ = descriptor.shape
    kept = descriptor.new_empty(batch, num_kept, dtype=torch.int64)
    return kept, descriptor.new_empty(batch, length, dtype=torch.int64), torch.empty_like(kept, dtype=torch.int32)


@custom_op("token_merge")
def _merge(x: Tensor, kept_index: Tensor, token_slot: Tensor, sizes: Tensor, members: Tensor, impl: str) -> Tensor:
    if impl == "cpu":
        return cpu.merge(x, kept_index, token_slot, sizes)
    require_triton(x)
    from . import triton as backend

    return backend.reduce_rows(x, kept_index, token_slot, members, mean=True)


@custom_op("token_sum")
def _sum(grad: Tensor, kept_index: Tensor, token_slot: Tensor, members: Tensor, impl: str) -> Tensor:
    """The gradient of unmerge: the sum over each row's tokens."""
    if impl == "cpu":
        return cpu.sum_rows(grad, kept_index, token_slot)
    require_triton(grad)
    from . import triton as backend

    return backend.reduce_rows(grad, kept_index, token_slot, members, mean=False)


@custom_op("token_unmerge")
def _unmerge(update: Tensor, kept_index: Tensor, token_slot: Tensor, members: Tensor, impl: str) -> Tensor:
    """The rows of `update` at token_slot; kept_index and members serve the backward, which sums those rows."""
    if impl == "cpu":
        return cpu.take_rows(update, token_slot)
    require_triton(update)
    from . import triton as backend

    return backend.take_rows(update, token_slot)


@_merge.register_fake
def _(x, kept_index, token_slot, sizes, members, impl):
    return x.new_empty(*kept_index.shape, x.shape[-1])


@_sum.register_fake
def _(grad, kept_index, token_slot, members, impl):
    return grad.new_empty(*kept_index.shape, grad.shape[-1])


@_unmerge.register_fake
def _(update, kept_index, token_slot, members, impl):
    return update.new_empty(*token_slot.shape, update.shape[-1])


def _merge_setup(ctx, inputs, output):
    _, kept_index, token_slot, sizes, members, ctx.impl = inputs
    ctx.save_for_backward(kept_index, token_slot, sizes, members)


def _merge_grad(ctx, grad):
    kept_index, token_slot, sizes, members = ctx.saved_tensors
    share = (grad / sizes[..., None]).to(grad.dtype)
    return _unmerge(share, kept_index, token_slot, members, ctx.impl), None, None, None, None, None


def _unmerge_setup(ctx, inputs, output):
    _, kept_index, token_slot, members, ctx.impl = inputs
    ctx.save_for_backward(kept_index, token_slot, members)


def _unmerge_grad(ctx, grad):
    return _sum(grad, *ctx.saved_tensors, ctx.impl), None, None, None, None


_merge.register_autograd(_merge_grad, setup_context=_merge_setup)
_unmerge.register_autograd(_unmerge_grad, setup_context=_unmerge_setup)
