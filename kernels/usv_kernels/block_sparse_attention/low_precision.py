"""Low precision of the products of a forward: what is rounded, in plain torch.

    k' = k - mean of all keys of the head            (smoothing: softmax does not see it, lse gets scale * <q, mean> back)
    q8 = round(q / q_scale),  q_scale one number a query block        k8 = round(k' / k_scale),  k_scale one number a key
    S_ij = scale * q_scale k_scale_j <q8_i, k8_j> + ...

int8 scales take the largest magnitude to 127, fp8 (e4m3) to 448. With fp8 values V is rounded with a scale a channel and P = exp(S - top),
times 448, without one; the sum of P stays fp32. After SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958); a scale a key
costs nothing more than one a block of keys here, since a column of the scores is multiplied anyway.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import require

INT8_TOP = 127.0
FP8_TOP = 448.0
TOPS = {torch.int8: INT8_TOP, torch.float8_e4m3fn: FP8_TOP}


class Rounded(NamedTuple):
    """values in int8 or e4m3, of q, k' or v; scales, fp32, that broadcast to them."""

    values: Tensor
    scales: Tensor


def round_to(x: Tensor, largest: Tensor, dtype: torch.dtype) -> Rounded:
    """x with `largest` magnitudes, which broadcast to it, taken to the largest number of `dtype`; NaN becomes 0 in int8."""
    scales = largest / TOPS[dtype]
    scaled = x / scales.clamp(min=torch.finfo(x.dtype).tiny)
    return Rounded((scaled.round() if dtype == torch.int8 else scaled.clamp(-FP8_TOP, FP8_TOP)).to(dtype), scales)


def round_queries(q: Tensor, q_block: Tensor, blocks: int, dtype: torch.dtype) -> Rounded:
    """q (B, H, S, D) with a scale a query block; q_block: (B, H, S) block of each row, `blocks` for rows outside all. scales (B, H, S, 1)."""
    rows = q.abs().amax(-1)
    largest = torch.zeros(*q.shape[:2], blocks + 1, dtype=q.dtype, device=q.device).scatter_reduce(2, q_block, rows, "amax")
    return round_to(q, largest.gather(2, q_block).unsqueeze(-1), dtype)


def round_keys(k: Tensor, dtype: torch.dtype) -> tuple[Rounded, Tensor]:
    """Smoothed keys (B, H, S, D) with a scale each, (B, H, S, 1), and the mean key (B, H, 1, D)."""
    mean = k.mean(2, keepdim=True)
    smooth = k - mean
    return round_to(smooth, smooth.abs().amax(-1, keepdim=True), dtype), mean


def round_values(v: Tensor) -> Rounded:
    """v (B, H, S, D) in e4m3 with a scale a channel, (B, H, 1, D)."""
    return round_to(v, v.abs().amax(2, keepdim=True), torch.float8_e4m3fn)


class LowInputs(NamedTuple):
    """Rounded q, k and v, v with scales None where it is not rounded, and the mean key (B, H, 1, D)."""

    q: Rounded
    k: Rounded
    v: Rounded
    mean: Tensor


def low_inputs(q: Tensor, k: Tensor, v: Tensor, selection_tensors, qk_dtype: torch.dtype, pv_dtype: torch.dtype | None) -> LowInputs:
    """Of q, k and v (B, H, S, D) in any dtype, rounded in fp32 (fp64 of fp64)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_block = block_of_token(*selection_tensors[2:4], q.shape[2]).expand(*q.shape[:3])
    keys, mean = round_keys(k.to(work), qk_dtype)
    values = Rounded(v, None) if pv_dtype is None else round_values(v.to(work))
    return LowInputs(round_queries(q.to(work), q_block, selection_tensors[2].shape[-1], qk_dtype), keys, values, mean)


def block_of_token(starts: Tensor, sizes: Tensor, length: int) -> Tensor:
    """(..., S) long: the block of each token, or the number of blocks where it lies in none; blocks (..., M) that do not overlap."""
    number = starts.shape[-1]
    token = torch.arange(length, device=starts.device).expand(*starts.shape[:-1], length).contiguous()
    if number == 0:
        return token * 0
    begin, order = torch.where(sizes > 0, starts, length).long().sort(dim=-1, stable=True)  # empty ones last, wherever they claim to begin
    place = torch.searchsorted(begin.contiguous(), token, right=True) - 1
    block = order.gather(-1, place.clamp(min=0))
    inside = (place >= 0) & (token < (starts + sizes).gather(-1, block))
    return torch.where(inside, block, number)


def add_mean_key(lse: Tensor, q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """lse (B, H, S) of smoothed keys -> of the keys themselves; -inf stays."""
    added = (q.to(mean.dtype) * mean).sum(-1) * scale
    return torch.where(lse == float("-inf"), lse, lse + added)


def as_float(x: Rounded) -> Tensor:
    """What the rounded values stand for."""
    return x.values.to(x.scales.dtype) * x.scales


def check_low_precision(qk_dtype, pv_dtype, impl: str, tensors: tuple, proxy) -> None:
    """What every device has to be refused; what one does not multiply is refused where it is asked (`triton_launch`, below)."""
    require(qk_dtype in TOPS, "qk_dtype", qk_dtype, "None, torch.int8 or torch.float8_e4m3fn")
    require(pv_dtype in (None, torch.float8_e4m3fn), "pv_dtype", pv_dtype, "None or torch.float8_e4m3fn")
    require(impl in ("reference", "cpu", "triton"), "impl", f"{impl!r} with qk_dtype", "impl='triton', 'cpu' or 'reference'")
    require(proxy is None, "proxy", "proxies with qk_dtype", "one of them: proxies are attended in full precision")
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    require(not wanted, "qk_dtype", f"{qk_dtype} with inputs that want gradients", "a forward alone (torch.no_grad()), or qk_dtype=None")
    if impl == "cpu":
        require(qk_dtype == torch.int8 and pv_dtype is None, "qk_dtype", f"{qk_dtype}, pv_dtype {pv_dtype} on a CPU", "torch.int8 and None, which its integer units multiply")
        require(multiplies_int8(), "qk_dtype", "torch.int8 on a CPU without VNNI", "qk_dtype=None, which is faster there")


# asked once: torch.compile then meets a constant, and `torch.compiler.assume_constant_result` would cost every import two seconds of dynamo
_VNNI = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()


def multiplies_int8() -> bool:
    """Whether this CPU has VNNI; without it torch's int8 product is a loop."""
    return _VNNI
