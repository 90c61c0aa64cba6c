"""Launches the Triton kernels: tile shapes, tables of tiles, strides. Nothing here waits for the device.

Tile shapes follow from D, dtype and, where the host knows it, the largest block (`BlockSelection.q_max`, `kv_max`), so a
change of counts, lengths or density never compiles anew.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .._checks import require
from .._device import on_its_device
from ..selection import inverted_lists
from .triton_backward import delta_kernel, dkv_kernel, dq_kernel, gate_sum_kernel
from .triton_forward import forward_kernel

HEAD_DIMS = (32, 64, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AMD = 942  # the architecture of gfx942, beside NVIDIA's 80, 90, 100
MAX_TILES = 4  # tiles of a block that one flat loop handles; larger or unknown blocks take the nested loop


@dataclass(frozen=True)
class Config:
    """Tile of one kernel: rows of queries, columns of keys, warps, pipeline stages."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


def _tile(largest: int, top: int) -> int:
    """Power of two in 16..top that holds a block of `largest` tokens (0: unknown) or is `top`."""
    return top if largest == 0 else max(16, min(top, triton.next_power_of_2(largest)))


def architecture(q: Tensor) -> int:
    """What tile shapes depend on of a tensor's device: 80, 90, 100 … (NVIDIA), AMD; of the interpreter 90."""
    if q.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(q.device)
    return AMD if torch.version.hip else 10 * major + minor


def tiles_per_block(largest: int, tile: int) -> int:
    """Tiles in a block if the host knows it and they are few, else 0."""
    count = triton.cdiv(largest, tile)
    return count if 0 < count <= MAX_TILES else 0


def config(kernel: str, dim: int, dtype: torch.dtype, q_max: int, kv_max: int, arch: int = 90) -> Config:
    """The tile shape of `forward`, `dq` or `dkv`. Chosen so that nothing spills as compiled for sm_80, sm_90, sm_100 and gfx942
    and no product is computed twice (`python -m usv_kernels.compile_report`), not yet from timings (`bench_gpu.tiles`)."""
    loop = "q_max" if kernel == "dkv" else "kv_max"
    walked, wide = {"q_max": q_max, "kv_max": kv_max}[loop], dim > 64
    nested = tiles_per_block(walked, 64) == 0
    if dtype == torch.float32:
        chosen = _full(kernel, dim, nested, q_max, kv_max)
    elif arch == AMD:
        chosen = _cdna(kernel, wide, nested, q_max, kv_max)
    elif 90 <= arch < 120:
        chosen = _from_shared(kernel, wide, nested, q_max, kv_max, arch)
    else:
        chosen = _from_registers(kernel, dim, nested, q_max, kv_max)
    tile = chosen.BM if kernel == "dkv" else chosen.BN
    if not nested and tiles_per_block(walked, tile) == 0:  # too many of so small a tile: the nested loop, which needs more registers
        return config(kernel, dim, dtype, **{"q_max": q_max, "kv_max": kv_max, loop: 0}, arch=arch)
    return chosen


def _full(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int) -> Config:
    """fp32 products run on the scalar units: small tiles, and at D 128 more warps, keep the operands in registers."""
    wide = dim > 64
    bm, bn = (16, 16 if nested and kernel == "dq" else 32) if wide else (32, 32)
    warps = 4 if not wide or bn == 16 or (nested and kernel == "forward") else 8
    if kernel == "dkv" and nested and dim == 64:
        warps = 8
    pipelined = nested or kernel != "dq" if wide else kernel == "forward" and dim == 32
    return Config(_tile(q_max, bm), _tile(kv_max, bn), warps, 2 if pipelined else 1)


def _half(kernel: str, q_max: int, kv_max: int) -> tuple[int, int]:
    """Rows of queries and keys of a tile in half precision, before what a generation of GPUs makes smaller."""
    return _tile(q_max, 128 if kernel == "forward" and q_max > 64 else 64), _tile(kv_max, 64)


def _from_shared(kernel: str, wide: bool, nested: bool, q_max: int, kv_max: int, arch: int) -> Config:
    """Hopper's wgmma and Blackwell's tcgen05 read operands from shared memory. On Hopper a warpgroup, four warps, takes 64 rows: eight
    warps on fewer would compute the same product twice."""
    bm, bn = _half(kernel, q_max, kv_max)
    if nested and arch >= 100:  # more warps hold what would spill
        narrow = min(bn, 32) if kernel == "dq" and wide else bn
        return Config(min(bm, 32 if kernel == "dkv" else 64), narrow, 8 if wide else 4, 2)
    if kernel == "forward":
        return Config(bm, bn, 8 if bm == 128 else 4, 2 if nested else 3)
    if not wide:
        return Config(bm, bn, 4, 3)
    # dQ, or dK and dV of 128 channels are held beside the scores: a full tile of those would spill, or a third stage leave one program.
    if kernel == "dq":
        return Config(bm, min(bn, 32), 4, 3) if nested else Config(bm, bn, 4, 2)
    return Config(min(bm, 16 if nested else 32), bn, 4, 2)


def _from_registers(kernel: str, dim: int, nested: bool, q_max: int, kv_max: int) -> Config:
    """Ampere, Ada and consumer Blackwell: both operands of a product come from registers."""
    wide, (bm, bn) = dim > 64, _half(kernel, q_max, kv_max)
    if kernel == "dkv" and (nested or dim == 64 or (wide and q_max > 64)):
        bm = min(bm, 32)
    if kernel == "forward" and wide and nested:
        bm = min(bm, 64)
    warps = 8 if bm == 128 or (wide and (nested or kernel == "dkv" and bn == 64)) else 4
    if kernel == "dq" and wide and (nested or kv_max > 64) or not wide and nested and kernel != "dkv":
        bn = min(bn, 32)
    stages = 3 if kernel == "forward" and not nested or kernel == "dq" and dim == 64 and not nested else 2
    return Config(bm, bn, warps, stages)


def _cdna(kernel: str, wide: bool, nested: bool, q_max: int, kv_max: int) -> Config:
    """CDNA: 512 registers a lane with four warps, 256 with eight; a pipeline's second stage lies in registers too."""
    bm, bn = _half(kernel, q_max, kv_max)
    if kernel == "dkv":
        return Config(min(bm, 16), bn, 8, 2) if wide else Config(min(bm, 32) if nested else bm, bn, 4, 2)
    narrow = min(bn, 32) if wide or kernel == "forward" else bn
    return Config(bm, narrow, 8 if bm == 128 else 4, 1 if wide and kernel == "dq" else 2)


def tile_table(starts: Tensor, sizes: Tensor, tile: int, largest: int, length: int) -> tuple[Tensor, ...]:
    """Which rows each program works on.

    Returns block, start, rows: (L, T) int32 with L = 1 for a shared layout, else B * H; rows is 0 for spare programs.
    first: (L, n + 1) int32, the first tile of each block. T is a bound the host knows: every block ends in at most one
    partial tile.
    """
    starts, sizes = (x.reshape(-1, x.shape[-1]) for x in (starts, sizes))
    lists, count = starts.shape
    if 0 < largest <= tile:
        index = torch.arange(count + 1, device=starts.device, dtype=torch.int32).expand(lists, -1).contiguous()
        return index[:, :count].contiguous(), starts.contiguous(), sizes.contiguous(), index
    tiles = (sizes + (tile - 1)) // tile
    first = torch.nn.functional.pad(tiles.cumsum(-1, dtype=torch.int32), (1, 0))
    number = torch.arange(length // tile + count, device=starts.device, dtype=torch.int32).expand(lists, -1).contiguous()
    block = torch.searchsorted(first[:, 1:].contiguous(), number, right=True, out_int32=True)
    spare = block >= count
    index = block.clamp(max=count - 1).long()
    offset = (number - first.gather(1, index)) * tile
    rows = torch.where(spare, 0, (sizes.gather(1, index) - offset).clamp(max=tile))
    return index.to(torch.int32), starts.gather(1, index) + offset, rows.to(torch.int32), first


def _check(q: Tensor) -> None:
    require(q.shape[-1] in HEAD_DIMS, "q", lambda: f"D = {q.shape[-1]}", f"D in {HEAD_DIMS} for impl='triton'")
    require(q.dtype in DTYPES, "q", q.dtype, "float32, float16 or bfloat16 for impl='triton'")
    interpreted = type(forward_kernel).__name__ == "InterpretedFunction"
    require(q.device.type == "cuda" or interpreted, "q", f"a tensor on {q.device}",
            "a GPU tensor for impl='triton' (or TRITON_INTERPRET=1 set before triton is imported)")  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Contiguous channels: the kernels read rows of D with one stride; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _layout_stride(x: Tensor) -> int:
    return 0 if x.dim() == 1 else x.shape[-1]


def _bias(key_bias: Tensor | None, heads: int) -> tuple[Tensor | None, int, int]:
    if key_bias is None:
        return None, 0, 0
    bias = key_bias.float().contiguous()
    return bias, bias.stride(0), bias.stride(1) if bias.shape[1] == heads and heads > 1 else 0


def _common(q: Tensor, cfg: Config) -> dict:
    dim = q.shape[-1]
    return dict(BM=cfg.BM, BN=cfg.BN, D=dim, DP=triton.next_power_of_2(dim), num_warps=cfg.num_warps, num_stages=cfg.num_stages)


def _contiguous_lists(selection_tensors):
    return tuple(x.contiguous() for x in selection_tensors)


@on_its_device
def forward(q, k, v, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0, kv_max: int = 0):
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) fp32."""
    _check(q)
    counts, lists, q_starts, q_sizes, kv_starts, kv_sizes = _contiguous_lists(selection_tensors)
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, q_len, _ = q.shape
    # Rows of no block are written by nobody: out 0, lse -inf.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or q_starts.numel() == 0 or kv_starts.numel() == 0:
        return out, lse
    cfg = config("forward", q.shape[-1], q.dtype, q_max, kv_max, architecture(q))
    block, start, rows, _ = tile_table(q_starts, q_sizes, cfg.BM, q_max, q_len)
    bias, *bias_strides = _bias(key_bias, heads)
    gate = None if block_gate is None else block_gate.float().contiguous()
    forward_kernel[(block.shape[1], batch * heads)](
        q, k, v, out, lse, bias, gate, counts, lists, kv_starts, kv_sizes, block, start, rows, scale, heads, lists.shape[2],
        lists.shape[3], q_len, block.shape[1] if len(block) > 1 else 0, _layout_stride(kv_starts),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *bias_strides, HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None, KV_TILES=tiles_per_block(kv_max, cfg.BN), **_common(q, cfg),
    )  # fmt: skip
    return out, lse


@on_its_device
def backward(grad_out, grad_lse, q, k, v, out, lse, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0,
             kv_max: int = 0):  # fmt: skip
    """Gradients of q, k, v, key_bias and block_gate (None for an absent argument). grad_lse may be None."""
    _check(q)
    tensors = _contiguous_lists(selection_tensors)
    q, k, v, out, grad_out = (_rows(x) for x in (q, k, v, out, grad_out))
    heads, kv_len = q.shape[1], k.shape[2]
    # Before anything large is there: what building the lists holds for a moment is then no part of the peak.
    inverted = inverted_lists(*tensors[:2], tensors[4].shape[-1])
    bias, *bias_strides = _bias(key_bias, heads)
    gate = None if block_gate is None else block_gate.float().contiguous()
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    dbias = None if bias is None else torch.zeros(*k.shape[:3], dtype=torch.float32, device=k.device)
    dgate = None if gate is None else torch.zeros_like(gate)
    if q.numel() and k.numel() and tensors[2].numel() and tensors[4].numel():
        delta = _delta(out, grad_out, grad_lse)
        inputs = (q, k, v, grad_out, lse, delta, bias, bias_strides, gate, tensors, scale, q_max, kv_max)
        _launch_dq(dq, dgate, *inputs)
        _launch_dkv(dk, dv, dbias, *inverted, *inputs)
    if dbias is not None:
        dbias = (dbias.sum(1, keepdim=True) if key_bias.shape[1] != heads else dbias[:, :, :kv_len]).to(key_bias.dtype)
    return dq, dk, dv, dbias, None if dgate is None else dgate.to(block_gate.dtype)


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, heads, q_len, dim = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta_kernel[(triton.cdiv(q_len, 64), batch * heads)](
        out, grad_out, grad_lse, delta, heads, q_len, *out.stride()[:3], *grad_out.stride()[:3],
        HAS_GRAD_LSE=grad_lse is not None, BM=64, D=dim, DP=triton.next_power_of_2(dim),
    )  # fmt: skip
    return delta


def _launch_dq(dq, dgate, q, k, v, grad, lse, delta, bias, bias_strides, gate, tensors, scale, q_max, kv_max) -> None:
    counts, lists, q_starts, q_sizes, kv_starts, kv_sizes = tensors
    batch, heads, q_len, _ = q.shape
    num_q, capacity = lists.shape[2:]
    cfg = config("dq", q.shape[-1], q.dtype, q_max, kv_max, architecture(q))
    block, start, rows, first = tile_table(q_starts, q_sizes, cfg.BM, q_max, q_len)
    tiles = block.shape[1]
    # One tile a block: its sums are the gradient. Otherwise each tile writes its own and a second kernel adds them.
    direct = 0 < q_max <= cfg.BM
    partial = dgate if gate is None or direct else gate.new_empty(batch, heads, tiles, capacity)
    shared = 0 if len(block) == 1 else 1
    dq_kernel[(tiles, batch * heads)](
        q, k, v, grad, lse, delta, dq, partial, bias, gate, counts, lists, kv_starts, kv_sizes, block, start, rows, scale,
        heads, num_q, capacity, q_len, tiles, tiles * shared, _layout_stride(kv_starts), *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *grad.stride()[:3], *dq.stride()[:3], *bias_strides, HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None, KV_TILES=tiles_per_block(kv_max, cfg.BN), **_common(q, cfg),
    )  # fmt: skip
    if gate is not None and not direct:
        gate_sum_kernel[(num_q, batch * heads)](partial, dgate, counts, first, num_q, capacity, tiles,
                                                (num_q + 1) * shared, BK=128)  # fmt: skip


def _longest_first(block: Tensor, start: Tensor, rows: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """The table of key tiles of every head, those with the longest lists first: one that all queries list, begun last, would keep
    the GPU waiting for a single program."""
    lengths = offsets.diff(dim=-1).flatten(0, 1)
    tables = [x.expand(len(lengths), -1) for x in (block, start, rows)]
    order = lengths.gather(1, tables[0].long()).argsort(dim=1, descending=True, stable=True)
    return tuple(x.gather(1, order) for x in tables)


def _launch_dkv(dk, dv, dbias, offsets, entries, q, k, v, grad, lse, delta, bias, bias_strides, gate, tensors, scale, q_max, kv_max) -> None:
    counts, lists, q_starts, q_sizes, kv_starts, kv_sizes = tensors
    batch, heads, q_len, _ = q.shape
    num_q, capacity = lists.shape[2:]
    num_kv, kv_len = kv_starts.shape[-1], k.shape[2]
    cfg = config("dkv", q.shape[-1], q.dtype, q_max, kv_max, architecture(q))
    block, start, rows = _longest_first(*tile_table(kv_starts, kv_sizes, cfg.BN, kv_max, kv_len)[:3], offsets)
    dkv_kernel[(block.shape[1], batch * heads)](
        q, k, v, grad, lse, delta, dk, dv, dbias, bias, gate, offsets, entries, q_starts, q_sizes, block, start, rows, scale,
        heads, num_q, num_kv, capacity, q_len, kv_len, block.shape[1], _layout_stride(q_starts),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *dk.stride()[:3], *bias_strides,
        HAS_BIAS=bias is not None, HAS_GATE=gate is not None, Q_TILES=tiles_per_block(q_max, cfg.BM), **_common(q, cfg),
    )  # fmt: skip
