"""Token permutation per batch and head, its inverse, and its gradient.

    out[b, h, i] = x[b, h, index[b, h, i]],        permute(permute(x, index), inverse_permutation(index)) = x

SVG2 (https://arxiv.org/abs/2505.18875) makes clusters contiguous with it, SVG (https://arxiv.org/abs/2502.01776) turns
frame-major into token-major order. The gradient is the inverse permutation: a gather, with no scatter and no atomics.
Limits: that a row of index names no token twice is not checked (it would cost a sort); differentiable in x.
"""

import torch
from torch import Tensor

from .._checks import check_range, require
from .._impl import check_float, check_integer, require_triton, resolve
from . import cpu, reference

__all__ = ["inverse_permutation", "permute"]


def inverse_permutation(index: Tensor) -> Tensor:
    """The permutation that undoes `index`: (..., S) integers -> same shape and dtype."""
    check_integer("index", index, index.device)
    require(index.dim() >= 1, "index", "a scalar", "(..., S)")
    position = torch.arange(index.shape[-1], device=index.device, dtype=index.dtype)
    return torch.empty_like(index).scatter_(-1, index.long(), position.expand(index.shape))


def permute(x: Tensor, index: Tensor, impl: str = "auto", debug: bool = False) -> Tensor:
    """Rows of x in the order of index.

    Args:
        x: (B, H, S, D) floating, any strides.
        index: (S,) shared, or (B, H, S), int32 or int64, values in 0..S-1.
        impl: auto | reference | cpu | triton.
        debug: check the values on a GPU too, by a device-side assertion; on a CPU they are always checked.

    Returns:
        (B, H, S, D), contiguous.

    Raises:
        ValueError: wrong shape, dtype, device, index or impl.
    """
    check_float("x", x, 4, "(B, H, S, D)")
    check_integer("index", index, x.device)
    shapes = ((x.shape[2],), tuple(x.shape[:3]))
    require(tuple(index.shape) in shapes, "index", f"shape {tuple(index.shape)}", f"(S,) or (B, H, S): {shapes}")
    check_range("index", index, x.shape[2], "S", debug)
    impl = resolve("permute", impl, x, ("reference", "cpu", "triton"))
    index = index.expand(x.shape[:3])
    if impl == "reference":
        return reference.permute(x, index)
    return _permute(x, index, impl)


@torch.library.custom_op("usv_kernels::permute", mutates_args=())
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
