"""Block means on the CPU: a view and one reduction for equal blocks, one gather per distinct size otherwise."""

import torch
from torch import Tensor

from .._impl import accumulator


def _uniform(starts_M: Tensor, sizes_M: Tensor) -> int:
    """The common size of consecutive equal non-empty blocks, else 0."""
    starts, sizes = starts_M.tolist(), sizes_M.tolist()
    size = sizes[0] if sizes else 0
    if not size or sizes.count(size) != len(sizes):
        return 0
    return size if starts == list(range(starts[0], starts[0] + size * len(starts), size)) else 0


def _groups(starts_M: Tensor, sizes_M: Tensor):
    """For each distinct positive size its blocks (m,) and their tokens (m, size). Tiles have at most 8 sizes."""
    for size in sizes_M.unique().tolist():
        if size > 0:
            blocks = (sizes_M == size).nonzero().squeeze(1)
            yield size, blocks, starts_M[blocks].long()[:, None] + torch.arange(size)


def forward(x_BHSD: Tensor, starts_M: Tensor, sizes_M: Tensor) -> Tensor:
    batch, heads, _, dim = x_BHSD.shape
    acc, blocks = accumulator(x_BHSD.dtype), sizes_M.shape[0]
    size = _uniform(starts_M, sizes_M)
    if size:
        first = int(starts_M[0])
        tiles = x_BHSD[:, :, first : first + blocks * size].unflatten(2, (blocks, size))
        if x_BHSD.dtype == torch.bfloat16 and size & (size - 1) == 0:
            # The same in half the time: summed in fp32 without a converted copy, rounded once, and division by a power of two is exact.
            return tiles.sum(3).div_(size)
        return tiles.mean(3, dtype=acc).to(x_BHSD.dtype)
    out = x_BHSD.new_zeros(batch, heads, blocks, dim)
    for _, index, tokens in _groups(starts_M, sizes_M):
        out[:, :, index] = x_BHSD[:, :, tokens].mean(3, dtype=acc).to(x_BHSD.dtype)
    return out


def backward(grad_BHMD: Tensor, starts_M: Tensor, sizes_M: Tensor, length: int) -> Tensor:
    """Each token of a block receives the block's gradient divided by its size; tokens of no block receive 0."""
    batch, heads, blocks, dim = grad_BHMD.shape
    grad_x = grad_BHMD.new_zeros(batch, heads, length, dim)
    size = _uniform(starts_M, sizes_M)
    if size:
        first = int(starts_M[0])
        grad_x[:, :, first : first + blocks * size].unflatten(2, (blocks, size)).copy_((grad_BHMD / size).unsqueeze(3))
        return grad_x
    for size, index, tokens in _groups(starts_M, sizes_M):
        share = (grad_BHMD[:, :, index] / size).unsqueeze(3).expand(-1, -1, -1, size, -1)
        grad_x[:, :, tokens] = share
    return grad_x
