"""The two halves of a k-means iteration in Triton: tensor-core distances, sums over sorted tokens, no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_its_device
from .._gpus import Gpu, gpu_of

STAGES = 2


@triton.jit(do_not_specialize=["heads", "length", "clusters"])
def _assign_kernel(
    x_ptr, centroids_ptr, bias_ptr, out_ptr, stride_b, stride_h, stride_s, heads, length, clusters, dim,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token_blocks = tl.cdiv(length, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)
    head_of_batch = pid // token_blocks
    s = (pid % token_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    x_ptr += (head_of_batch // heads) * stride_b + (head_of_batch % heads) * stride_h
    x = tl.load(x_ptr + s[:, None] * stride_s + d[None, :], mask=(s < length)[:, None] & (d < dim)[None, :], other=0.0)
    best = tl.full([BLOCK_T], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK_T], tl.int32)
    centroids_ptr += head_of_batch * clusters * dim
    bias_ptr += head_of_batch * clusters
    for first in range(0, clusters, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (d < dim)[:, None] & (k < clusters)[None, :]
        c = tl.load(centroids_ptr + k[None, :] * dim + d[:, None], mask=mask, other=0.0)
        if x.dtype == tl.float32:
            score = tl.dot(x, c, input_precision=PRECISION)
        else:
            # A float32 centroid is two 16-bit numbers, so two fast products are as good as one in float32.
            high = c.to(x.dtype)
            low = (c - high.to(tl.float32)).to(x.dtype)
            score = tl.dot(x, high) + tl.dot(x, low)
        bias = tl.load(bias_ptr + k, mask=k < clusters, other=float("-inf"))
        score += bias[None, :]
        here = tl.max(score, 1)
        index = first + tl.argmax(score, 1, tie_break_left=True)
        # Strictly greater: of equal scores the earlier block, which holds the lower indices, stays.
        nearest = tl.where(here > best, index, nearest)
        best = tl.maximum(here, best)
    tl.store(out_ptr + head_of_batch * length + s, nearest.to(tl.int64), mask=s < length)


@triton.jit(do_not_specialize=["heads", "length", "clusters"])
def _update_kernel(
    x_ptr, order_ptr, ends_ptr, counts_ptr, centroids_ptr, out_ptr, stride_b, stride_h, stride_s,
    heads, length, clusters, dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    head_of_batch = pid // clusters
    count = tl.load(counts_ptr + pid)
    start = tl.load(ends_ptr + pid) - count
    d = tl.arange(0, BLOCK_D)
    x_ptr += (head_of_batch // heads) * stride_b + (head_of_batch % heads) * stride_h
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK_T):
        i = first + tl.arange(0, BLOCK_T)
        s = tl.load(order_ptr + head_of_batch * length + start + i, mask=i < count, other=0)
        mask = (i < count)[:, None] & (d < dim)[None, :]
        rows = tl.load(x_ptr + s[:, None] * stride_s + d[None, :], mask=mask, other=0.0)
        total += tl.sum(rows.to(tl.float32), 0)
    old = tl.load(centroids_ptr + pid * dim + d, mask=d < dim, other=0.0)
    mean = tl.where(count > 0, total / tl.maximum(count, 1).to(tl.float32), old)
    tl.store(out_ptr + pid * dim + d, mean, mask=d < dim)


@on_its_device
def assign(x: Tensor, centroids: Tensor) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    clusters = centroids.shape[2]
    # argmin |x - c|^2 = argmax x.(c - o) - (c - o).(c + o) / 2 for any o: with the mean centroid as o the terms that
    # are common to all clusters, and would swamp the differences between them, are gone before anything is rounded.
    offset = centroids.mean(2, keepdim=True)
    centred = centroids - offset
    bias = -0.5 * (centred * (centroids + offset)).sum(-1)
    out = torch.empty(batch, heads, length, dtype=torch.int64, device=x.device)
    if out.numel():
        constants, warps = assign_tile(dim, x.dtype, gpu_of(x))
        grid = (batch * heads * triton.cdiv(length, constants["BLOCK_T"]),)
        _assign_kernel[grid](x, centred, bias, out, *x.stride()[:3], heads, length, clusters, dim, **constants,
                             num_stages=STAGES, num_warps=warps)  # fmt: skip
    return out


def assign_tile(dim: int, dtype: torch.dtype, gpu: Gpu) -> tuple[dict, int]:
    """Constants and warps for which nothing spills (`compile_companions`); shared memory below 99 KiB where GPUs may have no more.

    PRECISION says how float32 is multiplied: three TF32 products on NVIDIA's tensor cores, float32 itself on AMD's, which have it and no
    tf32x3. Only sm_90 to sm_110 multiply from shared memory: elsewhere a whole tile of centroids is in registers, and has to be
    smaller.
    """
    block_d, full = max(triton.next_power_of_2(dim), 16), dtype == torch.float32
    block_k = {"wgmma": 64, "tcgen05": 64, "wmma": 16}.get(gpu.unit, 32)
    block_k = max(block_k // 2, 16) if full and block_d > 64 else block_k
    amd = not gpu.name.startswith("sm_")
    constants = {"PRECISION": "ieee" if amd else "tf32x3", "BLOCK_T": 64, "BLOCK_K": block_k, "BLOCK_D": block_d}
    return constants, 8 if full else 4


@on_its_device
def update(x: Tensor, assignment: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    clusters = centroids.shape[2]
    counts = torch.zeros(batch, heads, clusters, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, assignment, torch.ones_like(assignment))
    order = torch.argsort(assignment, dim=2, stable=True)
    out = torch.empty(centroids.shape, dtype=centroids.dtype, device=x.device)
    if out.numel():
        _update_kernel[(batch * heads * clusters,)](x, order, counts.cumsum(2), counts, centroids.contiguous(), out,
                                                    *x.stride()[:3], heads, length, clusters, dim, BLOCK_T=32,
                                                    BLOCK_D=triton.next_power_of_2(dim))  # fmt: skip
    return out, counts
