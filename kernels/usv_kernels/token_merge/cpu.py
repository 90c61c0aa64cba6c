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
    batch, length, _ = x_BSC.shape
    rows = x_BSC.reshape(batch * length, -1).index_select(0, _flat(index, length))
    return rows.view(*index.shape, -1)


def _merged(kept_index: Tensor, length: int) -> Tensor:
    """(B, S - S_kept) ascending positions of the tokens that are not kept."""
    batch = kept_index.shape[0]
    gone = torch.ones(batch, length, dtype=torch.bool).scatter_(1, kept_index, False)
    return gone.nonzero()[:, 1].view(batch, -1)


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
