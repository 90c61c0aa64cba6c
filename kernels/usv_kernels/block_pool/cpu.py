"""Block means on the CPU: a view and one reduction for equal blocks, one gather per distinct size otherwise."""

import torch
from torch import Tensor

from .._checks import check_blocks
from .._impl import accumulator


def _tile(starts_M: Tensor, sizes_M: Tensor, length: int) -> int:
    """The common size of consecutive blocks, of which the last may be smaller, else 0; none may be empty. ValueError for blocks
    outside 0..length."""
    starts, sizes = starts_M.tolist(), sizes_M.tolist()
    size = sizes[0] if sizes else 0
    regular = 0 < sizes[-1] <= size and sizes.count(size) + (sizes[-1] < size) == len(sizes) if size > 0 else False
    regular = regular and starts == list(range(starts[0], starts[0] + size * len(starts), size))
    if not regular or starts[0] < 0 or starts[-1] + sizes[-1] > length:
        check_blocks("sizes", starts_M, sizes_M, length)
    return size if regular else 0


def _groups(starts_M: Tensor, sizes_M: Tensor):
    """For each distinct positive size its blocks (m,) and their tokens (m, size). Tiles have at most 8 sizes."""
    for size in sizes_M.unique().tolist():
        if size > 0:
            blocks = (sizes_M == size).nonzero().squeeze(1)
            yield size, blocks, starts_M[blocks].long()[:, None] + torch.arange(size)


def _mean(x: Tensor) -> Tensor:
    """Mean over the last dimension but one."""
    size = x.shape[-2]
    if x.dtype == torch.bfloat16 and size & (size - 1) == 0:
        # The same in half the time: summed in fp32 without a converted copy, rounded once, and division by a power of two is exact.
        return x.sum(-2).div_(size)
    return x.mean(-2, dtype=accumulator(x.dtype)).to(x.dtype)


def forward(x_BHSD: Tensor, starts_M: Tensor, sizes_M: Tensor) -> Tensor:
    batch, heads, length, dim = x_BHSD.shape
    blocks = sizes_M.shape[0]
    if size := _tile(starts_M, sizes_M, length):
        whole, first = blocks - int(sizes_M[-1] < size), int(starts_M[0])
        means = _mean(x_BHSD[:, :, first : first + whole * size].unflatten(2, (whole, size)))
        if whole == blocks:
            return means
        last = int(starts_M[-1])
        return torch.cat([means, _mean(x_BHSD[:, :, last : last + int(sizes_M[-1])]).unsqueeze(2)], 2)
    out = x_BHSD.new_zeros(batch, heads, blocks, dim)
    for _, index, tokens in _groups(starts_M, sizes_M):
        out[:, :, index] = _mean(x_BHSD[:, :, tokens])
    return out


def backward(grad_BHMD: Tensor, starts_M: Tensor, sizes_M: Tensor, length: int) -> Tensor:
    """Each token of a block receives the block's gradient divided by its size; tokens of no block receive 0."""
    batch, heads, blocks, dim = grad_BHMD.shape
    share = grad_BHMD / sizes_M.clamp(min=1).unsqueeze(-1)
    grad_x = grad_BHMD.new_zeros(batch, heads, length, dim)
    if size := _tile(starts_M, sizes_M, length):
        whole, first, last = blocks - int(sizes_M[-1] < size), int(starts_M[0]), int(starts_M[-1])
        grad_x[:, :, first : first + whole * size].unflatten(2, (whole, size)).copy_(share[:, :, :whole].unsqueeze(3))
        grad_x[:, :, last : last + int(sizes_M[-1])].copy_(share[:, :, -1:])
        return grad_x
    for size, index, tokens in _groups(starts_M, sizes_M):
        grad_x[:, :, tokens] = share[:, :, index].unsqueeze(3).expand(-1, -1, -1, size, -1)
    return grad_x
