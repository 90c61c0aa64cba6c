"""Token merging in Triton: one program matches a tile, one forms a merged row from its cell; no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_its_device

BLOCK_R = 4


@triton.jit
def _similarity(desc_ptr, pos, dst, valid, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Cosine of every token with its dst; a NaN counts as most similar, so that it still takes exactly one place."""
    dot = tl.zeros([BLOCK_T], tl.float32)
    norm_own, norm_dst = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (c < channels)[None, :]
        own = tl.load(desc_ptr + pos[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(desc_ptr + dst[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(own * other, 1)
        norm_own += tl.sum(own * own, 1)
        norm_dst += tl.sum(other * other, 1)
    lengths = tl.maximum(tl.sqrt(norm_own), 1e-12) * tl.maximum(tl.sqrt(norm_dst), 1e-12)
    cosine = dot / lengths
    return tl.where(cosine != cosine, float("inf"), cosine)


@triton.jit(do_not_specialize=["tiles", "length", "num_kept"])
def _match_kernel(
    desc_ptr, dst_ptr, starts_ptr, sizes_ptr, num_merged_ptr, kept_starts_ptr, kept_index_ptr, slot_ptr, out_sizes_ptr,
    tiles, length, num_kept, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tile, b = pid % tiles, pid // tiles
    start, size = tl.load(starts_ptr + tile).to(tl.int64), tl.load(sizes_ptr + tile)
    t = tl.arange(0, BLOCK_T)
    valid, pos = t < size, start + t
    dst = tl.load(dst_ptr + pos, mask=valid, other=0)
    candidate = valid & (dst != pos)
    cosine = _similarity(desc_ptr + b * length * channels, pos, dst, valid, channels, BLOCK_T, BLOCK_C)
    cosine = tl.where(candidate, cosine, float("-inf"))

    # rank of j: candidates i that come before it. Counting is exact, needs no sort and obeys the tie rule.
    ahead = cosine[:, None] > cosine[None, :]
    ahead = ahead | ((cosine[:, None] == cosine[None, :]) & (t[:, None] < t[None, :]))
    rank = tl.sum((ahead & candidate[:, None]).to(tl.int32), 0)
    merged = candidate & (rank < tl.load(num_merged_ptr + tile))
    kept = valid & (merged == 0)

    own_slot = tl.load(kept_starts_ptr + tile) + tl.cumsum(kept.to(tl.int32), 0) - 1
    target = tl.where(merged, (dst - start).to(tl.int32), t)
    slot = tl.sum(tl.where(t[:, None] == target[None, :], own_slot[:, None], 0), 0)
    count = tl.sum(((target[None, :] == t[:, None]) & valid[None, :]).to(tl.int32), 1)
    tl.store(slot_ptr + b * length + pos, slot.to(tl.int64), mask=valid)
    tl.store(kept_index_ptr + b * num_kept + own_slot, pos, mask=kept)
    tl.store(out_sizes_ptr + b * num_kept + own_slot, count, mask=kept)


@triton.jit(do_not_specialize=["length", "num_kept", "num_members"])
def _reduce_kernel(
    x_ptr, kept_index_ptr, slot_ptr, members_ptr, out_ptr, length, num_kept, num_members, channels,
    MEAN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, own_slot = row // num_kept, row % num_kept
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pos = tl.load(kept_index_ptr + row)
    x_ptr += b * length * channels
    own = tl.load(x_ptr + pos * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    total, count = tl.zeros([BLOCK_C], tl.float32), 1.0
    for j in range(num_members):
        member = tl.load(members_ptr + pos * num_members + j)
        slot = tl.load(slot_ptr + b * length + member, mask=member >= 0, other=-1)
        here = slot == own_slot
        row_j = tl.load(x_ptr + member * channels + c, mask=(c < channels) & here, other=0.0).to(tl.float32)
        if MEAN:
            row_j = tl.where(here, row_j - own, 0.0)
        total += row_j
        count += here.to(tl.float32)
    if MEAN:
        total = total / count
    tl.store(out_ptr + row * channels + c, own + total, mask=c < channels)


@triton.jit(do_not_specialize=["rows", "length"])
def _take_kernel(x_ptr, index_ptr, out_ptr, rows, length, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks = tl.cdiv(length, BLOCK_R)
    pid = tl.program_id(0).to(tl.int64)
    b, r = pid // blocks, (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source = tl.load(index_ptr + b * length + r, mask=r < length, other=0)
    mask = (r < length)[:, None] & (c < channels)[None, :]
    values = tl.load(x_ptr + (b * rows + source)[:, None] * channels + c[None, :], mask=mask)
    tl.store(out_ptr + (b * length + r)[:, None] * channels + c[None, :], values, mask=mask)


@on_its_device
def match(descriptor, dst, tile_starts, tile_sizes, num_merged, kept_starts, num_kept: int, max_tile: int):
    batch, length, channels = descriptor.shape
    kept_index = torch.empty(batch, num_kept, dtype=torch.int64, device=descriptor.device)
    sizes = torch.empty(batch, num_kept, dtype=torch.int32, device=descriptor.device)
    token_slot = torch.empty(batch, length, dtype=torch.int64, device=descriptor.device)
    tiles = tile_starts.shape[0]
    if batch * tiles:
        block = max(triton.next_power_of_2(max_tile), 16)
        _match_kernel[(batch * tiles,)](descriptor.contiguous(), dst, tile_starts, tile_sizes, num_merged, kept_starts,
                                        kept_index, token_slot, sizes, tiles, length, num_kept, channels,
                                        BLOCK_T=block, BLOCK_C=32, num_warps=4 if block <= 64 else 8)  # fmt: skip
    return kept_index, token_slot, sizes


@on_its_device
def reduce_rows(x: Tensor, kept_index: Tensor, token_slot: Tensor, members: Tensor, mean: bool) -> Tensor:
    batch, length, channels = x.shape
    num_kept = kept_index.shape[1]
    out = torch.empty(batch, num_kept, channels, dtype=x.dtype, device=x.device)
    if out.numel():
        block = _channel_block(channels)
        grid = (batch * num_kept, triton.cdiv(channels, block))
        _reduce_kernel[grid](x.contiguous(), kept_index, token_slot, members, out, length, num_kept, members.shape[1],
                             channels, MEAN=mean, BLOCK_C=block)  # fmt: skip
    return out


@on_its_device
def take_rows(x: Tensor, index: Tensor) -> Tensor:
    batch, length = index.shape
    out = torch.empty(batch, length, x.shape[2], dtype=x.dtype, device=x.device)
    if out.numel():
        block = _channel_block(x.shape[2])
        grid = (batch * triton.cdiv(length, BLOCK_R), triton.cdiv(x.shape[2], block))
        _take_kernel[grid](x.contiguous(), index, out, x.shape[1], length, x.shape[2], BLOCK_R=BLOCK_R, BLOCK_C=block)
    return out


def _channel_block(channels: int) -> int:
    return min(triton.next_power_of_2(channels), 1024)
