"""Mean of every block of tokens.

    out[b, h, m] = 1 / sizes[m] * sum of x[b, h, s] over starts[m] <= s < starts[m] + sizes[m],   0 for an empty block

These are the coarse queries, keys and values of VSA (https://arxiv.org/abs/2505.13389). Partial blocks are divided by
their real size. Limits: blocks must not overlap (as in `BlockSelection`), they need not cover the sequence; the layout
is shared by batch and heads; differentiable once in x.
"""

from torch import Tensor

from .._checks import check_blocks, check_shape, looks_at_values, require
from .._impl import check_float, check_integer, custom_op, require_triton, resolve
from . import cpu, reference

__all__ = ["block_pool"]


def block_pool(x: Tensor, starts: Tensor, sizes: Tensor, impl: str = "auto", debug: bool = False) -> Tensor:
    """Mean over the tokens of each block, summed in float32 (float64 for float64 input).

    Args:
        x: (B, H, S, D) floating.
        starts, sizes: (M,) int32 or int64, first token and number of tokens of each block; a size may be 0. Blocks lie
            inside 0..S and do not overlap (overlaps are not looked for).
        impl: auto | reference | cpu | triton.
        debug: check the values on a GPU too, by a device-side assertion; on a CPU they are always checked.

    Returns:
        (B, H, M, D) in x's dtype.

    Raises:
        ValueError: wrong shape, dtype, device, block or impl.
    """
    check_float("x", x, 4, "(B, H, S, D)")
    require(starts.dim() == 1, "starts", f"shape {tuple(starts.shape)}", "(M,)")
    check_shape("sizes", sizes, tuple(starts.shape), "(M,) of starts")
    check_integer("starts", starts, x.device)
    check_integer("sizes", sizes, x.device)
    impl = resolve("block_pool", impl, x, ("reference", "cpu", "triton"))
    if impl != "cpu" and looks_at_values(starts, debug):  # the CPU's looks at them anyway
        check_blocks("sizes", starts, sizes, x.shape[2])
    if impl == "reference":
        return reference.block_pool(x, starts, sizes)
    return _forward(x, starts, sizes, impl)


@custom_op("block_pool")
def _forward(x: Tensor, starts: Tensor, sizes: Tensor, impl: str) -> Tensor:
    if impl == "cpu":
        return cpu.forward(x, starts, sizes)
    require_triton(x)
    from . import triton as backend

    return backend.forward(x, starts, sizes)


@custom_op("block_pool_backward")
def _backward(grad: Tensor, starts: Tensor, sizes: Tensor, length: int, impl: str) -> Tensor:
    if impl == "cpu":
        return cpu.backward(grad, starts, sizes, length)
    require_triton(grad)
    from . import triton as backend

    return backend.backward(grad, starts, sizes, length)


@_forward.register_fake
def _(x, starts, sizes, impl):
    return x.new_empty(x.shape[0], x.shape[1], starts.shape[0], x.shape[3])


@_backward.register_fake
def _(grad, starts, sizes, length, impl):
    return grad.new_empty(grad.shape[0], grad.shape[1], length, grad.shape[3])


def _setup(ctx, inputs, output):
    x, starts, sizes, ctx.impl = inputs
    ctx.length = x.shape[2]
    ctx.save_for_backward(starts, sizes)


def _grad(ctx, grad):
    return _backward(grad, *ctx.saved_tensors, ctx.length, ctx.impl), None, None, None


_forward.register_autograd(_grad, setup_context=_setup)
