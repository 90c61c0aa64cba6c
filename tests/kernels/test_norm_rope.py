"""norm_rope: against float64 and against diffusers' own Wan attention; every gradient, gathered positions, refusals."""

import pytest
import torch
from companion_checks import (
    DEVICE,
    DTYPES,
    IMPLS,
    SCALES,
    assert_as_good_as_eager,
    assert_compiles,
    gradients,
    poisoned,
)  # fmt: skip
from diffusers.models.transformers import transformer_wan
from hypothesis import given, settings
from hypothesis import strategies as st
from usv_kernels import norm_rope
from usv_kernels.norm_rope import _backward, _forward

__all__ = ["poisoned"]
ALL = [*IMPLS, pytest.param("reference", DEVICE, id="reference")]
EPS = 1e-6


def tables(rows, dim, device):
    """Doubled tables like Wan's, of random angles."""
    angle = torch.rand(rows, dim // 2, device=device).mul(6.28).repeat_interleave(2, dim=1)
    return angle.cos().view(1, rows, 1, dim), angle.sin().view(1, rows, 1, dim)


def eager(x, weight, eps, cos, sin, positions):
    """The formula step by step in x's own dtype."""
    dtype, dim = x.dtype, cos.shape[-1]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    x = x.unflatten(2, (-1, dim)).transpose(1, 2)
    rows = slice(None) if positions is None else positions.long()
    cos, sin = (t.reshape(-1, dim)[rows].to(dtype) for t in (cos, sin))
    if positions is not None:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + swapped * sin


def check(impl, device, dtype, scale, heads, dim, length, gathered, batch=2, weight_dtype=None):
    x = (torch.randn(batch, length, heads * dim, device=device) * scale).to(dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(heads * dim, device=device)).to(weight_dtype or dtype).requires_grad_()
    cos, sin = tables(length + 3 if gathered else length, dim, device)
    positions = torch.randint(0, length + 3, (batch, length), device=device) if gathered else None
    exact_in = [t.detach().double().requires_grad_() for t in (x, weight)]
    out = norm_rope(x, weight, EPS, cos, sin, positions, impl=impl)
    low = eager(x, weight, EPS, cos, sin, positions)
    exact = eager(*exact_in, EPS, cos.double(), sin.double(), positions)
    assert out.shape == (batch, heads, length, dim)
    assert_as_good_as_eager("out", out, low, exact)
    grad = torch.randn_like(exact).to(dtype)
    found = zip(
        ("x", "weight"), gradients(out, (x, weight), grad), gradients(low, (x, weight), grad),
        gradients(exact, exact_in, grad), strict=True,
    )  # fmt: skip
    for name, *values in found:
        assert_as_good_as_eager(f"gradient of {name}", *values)


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gathered", [False, True])
def test_forward_and_gradients(impl, device, dtype, scale, gathered, poisoned):
    torch.manual_seed(0)
    check(impl, device, dtype, scale, 3, 32, 9, gathered)


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (3, 128), (1, 2)])
def test_widths(impl, device, heads, dim):
    torch.manual_seed(1)
    check(impl, device, torch.bfloat16, 1.0, heads, dim, 5, False, weight_dtype=torch.float32)


@pytest.mark.parametrize(("impl", "device"), ALL)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(heads=st.integers(1, 3), pairs=st.integers(1, 20), length=st.integers(1, 12), gathered=st.booleans())
def test_random_shapes(impl, device, heads, pairs, length, gathered):
    check(impl, device, torch.float32, 1.0, heads, 2 * pairs, length, gathered, batch=1)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_equals_diffusers(impl, device, monkeypatch):
    """The q and k that diffusers' Wan attention hands to its kernel, from the same weights and its own tables."""
    torch.manual_seed(2)
    heads, dim = 2, 32
    processor = transformer_wan.WanAttnProcessor()
    attention = transformer_wan.WanAttention(heads * dim, heads, dim, eps=EPS, processor=processor).to(device)
    torch.nn.init.normal_(attention.norm_q.weight, 1.0, 0.2)
    torch.nn.init.normal_(attention.norm_k.weight, 1.0, 0.2)
    rope = transformer_wan.WanRotaryPosEmbed(dim, (1, 2, 2), 64).to(device)(torch.zeros(1, 16, 2, 8, 6, device=device))
    seen = []

    def record(query, key, value, **_):
        seen.extend((query, key))
        return torch.zeros_like(query)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", record)
    hidden = torch.randn(2, 24, heads * dim, device=device)
    attention(hidden, rotary_emb=rope)
    for theirs, project, norm in zip(
        seen, (attention.to_q, attention.to_k), (attention.norm_q, attention.norm_k), strict=True
    ):
        x = project(hidden)
        ours = norm_rope(x, norm.weight, norm.eps, *rope, impl=impl)
        exact = eager(x.double(), norm.weight.double(), norm.eps, *(t.double() for t in rope), None)
        assert_as_good_as_eager("against diffusers", ours, theirs.transpose(1, 2), exact)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_views_and_repetition(impl, device):
    """A slice of a fused projection, a table given as (T, D), int32 positions, bit-equal runs."""
    fused = torch.randn(2, 7, 3 * 64, device=device)
    x, weight = fused[..., 64:128], torch.randn(64, device=device)
    cos, sin = tables(7, 32, device)
    out = norm_rope(x, weight, EPS, cos, sin, impl=impl)
    positions = torch.arange(7, device=device, dtype=torch.int32).expand(2, 7)
    assert torch.equal(out, norm_rope(x.contiguous(), weight, EPS, cos[0, :, 0], sin[0, :, 0], positions, impl=impl))


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_any_strides(impl, device):
    """Channels that do not lie side by side, and tables of different strides."""
    torch.manual_seed(3)
    x = torch.randn(2, 64, 7, device=device).transpose(1, 2).requires_grad_()
    weight = torch.randn(64, device=device, requires_grad=True)
    cos, sin = tables(7, 32, device)
    sin = sin[0, :, 0].t().contiguous().t()[None, :, None]
    plain = [t.detach().contiguous().requires_grad_() for t in (x, weight)]
    out, expected = (norm_rope(*pair, EPS, cos, s, impl=impl) for pair, s in (((x, weight), sin), (plain, sin.contiguous())))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(gradients(out, (x, weight), grad), gradients(expected, plain, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_more_tokens_than_programs(monkeypatch):
    """The Triton backward's programs take several tokens each, and their partial sums are added in the same order every time."""
    from usv_kernels.norm_rope import triton as backend

    torch.manual_seed(4)
    monkeypatch.setattr(backend, "PROGRAMS", 4)
    check("triton", DEVICE, torch.float32, 1.0, 2, 32, 9, True)
    x, weight = torch.randn(2, 9, 64, device=DEVICE, requires_grad=True), torch.randn(64, device=DEVICE, requires_grad=True)
    freqs, grad = tables(9, 32, DEVICE), torch.randn(2, 2, 9, 32, device=DEVICE)
    runs = [gradients(norm_rope(x, weight, EPS, *freqs, impl="triton"), (x, weight), grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_gradcheck():
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in tables(3, 4, "cpu"))
    for impl in ("reference", "cpu"):
        assert torch.autograd.gradcheck(lambda x, w, impl=impl: norm_rope(x, w, EPS, cos, sin, impl=impl), (x, weight))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration(impl, device):
    x = torch.randn(1, 4, 32, device=device, requires_grad=True)
    weight = torch.randn(32, device=device, requires_grad=True)
    cos, sin = tables(4, 16, device)
    halves = cos[0, :, 0, ::2], sin[0, :, 0, ::2]
    positions = torch.arange(4, device=device)[None]
    torch.library.opcheck(_forward, (x, weight, EPS, *halves, None, impl))
    torch.library.opcheck(_forward, (x, weight, EPS, *halves, positions, impl))
    plain = (x.detach(), weight.detach(), *halves, positions, torch.ones(1, 4, device=device), impl)
    torch.library.opcheck(_backward, (torch.randn(1, 2, 4, 16, device=device), *plain))
    assert_compiles(lambda x, w: norm_rope(x, w, EPS, cos, sin, impl=impl), x, weight)


def test_refusals():
    x, weight = torch.randn(2, 5, 32), torch.ones(32)
    cos, sin = tables(5, 16, "cpu")
    for bad, name in (
        ((x[0], weight, EPS, cos, sin), "x"),
        ((x.int(), weight, EPS, cos, sin), "x"),
        ((x, weight[:16], EPS, cos, sin), "weight"),
        ((x, weight.int(), EPS, cos, sin), "weight"),
        ((x, weight.to("meta"), EPS, cos, sin), "weight"),
        ((x, weight, EPS, cos[:, :4], sin[:, :4]), "freqs_cos"),
        ((x, weight, EPS, cos, sin[:, :4]), "freqs_sin"),
        ((x, weight, EPS, cos.expand(2, 5, 1, 16), sin), "freqs_cos"),
        ((x, weight, EPS, *tables(5, 24, "cpu")), "freqs_cos"),
        ((x, weight, EPS, cos, sin, torch.zeros(2, 4).long()), "positions"),
        ((x, weight, EPS, cos, sin, torch.zeros(2, 5)), "positions"),
        ((x, weight, EPS, cos, sin, torch.full((2, 5), 5)), "positions"),
        ((x, weight, EPS, cos, sin, torch.full((2, 5), -1)), "positions"),
        ((x, weight, EPS, cos, sin, None, "fast"), "impl"),
        ((torch.ones(1, 5, 16400), torch.ones(16400), EPS, cos, sin, None, "triton"), "x"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            norm_rope(*bad)
