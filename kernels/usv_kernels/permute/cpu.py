"""Row permutation on the CPU: whole rows are copied, straight from (B, S, H, D) memory where x is a transposed view."""

import torch
from torch import Tensor


def permute(x_BHSD: Tensor, index_BHS: Tensor) -> Tensor:
    batch, heads, length, dim = x_BHSD.shape
    lead = torch.arange(batch * heads).view(batch, heads, 1)
    if x_BHSD.transpose(1, 2).is_contiguous():
        rows, number = x_BHSD.transpose(1, 2), (lead // heads * length + index_BHS) * heads + lead % heads
    else:
        rows, number = x_BHSD, lead * length + index_BHS
    return rows.reshape(batch * heads * length, dim).index_select(0, number.flatten()).view(x_BHSD.shape)
