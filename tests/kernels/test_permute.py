"""permute: exact rows and exact gradients for every implementation, any strides, registration, refusals."""

import pytest
import torch
from companion_checks import DEVICE, DTYPES, IMPLS, assert_compiles, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from usv_kernels import inverse_permutation, permute
from usv_kernels.permute import _permute

__all__ = ["poisoned"]
ALL = [*IMPLS, pytest.param("reference", DEVICE, id="reference")]


def random_index(batch, heads, length, device):
    return torch.rand(batch, heads, length, device=device).argsort(-1)


def by_hand(x, index):
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            row = index[b, h] if index.dim() == 3 else index
            out[b, h] = x[b, h][row.long()]
    return out


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_and_gradient(impl, device, dtype, shared, transposed, poisoned):
    torch.manual_seed(0)
    x = torch.randn(2, 45, 3, 24, device=device).to(dtype)
    x = (x.transpose(1, 2) if transposed else x.transpose(1, 2).contiguous()).requires_grad_()
    index = random_index(2, 3, 45, device).to(torch.int32)
    index = index[0, 0] if shared else index
    out = permute(x, index, impl=impl)
    assert out.is_contiguous() and torch.equal(out, by_hand(x, index))
    assert torch.equal(permute(out, inverse_permutation(index), impl=impl), x)
    grad = torch.randn_like(out)
    expected = by_hand(grad, inverse_permutation(index))
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], expected)


@pytest.mark.parametrize(("impl", "device"), ALL)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(batch=st.integers(1, 2), heads=st.integers(1, 3), length=st.integers(1, 70), dim=st.integers(1, 40))
def test_random_shapes(impl, device, batch, heads, length, dim):
    x = torch.randn(batch, heads, length, dim, device=device)
    index = random_index(batch, heads, length, device)
    assert torch.equal(permute(x, index, impl=impl), by_hand(x, index))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_long_rows_on_a_cpu(shared, dtype):
    """A head at a time: rows, gradient, and values outside, which the gather itself finds."""
    x = torch.randn(2, 2, 4096, 8, requires_grad=True)
    index = random_index(2, 2, 4096, "cpu").to(dtype)
    index = index[0, 0] if shared else index
    out = permute(x, index, impl="cpu")
    assert torch.equal(out, by_hand(x, index))
    assert torch.equal(torch.autograd.grad(out, x, out)[0], x)
    for outside in (-1, 4096):
        bad = index.clone()
        bad.view(-1, 4096)[-1, 7] = outside
        with pytest.raises(ValueError, match=rf"^index: got \[{outside}.*\], expected values in 0..4095"):
            permute(x, bad, impl="cpu")


def test_inverse():
    index = random_index(2, 3, 50, DEVICE)
    position = torch.arange(50, device=DEVICE).expand(2, 3, 50)
    assert torch.equal(index.gather(-1, inverse_permutation(index)), position)
    assert torch.equal(inverse_permutation(index).gather(-1, index), position)


def test_gradcheck():
    x = torch.randn(1, 2, 6, 3, dtype=torch.float64, requires_grad=True)
    index = random_index(1, 2, 6, "cpu")
    for impl in ("reference", "cpu"):
        assert torch.autograd.gradcheck(lambda x, impl=impl: permute(x, index, impl=impl), x)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_a_token_named_twice(impl, device):
    """No permutation: found in debug mode, and elsewhere at least no memory outside the row is read for its gradient."""
    x = torch.randn(1, 1, 6, 4, device=device, requires_grad=True)
    index = torch.tensor([0, 1, 1, 3, 4, 5], device=device)
    inverse = inverse_permutation(index)
    assert inverse.min() >= 0 and inverse.max() < 6
    grad = torch.autograd.grad(permute(x, index, impl=impl).sum(), x)[0]
    assert torch.isfinite(grad).all()
    if device == "cpu":
        with pytest.raises(ValueError, match="^index: got .*, expected every token once"):
            permute(x, index, impl=impl, debug=True)
    assert torch.equal(permute(x, index.new_tensor([5, 4, 3, 2, 1, 0]), impl=impl, debug=True), x.flip(2))


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (1, 2, 0, 4), (1, 2, 5, 0)])
def test_nothing_to_permute(impl, device, shape):
    x = torch.randn(shape, device=device)
    assert permute(x, torch.arange(shape[2], device=device), impl=impl).shape == shape


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration(impl, device):
    x = torch.randn(2, 2, 9, 8, device=device, requires_grad=True)
    index = random_index(2, 2, 9, device)
    torch.library.opcheck(_permute, (x, index, impl))
    assert_compiles(lambda x: permute(x, index, impl=impl), x)
    assert_compiles(lambda x: permute(x, index[0, 0], impl=impl), x)


def test_refusals():
    x, index = torch.randn(1, 2, 8, 4), torch.arange(8)
    for bad, name in (
        ((x[0], index), "x"), ((x, index[:7]), "index"), ((x, index.float()), "index"),
        ((x, index.expand(2, 8)), "index"),
        ((x, index + 1), "index"), ((x, index - 1), "index"),
        ((x, index, "flex"), "impl"), ((x.double(), index, "triton"), "impl"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            permute(*bad)
    with pytest.raises(ValueError, match="^index"):
        inverse_permutation(index.float())
