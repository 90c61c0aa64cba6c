"""RMSNorm and RoPE in Triton: a token is read once, normalised, rotated and written straight into attention layout.

Channels are loaded contiguously and split into even and odd in registers. The backward walks a fixed set of programs
over the tokens, each with its own partial weight gradient, so there are no atomics and runs are bit-equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_its_device

PROGRAMS = 512


@triton.jit
def _angles(cos_ptr, sin_ptr, positions_ptr, row, s, stride_row, stride_col, PAIRS: tl.constexpr,
            HAS_POSITIONS: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    position = tl.load(positions_ptr + row).to(tl.int64) if HAS_POSITIONS else s
    offset = position * stride_row + (tl.arange(0, BLOCK_P) % PAIRS) * stride_col
    return tl.load(cos_ptr + offset).to(tl.float32), tl.load(sin_ptr + offset).to(tl.float32)


@triton.jit(do_not_specialize=["eps", "length"])
def _forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr, rstd_ptr, eps, length, channels, stride_b, stride_s,
    stride_row, stride_col, PAIRS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // length, row % length
    c = tl.arange(0, 2 * BLOCK_P)
    x = tl.load(x_ptr + b * stride_b + s * stride_s + c, mask=c < channels, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / channels + eps)
    even, odd = tl.split(tl.reshape(x * rstd * weight, [BLOCK_P, 2]))
    cos, sin = _angles(cos_ptr, sin_ptr, positions_ptr, row, s, stride_row, stride_col, PAIRS, HAS_POSITIONS, BLOCK_P)
    turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [2 * BLOCK_P])
    head, d = c // (2 * PAIRS), c % (2 * PAIRS)
    target = b * length * channels + (head.to(tl.int64) * length + s) * (2 * PAIRS) + d
    tl.store(out_ptr + target, turned, mask=c < channels)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "length", "programs"])
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, positions_ptr, rstd_ptr, grad_x_ptr, partial_ptr, rows, length,
    channels, stride_b, stride_s, stride_row, stride_col, programs,
    PAIRS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = tl.arange(0, 2 * BLOCK_P)
    head, d = c // (2 * PAIRS), c % (2 * PAIRS)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([2 * BLOCK_P], tl.float32)
    for turn in range(0, tl.cdiv(rows - pid, programs)):
        row = pid.to(tl.int64) + turn * programs
        b, s = row // length, row % length
        source = b * length * channels + (head.to(tl.int64) * length + s) * (2 * PAIRS) + d
        grad = tl.load(grad_ptr + source, mask=c < channels, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(grad, [BLOCK_P, 2]))
        cos, sin = _angles(
            cos_ptr, sin_ptr, positions_ptr, row, s, stride_row, stride_col, PAIRS, HAS_POSITIONS, BLOCK_P
        )
        grad = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [2 * BLOCK_P])
        x = tl.load(x_ptr + b * stride_b + s * stride_s + c, mask=c < channels, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        unit = x * rstd
        grad_weight += grad * unit
        grad *= weight
        along = tl.sum(grad * unit, 0) / channels
        tl.store(grad_x_ptr + row * channels + c, (grad - unit * along) * rstd, mask=c < channels)
    tl.store(partial_ptr + pid.to(tl.int64) * channels + c, grad_weight, mask=c < channels)


def _shape(x: Tensor, cos: Tensor) -> dict:
    block = triton.next_power_of_2(x.shape[2] // 2)
    return {"PAIRS": cos.shape[1], "BLOCK_P": block, "num_warps": 4 if block <= 1024 else 8 if block <= 4096 else 16}


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


@on_its_device
def forward(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None):
    x, (batch, length, channels) = _rows_contiguous(x), x.shape
    cos, sin = _same_strides(cos, sin)
    dim = 2 * cos.shape[1]
    out = torch.empty(batch, channels // dim, length, dim, dtype=x.dtype, device=x.device)
    rstd = torch.empty(batch, length, dtype=torch.float32, device=x.device)
    given = positions is not None
    if out.numel():
        _forward_kernel[(batch * length,)](x, weight.contiguous(), cos, sin, positions.contiguous() if given else rstd,
                                           out, rstd, eps, length, channels, *x.stride()[:2], *cos.stride(),
                                           HAS_POSITIONS=given, **_shape(x, cos))  # fmt: skip
    return out, rstd


@on_its_device
def backward(grad, x, weight, cos, sin, positions, rstd) -> tuple[Tensor, Tensor]:
    x, (batch, length, channels) = _rows_contiguous(x), x.shape
    cos, sin = _same_strides(cos, sin)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = batch * length
    programs = min(rows, PROGRAMS)
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    given = positions is not None
    if rows:
        _backward_kernel[(programs,)](grad.contiguous(), x, weight.contiguous(), cos, sin,
                                      positions.contiguous() if given else rstd, rstd, grad_x, partial, rows, length,
                                      channels, *x.stride()[:2], *cos.stride(), programs, HAS_POSITIONS=given,
                                      **_shape(x, cos))  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def _same_strides(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())
