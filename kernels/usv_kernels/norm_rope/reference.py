"""RMSNorm across heads and interleaved RoPE in plain torch. Autograd's own gradients; the oracle of `norm_rope`."""

import torch
from torch import Tensor

from .._impl import accumulator


def norm_rope(
    x_BSC: Tensor, weight_C: Tensor, eps: float, cos_TP: Tensor, sin_TP: Tensor, positions_BS: Tensor
) -> Tensor:
    """T rows of a table of P = D / 2 angles; positions_BS names the row of every token."""
    acc = accumulator(x_BSC.dtype)
    x = x_BSC.to(acc)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = (x * rstd * weight_C.to(acc)).unflatten(-1, (-1, cos_TP.shape[1], 2))
    cos = cos_TP.to(acc)[positions_BS].unsqueeze(2)
    sin = sin_TP.to(acc)[positions_BS].unsqueeze(2)
    even, odd = normed.unbind(-1)
    out_BSHD = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return out_BSHD.transpose(1, 2).to(x_BSC.dtype)
