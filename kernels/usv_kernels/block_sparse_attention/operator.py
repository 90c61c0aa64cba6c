"""The differentiable operator as torch.library sees it: one forward and one backward op, real and fake, and autograd.

Both ops take the implementation as a string, so compiled graphs, eager autograd and `opcheck` all meet the same two
names: `usv_kernels::block_sparse_attention` and `usv_kernels::block_sparse_attention_backward`.
"""

import torch
from torch import Tensor

from .._impl import custom_op
from ..selection import BlockSelection


def _implementation(name: str):
    if name == "cpu":
        from . import cpu as module
    else:
        from . import triton_launch as module
    return module


@custom_op("block_sparse_attention")
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, block_gate: Tensor | None, kv_num_blocks: Tensor,
    kv_indices: Tensor, q_starts: Tensor, q_sizes: Tensor, kv_starts: Tensor, kv_sizes: Tensor, q_max: int,
    kv_max: int, scale: float, impl: str, proxy_keys: Tensor | None = None, proxy_values: Tensor | None = None,
    proxy_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    selection = (kv_num_blocks, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes)
    proxy = None if proxy_keys is None else (proxy_keys, proxy_values, proxy_bias)
    return _implementation(impl).forward(q, k, v, selection, key_bias, block_gate, scale, q_max, kv_max, proxy)


@forward_op.register_fake
def _(q, k, v, *rest):
    return _forward_fake(q)


def _forward_fake(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


@custom_op("block_sparse_attention_backward")
def backward_op(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    key_bias: Tensor | None, block_gate: Tensor | None, kv_num_blocks: Tensor, kv_indices: Tensor, q_starts: Tensor,
    q_sizes: Tensor, kv_starts: Tensor, kv_sizes: Tensor, q_max: int,
    kv_max: int, scale: float, impl: str, proxy_keys: Tensor | None = None, proxy_values: Tensor | None = None,
    proxy_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, key_bias, block_gate and the three of the proxy; an absent argument gets an empty tensor, as ops
    return no None."""
    selection = (kv_num_blocks, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes)
    proxy = None if proxy_keys is None else (proxy_keys, proxy_values, proxy_bias)
    gradients = _implementation(impl).backward(grad_out, grad_lse, q, k, v, out, lse, selection, key_bias, block_gate, scale, q_max, kv_max, proxy)
    gradients = (*gradients, *(None,) * (8 - len(gradients)))  # without a proxy there are five
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in gradients)


@backward_op.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, key_bias, block_gate, kv_num_blocks, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes,
      q_max, kv_max, scale, impl, proxy_keys=None, proxy_values=None, proxy_bias=None):  # fmt: skip
    optional = (key_bias, block_gate, proxy_keys, proxy_values, proxy_bias)
    gradients = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in optional)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *gradients


def _setup_context(ctx, inputs, output):
    q, k, v, key_bias, block_gate, *selection, ctx.q_max, ctx.kv_max, ctx.scale, ctx.impl = inputs[:15]
    proxy = inputs[15:] or (None,) * 3
    ctx.save_for_backward(q, k, v, *output, key_bias, block_gate, *proxy, *selection)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, key_bias, block_gate, proxy_keys, proxy_values, proxy_bias, *selection = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 18
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_lse is not None:  # that of a row without keys may be anything, as of exp, a square or a difference of -inf: its gradients are 0
        grad_lse = grad_lse.masked_fill(lse == float("-inf"), 0.0)
    dq, dk, dv, dbias, dgate, *dproxy = backward_op(grad_out, grad_lse, q, k, v, out, lse, key_bias, block_gate, *selection, ctx.q_max,
                                                    ctx.kv_max, ctx.scale, ctx.impl, proxy_keys, proxy_values, proxy_bias)  # fmt: skip
    dproxy = dproxy if proxy_keys is not None else (None,) * 3
    return (dq, dk, dv, None if key_bias is None else dbias, None if block_gate is None else dgate, *(None,) * 10, *dproxy)


forward_op.register_autograd(_backward, setup_context=_setup_context)


def attend(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, key_bias: Tensor | None,
           block_gate: Tensor | None, scale: float, impl: str, proxy: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op with a BlockSelection taken apart. proxy: keys, values and log sizes (B, H, N)."""
    return forward_op(q, k, v, key_bias, block_gate, *selection.tensors(), selection.q_max, selection.kv_max, scale, impl,
                      *(proxy or (None,) * 3))  # fmt: skip


@custom_op("block_sparse_attention_low_precision")
def low_precision_op(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, block_gate: Tensor | None, kv_num_blocks: Tensor,
    kv_indices: Tensor, q_starts: Tensor, q_sizes: Tensor, kv_starts: Tensor, kv_sizes: Tensor, q_max: int,
    kv_max: int, scale: float, impl: str, qk_dtype: torch.dtype, pv_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A forward with rounded products; it has no backward."""
    selection = (kv_num_blocks, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes)
    inputs = (q, k, v, selection, key_bias, block_gate, scale, q_max, kv_max)
    if impl == "cpu":
        return _implementation(impl).forward(*inputs, qk_dtype=qk_dtype)
    return _implementation(impl).forward_low_precision(*inputs, qk_dtype, pv_dtype)


@low_precision_op.register_fake
def _(q, k, v, *rest):
    return _forward_fake(q)


def attend_low_precision(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, key_bias: Tensor | None, block_gate: Tensor | None,
                         scale: float, impl: str, qk_dtype: torch.dtype, pv_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend` with rounded products, without gradients."""
    return low_precision_op(q, k, v, key_bias, block_gate, *selection.tensors(), selection.q_max, selection.kv_max, scale, impl, qk_dtype, pv_dtype)
