"""Block means on the CPU: a view and one reduction for equal blocks, one gather per distinct size otherwise."""

import torch
from torch import Tensor

from .._checks import check_blocks
from .._impl import accumulator
from ..selection import regular_tile


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
    """ValueError for blocks outside 0..S."""
    batch, heads, length, dim = x_BHSD.shape
    if tile := regular_tile(starts_M, sizes_M, length):
        whole, rest = divmod(length, tile)
        means = _mean(x_BHSD.narrow(2, 0, whole * tile).unflatten(2, (whole, tile)))
        return torch.cat([means, _mean(x_BHSD[:, :, -rest:]).unsqueeze(2)], 2) if rest else means
    check_blocks("sizes", starts_M, sizes_M, length)
    out = x_BHSD.new_zeros(batch, heads, sizes_M.shape[0], dim)
    for _, index, tokens in _groups(starts_M, sizes_M):
        out[:, :, index] = _mean(x_BHSD[:, :, tokens])
    return out


def backward(grad_BHMD: Tensor, starts_M: Tensor, sizes_M: Tensor, length: int) -> Tensor:
    """Each token of a block receives the block's gradient divided by its size; tokens of no block receive 0."""
    batch, heads, _, dim = grad_BHMD.shape
    acc = accumulator(grad_BHMD.dtype)  # a size is no bf16 number above 256, and above 65,504 infinite in fp16
    share = (grad_BHMD.to(acc) / sizes_M.clamp(min=1).unsqueeze(-1)).to(grad_BHMD.dtype)
    grad_x = grad_BHMD.new_zeros(batch, heads, length, dim)
    if tile := regular_tile(starts_M, sizes_M, length):
        whole, rest = divmod(length, tile)
        grad_x.narrow(2, 0, whole * tile).unflatten(2, (whole, tile)).copy_(share[:, :, :whole].unsqueeze(3))
        grad_x.narrow(2, whole * tile, rest).copy_(share[:, :, -1:])
        return grad_x
    for size, index, tokens in _groups(starts_M, sizes_M):
        grad_x[:, :, tokens] = share[:, :, index].unsqueeze(3).expand(-1, -1, -1, size, -1)
    return grad_x
