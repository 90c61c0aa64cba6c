"""RMSNorm across all heads followed by interleaved RoPE, in one pass, from projected tokens to attention layout.

    y = x / sqrt(mean(x^2) + eps) * weight                                   mean over all H * D channels
    out[2i]     = y[2i] cos[i] - y[2i+1] sin[i]                              per head, i < D / 2
    out[2i + 1] = y[2i] sin[i] + y[2i+1] cos[i]

This is what Wan's attention does to q and k (`WanAttnProcessor` of diffusers 0.42.1), with one rounding at the end
instead of one per step. Gradients in x and weight, not in the tables. Limits: Triton holds a token in registers, H * D
<= 16384.
"""

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, check_range, check_shape, require
from .._impl import accumulator, check_float, check_integer, custom_op, require_triton, resolve
from . import cpu, reference

__all__ = ["norm_rope"]


def norm_rope(
    x: Tensor,
    weight: Tensor,
    eps: float,
    freqs_cos: Tensor,
    freqs_sin: Tensor,
    positions: Tensor | None = None,
    impl: str = "auto",
    debug: bool = False,
) -> Tensor:
    """Normalises and rotates projected queries or keys.

    Args:
        x: (B, S, H * D) floating, channels of one head together.
        weight: (H * D,) floating, the norm's weight.
        eps: added to the mean square.
        freqs_cos, freqs_sin: (1, T, 1, D) as `WanRotaryPosEmbed` returns them, or (T, D): every angle stands twice in a
            row.
        positions: (B, S) int32 or int64 in 0..T-1, the table row of every token, e.g. after merging.
            Default: token s uses row s, and T must equal S.
        impl: auto | reference | cpu | triton.
        debug: check positions on a GPU too, by a device-side assertion; on a CPU they are always checked.

    Returns:
        (B, H, S, D) in x's dtype.

    Raises:
        ValueError: wrong shape, dtype, device, position or impl.
    """
    check_float("x", x, 3, "(B, S, H * D)")
    batch, length, channels = x.shape
    check_shape("weight", weight, (channels,), "(H * D,) of x")
    require(weight.dtype in FLOAT_DTYPES, "weight", weight.dtype, "a floating dtype")
    require(weight.device == x.device, "weight", f"device {weight.device}", f"{x.device}")
    cos, sin = _table("freqs_cos", freqs_cos, x), _table("freqs_sin", freqs_sin, x)
    check_shape("freqs_sin", sin, tuple(cos.shape), "the shape of freqs_cos")
    dim = cos.shape[1]
    require(
        dim % 2 == 0 and channels % dim == 0, "freqs_cos", lambda: f"D = {dim}", lambda: f"an even divisor of x's {channels} channels"
    )
    if positions is None:
        require(cos.shape[0] == length, "freqs_cos", lambda: f"{cos.shape[0]} rows", lambda: f"{length}, x's tokens, or give positions")
    else:
        check_shape("positions", positions, (batch, length), "(B, S) of x")
        check_integer("positions", positions, x.device)
        check_range("positions", positions, cos.shape[0], "T", debug)
    limit = (channels <= 16384, "x", lambda: f"{channels} channels", "at most 16384 for impl='triton'")
    impl = resolve("norm_rope", impl, x, ("reference", "cpu", "triton"), limit)
    # Of the doubled table only one copy of every angle is needed; diffusers reads the same columns.
    cos, sin = cos[:, 0::2].detach(), sin[:, 1::2].detach()
    if impl == "reference":
        rows = torch.arange(length, device=x.device).expand(batch, length) if positions is None else positions
        return reference.norm_rope(x, weight, eps, cos, sin, rows)
    return _forward(x, weight, float(eps), cos, sin, positions, impl)[0]


def _table(name: str, freqs: Tensor, x: Tensor) -> Tensor:
    shaped = freqs.dim() == 2 or (freqs.dim() == 4 and freqs.shape[0] == 1 and freqs.shape[2] == 1)
    require(shaped, name, f"shape {tuple(freqs.shape)}", "(1, T, 1, D) or (T, D)")
    require(freqs.dtype in FLOAT_DTYPES, name, freqs.dtype, "a floating dtype")
    require(freqs.device == x.device, name, f"device {freqs.device}", f"{x.device}")
    return freqs if freqs.dim() == 2 else freqs[0, :, 0]


def _backend(impl: str, x: Tensor):
    if impl == "cpu":
        return cpu
    require_triton(x)
    from . import triton as backend

    return backend


@custom_op("norm_rope")
def _forward(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    return _backend(impl, x).forward(x, weight, eps, cos, sin, positions)


@custom_op("norm_rope_backward")
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rstd: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    return _backend(impl, x).backward(grad, x, weight, cos, sin, positions, rstd)


@_forward.register_fake
def _(x, weight, eps, cos, sin, positions, impl):
    batch, length, channels = x.shape
    dim = 2 * cos.shape[1]
    out = x.new_empty(batch, channels // dim, length, dim)
    return out, x.new_empty(batch, length, dtype=accumulator(x.dtype))


@_backward.register_fake
def _(grad, x, weight, cos, sin, positions, rstd, impl):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, weight, _, cos, sin, positions, ctx.impl = inputs
    ctx.save_for_backward(x, weight, cos, sin, positions, output[1])
    ctx.mark_non_differentiable(output[1])


def _grad(ctx, grad, _):
    grad_x, grad_weight = _backward(grad, *ctx.saved_tensors, ctx.impl)
    return grad_x, grad_weight, None, None, None, None, None


_forward.register_autograd(_grad, setup_context=_setup)
