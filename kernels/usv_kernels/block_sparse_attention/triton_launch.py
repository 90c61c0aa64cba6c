"""Launches the Triton kernels: tile shapes, tables of tiles, strides. Nothing here waits for the device.

Tile shapes follow from D, dtype and, where the host knows it, the largest block (`BlockSelection.q_max`, `kv_max`), so a
change of counts, lengths or density never compiles anew.
"""

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .._checks import require
from .._device import on_its_device
from .._gpus import INSTEAD, gpu_of
from .._impl import runs_on
from ..selection import inverted_lists
from .low_precision import add_mean_key, low_inputs
from .tiles import Config, config, tiles_per_block
from .triton_backward import delta_kernel, dkv_kernel, dq_kernel, gate_sum_kernel, proxy_dkv_kernel
from .triton_forward import forward_kernel

HEAD_DIMS = (32, 64, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_PARTS = 8  # of the queries for the gradients of proxies


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
    require(runs_on(q), "q", f"a tensor on {q.device}", "a GPU tensor for impl='triton' (or TRITON_INTERPRET=1 set before triton is imported)")


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
    first = 64 if cfg.halves else dim
    # FP fusion by name: Triton 3.10 turns it off by default, and every multiply-add would be two instructions.
    options = dict(num_warps=cfg.num_warps, num_stages=cfg.num_stages, enable_fp_fusion=True)
    options |= {"matrix_instr_nonkdim": cfg.nonkdim} if cfg.nonkdim else {}
    return dict(BM=cfg.BM, BN=cfg.BN, D=first, DP=triton.next_power_of_2(first), D1=dim - first) | options


def _launch(kernel, name: str, q: Tensor, cfg: Config, grid: tuple[int, ...], *arguments, **named) -> None:
    """Launches a kernel with its tile; a tile that the device has no room for is an error that says what to do."""
    try:
        kernel[grid](*arguments, **named, **_common(q, cfg))
    except OutOfResources as error:
        raise TileDoesNotFit(
            f"{name}: got a tile of {cfg.BM} x {cfg.BN} with {cfg.num_warps} warps and {cfg.num_stages} stages for D = {q.shape[-1]} and {q.dtype}, which "
            f"needs {error.required} of {error.name}; {gpu_of(q).name} has {error.limit}. Smaller tiles are taken for a selection of smaller "
            f"blocks (q_max, kv_max) and for half precision; otherwise use {INSTEAD}"
        ) from error


class TileDoesNotFit(RuntimeError):
    """A kernel needs more shared memory or registers than the GPU has."""


def _proxy_arguments(proxy, counts: Tensor, lists: Tensor) -> tuple[Tensor | None, ...]:
    """Keys, values and log sizes as the kernels read them, and (B, H, M, N) bytes, 1 where a block is listed."""
    if proxy is None:
        return (None,) * 4
    keys, values, log_size = proxy
    num_kv = keys.shape[2]
    used = torch.arange(lists.shape[-1], device=lists.device, dtype=torch.int32) < counts.unsqueeze(-1)
    listed = torch.zeros(*counts.shape, num_kv + 1, dtype=torch.uint8, device=lists.device)
    listed = listed.scatter_(-1, torch.where(used, lists, num_kv).long(), 1)[..., :num_kv]
    return keys.contiguous(), values.contiguous(), log_size.float().contiguous(), listed.contiguous()


def _contiguous_lists(selection_tensors):
    return tuple(x.contiguous() for x in selection_tensors)


@on_its_device
def forward(q, k, v, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0, kv_max: int = 0, proxy=None, low=None):
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) fp32. proxy: keys, values, log sizes (B, H, N). low: what `low_precision` made
    of q, k and v; lse is then that of smoothed keys."""
    _check(q)
    counts, lists, q_starts, q_sizes, kv_starts, kv_sizes = _contiguous_lists(selection_tensors)
    batch, heads, q_len, _ = q.shape
    # Rows of no block are written by nobody: out 0, lse -inf.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or q_starts.numel() == 0 or kv_starts.numel() == 0:
        return out, lse
    scales = (None,) * 3
    if low is not None:
        q, k, v = low.q.values, low.k.values, low.v.values
        scales = (low.q.scales.contiguous(), low.k.scales.contiguous(), low.v.scales if low.v.scales is None else low.v.scales.contiguous())
    q, k, v = _rows(q), _rows(k), _rows(v)
    # e4m3 is multiplied 32 keys at a time: a product over a tile of 16 does not compile on NVIDIA.
    largest = 32 if scales[2] is not None and 0 < kv_max <= 16 else kv_max
    cfg = config("forward", q.shape[-1], out.dtype, q_max, largest, gpu_of(q), proxy is not None)
    block, start, rows, _ = tile_table(q_starts, q_sizes, cfg.BM, q_max, q_len)
    bias, *bias_strides = _bias(key_bias, heads)
    gate = None if block_gate is None else block_gate.float().contiguous()
    _launch(
        forward_kernel, "forward", q, cfg, (block.shape[1], batch * heads), q, k, v, out, lse, *scales, bias, gate,
        *_proxy_arguments(proxy, counts, lists), counts, lists, kv_starts, kv_sizes, block, start, rows, scale, heads, lists.shape[2],
        kv_starts.shape[-1], lists.shape[3], q_len, k.shape[2], block.shape[1] if len(block) > 1 else 0, _layout_stride(kv_starts),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *bias_strides, HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None, HAS_PROXY=proxy is not None, KV_TILES=tiles_per_block(kv_max, cfg.BN),
        LOW_QK=low is not None, LOW_PV=scales[2] is not None,
    )  # fmt: skip
    return out, lse


@on_its_device
def forward_low_precision(q, k, v, selection_tensors, key_bias, block_gate, scale: float, q_max: int, kv_max: int, qk_dtype: torch.dtype,
                          pv_dtype: torch.dtype | None = None):  # fmt: skip
    """The same with products of int8 or e4m3.

    Raises ValueError: a GPU that does not multiply them natively.
    """
    _check(q)
    gpu = gpu_of(q)
    for name, dtype in (("qk_dtype", qk_dtype), ("pv_dtype", pv_dtype)):
        native = dtype is None or (gpu.int8 if dtype == torch.int8 else gpu.fp8)
        require(native, name, f"{dtype} on {gpu.name}, which does not multiply it natively", f"one of {multiplied(gpu)}")
    low = low_inputs(q, k, v, selection_tensors, qk_dtype, pv_dtype)
    out, lse = forward(q, k, v, selection_tensors, key_bias, block_gate, scale, q_max, kv_max, low=low)
    return out, add_mean_key(lse, q, low.mean, scale)


def multiplied(gpu) -> str:
    """The dtypes of `qk_dtype` and `pv_dtype` that a GPU multiplies."""
    names = [str(dtype) for dtype, native in ((torch.int8, gpu.int8), (torch.float8_e4m3fn, gpu.fp8)) if native]
    return ", ".join(["None", *names]) + " there (int8 not as pv_dtype)"


@on_its_device
def backward(grad_out, grad_lse, q, k, v, out, lse, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0,
             kv_max: int = 0, proxy=None):  # fmt: skip
    """Gradients of q, k, v, key_bias and block_gate (None for an absent argument), and of the three tensors of a proxy. grad_lse may
    be None."""
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
    proxies = _proxy_arguments(proxy, *tensors[:2])
    dproxy = None if proxy is None else [torch.zeros_like(x) for x in proxies[:3]]
    if q.numel() and (k.numel() or proxy is not None) and tensors[2].numel() and tensors[4].numel():
        delta = _delta(out, grad_out, grad_lse)
        inputs = (q, k, v, grad_out, lse, delta, bias, bias_strides, gate, tensors, scale, q_max, kv_max)
        _launch_dq(dq, dgate, *inputs, proxies)
        _launch_dkv(dk, dv, dbias, *inverted, *inputs)
        if proxy is not None:
            dproxy = _launch_proxy_dkv(q, grad_out, lse, delta, proxies, tensors, scale, q_max)
    if dbias is not None:
        dbias = (dbias.sum(1, keepdim=True) if key_bias.shape[1] != heads else dbias[:, :, :kv_len]).to(key_bias.dtype)
    dgate = None if dgate is None else dgate.to(block_gate.dtype)
    return dq, dk, dv, dbias, dgate, *([] if proxy is None else [x.to(y.dtype) for x, y in zip(dproxy, proxy)])


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    batch, heads, q_len, dim = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta_kernel[(triton.cdiv(q_len, 64), batch * heads)](
        out, grad_out, grad_lse, delta, heads, q_len, *out.stride()[:3], *grad_out.stride()[:3],
        HAS_GRAD_LSE=grad_lse is not None, BM=64, D=dim, DP=triton.next_power_of_2(dim),
    )  # fmt: skip
    return delta


def _launch_dq(dq, dgate, q, k, v, grad, lse, delta, bias, bias_strides, gate, tensors, scale, q_max, kv_max, proxies=(None,) * 4) -> None:
    counts, lists, q_starts, q_sizes, kv_starts, kv_sizes = tensors
    batch, heads, q_len, _ = q.shape
    num_q, capacity = lists.shape[2:]
    cfg = config("dq", q.shape[-1], q.dtype, q_max, kv_max, gpu_of(q), proxies[0] is not None)
    block, start, rows, first = tile_table(q_starts, q_sizes, cfg.BM, q_max, q_len)
    tiles = block.shape[1]
    # One tile a block: its sums are the gradient. Otherwise each tile writes its own and a second kernel adds them.
    direct = 0 < q_max <= cfg.BM
    partial = dgate if gate is None or direct else gate.new_empty(batch, heads, tiles, capacity)
    shared = 0 if len(block) == 1 else 1
    _launch(
        dq_kernel, "dq", q, cfg, (tiles, batch * heads), q, k, v, grad, lse, delta, dq, partial, bias, gate, *proxies, counts, lists,
        kv_starts, kv_sizes, block, start, rows, scale, heads, num_q, kv_starts.shape[-1], capacity, q_len, tiles, tiles * shared, _layout_stride(kv_starts), *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *grad.stride()[:3], *dq.stride()[:3], *bias_strides, HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None, HAS_PROXY=proxies[0] is not None, KV_TILES=tiles_per_block(kv_max, cfg.BN),
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
    cfg = config("dkv", q.shape[-1], q.dtype, q_max, kv_max, gpu_of(q))
    block, start, rows = _longest_first(*tile_table(kv_starts, kv_sizes, cfg.BN, kv_max, kv_len)[:3], offsets)
    _launch(
        dkv_kernel, "dkv", q, cfg, (block.shape[1], batch * heads), q, k, v, grad, lse, delta, dk, dv, dbias, bias, gate, offsets,
        entries, q_starts, q_sizes, block, start, rows, scale, heads, num_q, num_kv, capacity, q_len, kv_len, block.shape[1], _layout_stride(q_starts),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *dk.stride()[:3], *bias_strides,
        HAS_BIAS=bias is not None, HAS_GATE=gate is not None, Q_TILES=tiles_per_block(q_max, cfg.BM),
    )  # fmt: skip


def _launch_proxy_dkv(q, grad, lse, delta, proxies, tensors, scale, q_max) -> list[Tensor]:
    """fp32 gradients of proxy keys, values and log sizes. Proxies are few, so the query tiles are cut into parts that run side by side."""
    listed = proxies[3]
    batch, heads, q_len, dim = q.shape
    num_q, num_kv = listed.shape[2:]
    cfg = config("dkv", dim, q.dtype, q_max, 64, gpu_of(q))
    block, start, rows, _ = tile_table(*tensors[2:4], cfg.BM, q_max, q_len)
    tiles = block.shape[1]
    parts = max(1, min(MOST_PARTS, tiles // 32))
    sums = [torch.empty(parts, batch, heads, num_kv, *tail, dtype=torch.float32, device=q.device) for tail in ((dim,), (dim,), ())]
    _launch(
        proxy_dkv_kernel, "proxy_dkv", q, cfg, (triton.cdiv(num_kv, cfg.BN), parts, batch * heads), q, grad, lse, delta, *proxies, *sums, block,
        start, rows, scale, heads, num_q, num_kv, q_len, tiles, tiles if len(block) > 1 else 0, *q.stride()[:3], *grad.stride()[:3],
    )  # fmt: skip
    return [x.sum(0) for x in sums]
