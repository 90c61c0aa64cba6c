"""RMSNorm and RoPE on the CPU: a pair of channels is one complex number, and the rotation one complex product."""

import torch
from torch import Tensor

from .._impl import accumulator


def _turn(cos_TP: Tensor, sin_TP: Tensor, positions_BS: Tensor | None, acc: torch.dtype) -> Tensor:
    """(S, P) or (B, S, P) complex rotations."""
    table = torch.complex(cos_TP.to(acc), sin_TP.to(acc))
    return table if positions_BS is None else table[positions_BS]


def _complex(x: Tensor, pairs: int) -> Tensor:
    """(B, S, C) -> (B, S, H, P) complex."""
    return torch.view_as_complex(x.unflatten(-1, (-1, pairs, 2)))


def forward(x_BSC: Tensor, weight_C: Tensor, eps: float, cos_TP: Tensor, sin_TP: Tensor, positions_BS: Tensor | None):
    """(B, H, S, D) and rstd (B, S)."""
    acc, pairs = accumulator(x_BSC.dtype), cos_TP.shape[1]
    x = x_BSC.to(acc).contiguous()  # complex numbers lie side by side
    rstd_BS = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = (x * rstd_BS[..., None]).mul_(weight_C.to(acc))
    turned = _complex(normed, pairs).mul_(_turn(cos_TP, sin_TP, positions_BS, acc).unsqueeze(-2))
    out_BSHD = torch.view_as_real(turned).flatten(-2)
    out = torch.empty_like(out_BSHD.transpose(1, 2), dtype=x_BSC.dtype, memory_format=torch.contiguous_format)
    return out.copy_(out_BSHD.transpose(1, 2)), rstd_BS


def backward(grad_BHSD, x_BSC, weight_C, cos_TP, sin_TP, positions_BS, rstd_BS) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight: rotate back, then RMSNorm's own backward."""
    acc, pairs = accumulator(x_BSC.dtype), cos_TP.shape[1]
    grad = torch.empty(x_BSC.shape, dtype=acc)
    grad.unflatten(-1, (grad_BHSD.shape[1], -1)).copy_(grad_BHSD.transpose(1, 2))
    # Writes through: the complex tensor is a view of grad. The angle is negated, not the product conjugated: conj() is
    # a lazy flag, which torch 2.13 ignores inside an operator that runs below a compiled graph.
    _complex(grad, pairs).mul_(_turn(cos_TP, -sin_TP, positions_BS, acc).unsqueeze(-2))
    unit = x_BSC.to(acc) * rstd_BS[..., None]
    grad_weight = (grad * unit).sum((0, 1))  # einsum takes twelve times as long: it batches over the channels
    grad.mul_(weight_C.to(acc))
    along = torch.linalg.vecdot(grad, unit).div_(unit.shape[-1])
    grad_x = grad.sub_(unit.mul_(along[..., None])).mul_(rstd_BS[..., None])
    return grad_x.to(x_BSC.dtype), grad_weight.to(weight_C.dtype)
