"""Row permutation in Triton: rows are read in index order, from any (B, H, S) strides, and written contiguously."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_its_device

BLOCK_R = 32


@triton.jit(do_not_specialize=["index_b", "index_h", "heads", "length"])
def _permute_kernel(
    x_ptr, index_ptr, out_ptr, stride_b, stride_h, stride_s, index_b, index_h, index_s, heads, length, dim,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(length, BLOCK_R)
    pid = tl.program_id(0).to(tl.int64)
    head_of_batch = pid // row_blocks
    b, h = head_of_batch // heads, head_of_batch % heads
    r = (pid % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    source = tl.load(index_ptr + b * index_b + h * index_h + r * index_s, mask=r < length, other=0).to(tl.int64)
    mask = (r < length)[:, None] & (d < dim)[None, :]
    rows = tl.load(x_ptr + b * stride_b + h * stride_h + source[:, None] * stride_s + d[None, :], mask=mask)
    tl.store(out_ptr + (head_of_batch * length + r)[:, None] * dim + d[None, :], rows, mask=mask)


@on_its_device
def permute(x: Tensor, index: Tensor) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (batch * heads * triton.cdiv(length, BLOCK_R),)
        _permute_kernel[grid](x, index, out, *x.stride()[:3], *index.stride(), heads, length, dim, BLOCK_R=BLOCK_R,
                              BLOCK_D=triton.next_power_of_2(dim))  # fmt: skip
    return out
