"""Token merging on the CPU: rows are copied whole, and only the merged ones are added."""

import torch
from torch import Tensor

from .._impl import accumulator


def _flat(index: Tensor, rows: int) -> Tensor:
    """(B * K,) row numbers of the flattened (B * rows, C) tensor."""
    offset = torch.arange(index.shape[0], device=index.device)[:, None] * rows
    return (index + offset).flatten()


def take_rows(x_BSC: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b]] for index (B, K). Copying whole rows is far faster than gather with an expanded index."""
    batch, length, channels = x_BSC.shape
    rows = x_BSC.reshape(batch * length, channels).index_select(0, _flat(index, length))
    return rows.view(*index.shape, channels)


def match(
    descriptor_BSC: Tensor, dst: Tensor, tile_sizes: Tensor, num_merged: Tensor, num_kept: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`reference.match` for equal tiles with equal counts, else None: rows of one tile are sorted instead of sequences."""
    tile, count = int(tile_sizes[0]), int(num_merged[0])
    if not (bool((tile_sizes == tile).all()) and bool((num_merged == count).all())):
        return None
    batch, length, _ = descriptor_BSC.shape
    x = descriptor_BSC.to(accumulator(descriptor_BSC.dtype))
    norm_BS = torch.linalg.vector_norm(x, dim=-1).clamp_min_(1e-12)
    dot_BS = torch.linalg.vecdot(x, x.index_select(1, dst))
    similarity_BS = dot_BS.div_(norm_BS).div_(norm_BS.index_select(1, dst))
    position = torch.arange(length)
    similarity_BS.masked_fill_(dst == position, float("-inf"))
    order = torch.sort(similarity_BS.view(-1, tile), dim=1, descending=True, stable=True).indices[:, :count]
    kept_BS = torch.ones(similarity_BS.numel() // tile, tile, dtype=torch.bool).scatter_(1, order, False).view(batch, length)
    kept_index = kept_BS.flatten().nonzero().view(batch, num_kept) % length
    target = torch.where(kept_BS, position, dst)
    token_slot = (kept_BS.cumsum(1) - 1).gather(1, target)
    sizes = torch.zeros(batch, num_kept, dtype=torch.int32)
    return kept_index, token_slot, sizes.scatter_add_(1, token_slot, torch.ones_like(token_slot, dtype=torch.int32))


def _merged(kept_index: Tensor, length: int) -> Tensor:
    """(B, S - S_kept) ascending positions of the tokens that are not kept."""
    batch, kept = kept_index.shape
    gone = torch.ones(batch, length, dtype=torch.bool).scatter_(1, kept_index, False)
    return gone.nonzero()[:, 1].view(batch, length - kept)


def merge(x_BSC: Tensor, kept_index: Tensor, token_slot: Tensor, sizes: Tensor) -> Tensor:
    acc = accumulator(x_BSC.dtype)
    kept = take_rows(x_BSC, kept_index)
    merged = _merged(kept_index, x_BSC.shape[1])
    slot = token_slot.gather(1, merged)
    difference = take_rows(x_BSC, merged).to(acc) - take_rows(kept, slot).to(acc)
    flat = _flat(slot, kept.shape[1])
    shared = difference.new_zeros(kept.shape[0] * kept.shape[1], kept.shape[2])
    shared.index_add_(0, flat, difference.flatten(0, 1))
    return (shared.view(kept.shape).div_(sizes[..., None]).add_(kept)).to(x_BSC.dtype)


def sum_rows(grad_BSC: Tensor, kept_index: Tensor, token_slot: Tensor) -> Tensor:
    """(B, S_kept, C): the sum over each kept token and those merged into it; the gradient of `unmerge`."""
    acc = accumulator(grad_BSC.dtype)
    merged = _merged(kept_index, grad_BSC.shape[1])
    total = take_rows(grad_BSC, kept_index).to(acc)
    flat = _flat(token_slot.gather(1, merged), total.shape[1])
    total.flatten(0, 1).index_add_(0, flat, take_rows(grad_BSC, merged).to(acc).flatten(0, 1))
    return total.to(grad_BSC.dtype)
