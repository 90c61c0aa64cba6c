"""Block means on the CPU: a view and one reduction for equal blocks, one gather per distinct size otherwise."""

import torch
from torch import Tensor

from .._checks import check_blocks
from .._impl import accumulator


def _tiles(starts_M: Tensor, sizes_M: Tensor, length: int) -> tuple[int, int, int, int] | None:
    """First token, common size and number of consecutive blocks, and the size of one smaller block after them (0: there is none);
    None for any other layout. ValueError for blocks outside 0..length."""
    starts, sizes = starts_M.tolist(), sizes_M.tolist()
    blocks, size, rest = len(sizes), sizes[0] if sizes else 0, sizes[-1] if sizes else 0
    whole = blocks - (rest < size)
    regular = 0 < rest <= size and sizes.count(size) == whole and starts == list(range(starts[0], starts[0] + size * blocks, size))
    if not regular or starts[0] < 0 or starts[-1] + rest > length:
        check_blocks("sizes", starts_M, sizes_M, length)
    return (starts[0], size, whole, rest if whole < blocks else 0) if regular else None


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
    if tiles := _tiles(starts_M, sizes_M, length):
        first, size, whole, rest = tiles
        means = _mean(x_BHSD.narrow(2, first, whole * size).unflatten(2, (whole, size)))
        if not rest:
            return means
        return torch.cat([means, _mean(x_BHSD.narrow(2, first + whole * size, rest)).unsqueeze(2)], 2)
    out = x_BHSD.new_zeros(batch, heads, sizes_M.shape[0], dim)
    for _, index, tokens in _groups(starts_M, sizes_M):
        out[:, :, index] = _mean(x_BHSD[:, :, tokens])
    return out


def backward(grad_BHMD: Tensor, starts_M: Tensor, sizes_M: Tensor, length: int) -> Tensor:
    """Each token of a block receives the block's gradient divided by its size; tokens of no block receive 0."""
    batch, heads, _, dim = grad_BHMD.shape
    share = grad_BHMD / sizes_M.clamp(min=1).unsqueeze(-1)
    grad_x = grad_BHMD.new_zeros(batch, heads, length, dim)
    if tiles := _tiles(starts_M, sizes_M, length):
        first, size, whole, rest = tiles
        grad_x.narrow(2, first, whole * size).unflatten(2, (whole, size)).copy_(share[:, :, :whole].unsqueeze(3))
        grad_x.narrow(2, first + whole * size, rest).copy_(share[:, :, -1:])
        return grad_x
    for size, index, tokens in _groups(starts_M, sizes_M):
        grad_x[:, :, tokens] = share[:, :, index].unsqueeze(3).expand(-1, -1, -1, size, -1)
    return grad_x
