"""Block means in Triton: one program a block, forward and backward; no atomics, so runs are bit-equal."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_its_device


@triton.jit(do_not_specialize=["heads", "blocks"])
def _forward_kernel(
    x_ptr, starts_ptr, sizes_ptr, out_ptr, stride_b, stride_h, stride_s, heads, blocks, dim,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    block, head_of_batch = pid % blocks, pid // blocks
    base = (head_of_batch // heads) * stride_b + (head_of_batch % heads) * stride_h
    start, size = tl.load(starts_ptr + block).to(tl.int64), tl.load(sizes_ptr + block)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, size, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < size)[:, None] & (d < dim)[None, :]
        rows = tl.load(x_ptr + base + (start + t)[:, None] * stride_s + d[None, :], mask=mask, other=0.0)
        total += tl.sum(rows.to(tl.float32), 0)
    mean = total / tl.maximum(size, 1).to(tl.float32)
    tl.store(out_ptr + pid * dim + d, mean, mask=d < dim)


@triton.jit(do_not_specialize=["length", "blocks"])
def _backward_kernel(
    grad_ptr, starts_ptr, sizes_ptr, out_ptr, length, blocks, dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    block, head_of_batch = pid % blocks, pid // blocks
    start, size = tl.load(starts_ptr + block).to(tl.int64), tl.load(sizes_ptr + block)
    d = tl.arange(0, BLOCK_D)
    share = tl.load(grad_ptr + pid * dim + d, mask=d < dim, other=0.0).to(tl.float32) / tl.maximum(size, 1).to(
        tl.float32
    )
    rows = out_ptr + head_of_batch * length * dim + start * dim
    for first in range(0, size, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < size)[:, None] & (d < dim)[None, :]
        values = tl.broadcast_to(share[None, :], [BLOCK_T, BLOCK_D])
        tl.store(rows + t.to(tl.int64)[:, None] * dim + d[None, :], values, mask=mask)


@on_its_device
def forward(x: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, _, dim = x.shape
    blocks = starts.shape[0]
    out = torch.empty(batch, heads, blocks, dim, dtype=x.dtype, device=x.device)
    grid = (batch * heads * blocks,)
    if out.numel():
        _forward_kernel[grid](x, starts.contiguous(), sizes.contiguous(), out, *x.stride()[:3], heads, blocks, dim,
                              BLOCK_T=32, BLOCK_D=triton.next_power_of_2(dim))  # fmt: skip
    return out


@on_its_device
def backward(grad: Tensor, starts: Tensor, sizes: Tensor, length: int) -> Tensor:
    batch, heads, blocks, dim = grad.shape
    # Zeros, because tokens of no block are written by no program.
    out = torch.zeros(batch, heads, length, dim, dtype=grad.dtype, device=grad.device)
    if grad.numel():
        _backward_kernel[(batch * heads * blocks,)](grad.contiguous(), starts.contiguous(), sizes.contiguous(), out,
                                                    length, blocks, dim, BLOCK_T=32,
                                                    BLOCK_D=triton.next_power_of_2(dim))  # fmt: skip
    return out
