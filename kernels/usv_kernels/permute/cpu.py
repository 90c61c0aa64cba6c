"""Row permutation on the CPU: whole rows are copied, straight from (B, S, H, D) memory where x is a transposed view."""

import numpy as np
import torch
from torch import Tensor

from .._checks import check_range


def permute(x_BHSD: Tensor, index_BHS: Tensor) -> Tensor:
    """ValueError for values of index outside 0..S-1."""
    batch, heads, length, dim = x_BHSD.shape
    if batch * heads <= length // 1024 and x_BHSD.is_contiguous():
        return _by_head(x_BHSD, index_BHS)
    check_range("index", index_BHS, length, "S", debug=False)
    lead = np.arange(batch * heads).reshape(batch, heads, 1)  # NumPy: a tenth of the time torch's threads take for so few integers
    if x_BHSD.transpose(1, 2).is_contiguous():
        rows, number = x_BHSD.transpose(1, 2), (lead // heads * length + index_BHS.numpy()) * heads + lead % heads
    else:
        rows, number = x_BHSD, lead * length + index_BHS.numpy()
    return rows.reshape(batch * heads * length, dim).index_select(0, torch.from_numpy(number.reshape(-1))).view(x_BHSD.shape)


def _by_head(x_BHSD: Tensor, index_BHS: Tensor) -> Tensor:
    """For heads so long that a call for each costs little: the gather finds values outside itself, so index is read once and never rewritten."""
    out = torch.empty_like(x_BHSD)
    try:
        for source, order, target in zip(x_BHSD.flatten(0, 1).unbind(), index_BHS.flatten(0, 1).unbind(), out.flatten(0, 1).unbind()):
            torch.index_select(source, 0, order, out=target)
    except IndexError:
        check_range("index", index_BHS, x_BHSD.shape[2], "S", debug=False)
        raise
    return out
