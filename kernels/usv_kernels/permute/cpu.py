"""Row permutation on the CPU: whole rows are copied, straight from (B, S, H, D) memory where x is a transposed view."""

import torch
from torch import Tensor


def permute(x_BHSD: Tensor, index_BHS: Tensor) -> Tensor:
    batch, heads, length, dim = x_BHSD.shape
    b, h = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None]
    if x_BHSD.transpose(1, 2).is_contiguous():
        rows, number = x_BHSD.transpose(1, 2).reshape(-1, dim), (b * length + index_BHS) * heads + h
    else:
        rows, number = x_BHSD.reshape(-1, dim), (b * heads + h) * length + index_BHS
    return rows.index_select(0, number.flatten()).view(x_BHSD.shape)
