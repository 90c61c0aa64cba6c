"""Token permutation per batch and head, its inverse, and its gradient.

    out[b, h, i] = x[b, h, index[b, h, i]],        permute(permute(x, index), inverse_permutation(index)) = x

SVG2 (https://arxiv.org/abs/2505.18875) makes clusters contiguous with it, SVG (https://arxiv.org/abs/2502.01776) turns
frame-major into token-major order. The gradient is the inverse permutation: a gather, with no scatter and no atomics.
Limits: that a row of index names no token twice is checked only with debug=True (it costs a sort); differentiable in x.
"""

import torch
from torch import Tensor

from .._checks import check_range, looks_at_values, require, require_each
from .._impl import check_float, check_integer, custom_op, require_triton, resolve
from . import cpu, reference

__all__ = ["inverse_permutation", "permute"]


def inverse_permutation(index: Tensor) -> Tensor:
    """The permutation that undoes `index`: (..., S) integers -> same shape and dtype.

    Where a row names a token twice, which is no permutation, the result is none either, but inside 0..S-1.
    """
    check_integer("index", index, index.device)
    require(index.dim() >= 1, "index", "a scalar", "(..., S)")
    position = torch.arange(index.shape[-1], device=index.device, dtype=index.dtype)
    return torch.zeros_like(index).scatter_(-1, index.long(), position.expand(index.shape))


def permute(x: Tensor, index: Tensor, impl: str = "auto", debug: bool = False) -> Tensor:
    """Rows of x in the order of index.

    Args:
        x: (B, H, S, D) floating, any strides.
        index: (S,) shared, or (B, H, S), int32 or int64, values in 0..S-1.
        impl: auto | reference | cpu | triton.
        debug: check on any device that a row names every token once, and the values on a GPU too, by device-side assertions; on
            a CPU the values are always checked.

    Returns:
        (B, H, S, D), contiguous.

    Raises:
        ValueError: wrong shape, dtype, device, index or impl.
    """
    check_float("x", x, 4, "(B, H, S, D)")
    check_integer("index", index, x.device)
    shapes = ((x.shape[2],), tuple(x.shape[:3]))
    require(tuple(index.shape) in shapes, "index", f"shape {tuple(index.shape)}", f"(S,) or (B, H, S): {shapes}")
    impl = resolve("permute", impl, x, ("reference", "cpu", "triton"))
    if impl != "cpu":  # the CPU's finds them anyway
        check_range("index", index, x.shape[2], "S", debug)
    if debug and looks_at_values(index, debug):
        ordered = index.sort(-1).values
        require_each("index", ordered, ordered == torch.arange(x.shape[2], device=index.device), "every token once in a row")
    index = index.expand(x.shape[:3])
    if impl == "reference":
        return reference.permute(x, index)
    return _permute(x, index, impl)


@custom_op("permute")
def _permute(x: Tensor, index: Tensor, impl: str) -> Tensor:
    if impl == "cpu":
        return cpu.permute(x, index)
    require_triton(x)
    from . import triton as backend

    return backend.permute(x, index)


@_permute.register_fake
def _(x, index, impl):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, index, ctx.impl = inputs
    ctx.save_for_backward(index)


def _grad(ctx, grad):
    (index,) = ctx.saved_tensors
    return _permute(grad, inverse_permutation(index.contiguous()), ctx.impl), None, None


_permute.register_autograd(_grad, setup_context=_setup)
