"""Attention over listed blocks of keys, with every gradient.

    S_ij = scale * <q_i, k_j> + key_bias_j + block_gate(block of i, block of j)   for listed block pairs, else -inf
    lse_i = log sum_j exp S_ij,   out_i = sum_j exp(S_ij - lse_i) v_j

The name says the mathematics, `impl` says how. Equations of the backward, limits and measurements: README.md here.
"""

import logging
import math

import torch
from torch import Tensor

from .._checks import check_attention, check_values, looks_at_values, require
from ..selection import BlockSelection
from . import operator, reference
from .low_precision import check_low_precision
from .proxy import BlockProxy as BlockProxy
from .proxy import block_proxy as block_proxy
from .proxy import check_proxy, log_sizes

log = logging.getLogger("usv_kernels")
IMPLS = ("auto", "reference", "cpu", "triton", "flex", "flex_compiled")
_announced: set[tuple[str, str]] = set()


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    key_bias: Tensor | None = None,
    block_gate: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    debug: bool = False,
    proxy: BlockProxy | None = None,
    qk_dtype: torch.dtype | None = None,
    pv_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query block over the key blocks it lists.

    Args:
        q: (B, H, Sq, D). k, v: (B, H, Sk, D), same dtype and device; Sq may differ from Sk.
        selection: which blocks, and the layout of both sides.
        key_bias: (B, H or 1, Sk), natural-log units, added to the logits of a key, e.g. log(size) of a merged token.
        block_gate: (B, H, M, K), natural-log units, added to the logits of each listed block. Slots beyond the count are
            not read and get zero gradient.
        scale: factor of the dot products, default 1 / sqrt(D).
        impl: "auto" takes "triton" on a GPU and "cpu" on a CPU and logs the choice once; any other value runs exactly
            that or raises. "flex" is FlexAttention in eager mode, "flex_compiled" its fused kernel, for consecutive blocks of
            one size without bias and gates (on a CPU its lse is NaN).
        debug: on a GPU, also check counts, indices and block bounds by device-side assertions. On a CPU they are always
            checked (outside torch.compile).
        proxy: what stands in the softmax for each key block that a row's block does not list: mean keys and values
            (B, H, N, D) and sizes, as `block_proxy` makes them; differentiable. None drops those blocks. key_bias and
            block_gate do not touch it: a bias belongs into its means and sizes. Query rows outside every block have none.
            Not for "flex" and "flex_compiled".
        qk_dtype: None for exact products, or torch.int8 or torch.float8_e4m3fn for rounded q and k: q with a scale a query block, k less
            the mean key of its head, a scale a key (`low_precision`). Forward only, without proxies. "cpu": int8 where the CPU has
            VNNI; "triton": what the GPU multiplies natively (`_gpus`). lse is that of the keys themselves, to the same rounding.
        pv_dtype: None, or with a qk_dtype torch.float8_e4m3fn for rounded probabilities and v, a scale a channel; not on a CPU.

    Returns:
        out: (B, H, Sq, D) in q's dtype. lse: (B, H, Sq), natural log, fp32 (fp64 for fp64 input). Both are
        differentiable. A query row without any key (or with only -inf logits) gives out 0 and lse -inf.

    Raises:
        ValueError: an argument that does not fit, named with what was given and what is accepted.

    Sources: FlashAttention-2 (https://arxiv.org/abs/2307.08691) for the tiling and the backward; block lists as in
    VSA (https://arxiv.org/abs/2505.13389).
    """
    require(impl in IMPLS, "impl", repr(impl), " | ".join(IMPLS))
    require(isinstance(selection, BlockSelection), "selection", type(selection).__name__, "a BlockSelection")
    check_attention(q, k, v, selection, key_bias, block_gate)
    if looks_at_values(selection.kv_indices, debug):
        check_values(selection, q.shape[2], k.shape[2])
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if proxy is not None:
        check_proxy(proxy, q, selection)
        proxy = (*proxy[:2], log_sizes(proxy[2], *q.shape[:2]))
    if impl == "auto":
        impl = "cpu" if q.device.type == "cpu" else "triton"
        _announce(q.device.type, impl)
    if qk_dtype is not None or pv_dtype is not None:
        check_low_precision(qk_dtype, pv_dtype, impl, (q, k, v, key_bias, block_gate), proxy)
    if impl == "reference":
        return reference.attend(q, k, v, selection, key_bias, block_gate, scale, proxy, qk_dtype, pv_dtype)
    if impl in ("flex", "flex_compiled"):
        from . import flex

        require(proxy is None, "impl", f"{impl!r} with a proxy", "impl='triton', 'cpu' or 'reference'")
        if impl == "flex":
            return flex.attend(q, k, v, selection, key_bias, block_gate, scale)
        require(key_bias is None and block_gate is None, "impl", "'flex_compiled' with a bias or gates", "impl='flex', or neither")
        return flex.attend_compiled(q, k, v, selection, scale)
    require(impl == "triton" or q.device.type == "cpu", "impl", f"'cpu' with tensors on {q.device}", "tensors on the CPU")
    if qk_dtype is not None:
        return operator.attend_low_precision(q, k, v, selection, key_bias, block_gate, scale, impl, qk_dtype, pv_dtype)
    return operator.attend(q, k, v, selection, key_bias, block_gate, scale, impl, proxy)


def _announce(device: str, impl: str) -> None:
    if torch.compiler.is_compiling() or (device, impl) in _announced:
        return
    _announced.add((device, impl))
    log.info("block_sparse_attention: impl=auto runs %r on %s", impl, device)
