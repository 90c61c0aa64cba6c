"""block_pool: forward and gradient against float64, ragged and empty blocks, containment, registration, refusals."""

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
    ragged_layout,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from usv_kernels import block_pool
from usv_kernels.block_pool import _backward, _forward

__all__ = ["poisoned"]
LAYOUTS = {"uniform": ([8] * 4, 0), "partial": ([8] * 3 + [3], 0), "ragged": ([5, 0, 33, 1, 7], 0), "gaps": ([4, 0, 9], 2), "one": ([37], 0)}


def eager(x, starts, sizes):
    """The mean of every slice in x's own dtype."""
    blocks = []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        rows = x[:, :, start : start + size]
        blocks.append(rows.mean(2) if size else rows.sum(2))
    return torch.stack(blocks, 2)


def check(impl, device, dtype, scale, sizes, gap, dim=32, batch=2, heads=3):
    starts, sizes, length = ragged_layout(sizes, device, gap)
    x = (torch.randn(batch, heads, length, dim, device=device) * scale).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    out, low, exact = block_pool(x, starts, sizes, impl=impl), eager(x, starts, sizes), eager(exact_x, starts, sizes)
    assert_as_good_as_eager("out", out, low, exact)
    grad = torch.randn_like(exact).to(dtype)
    assert_as_good_as_eager(
        "grad_x", gradients(out, x, grad)[0], gradients(low, x, grad)[0], gradients(exact, exact_x, grad)[0]
    )


@pytest.mark.parametrize(("impl", "device"), [*IMPLS, pytest.param("reference", DEVICE, id="reference")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, device, dtype, layout, poisoned):
    torch.manual_seed(0)
    check(impl, device, dtype, 1.0, *LAYOUTS[layout])


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_scales_and_widths(impl, device, scale, dim):
    torch.manual_seed(1)
    check(impl, device, torch.bfloat16, scale, [16, 3, 16], 0, dim)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), gap=st.integers(0, 3), dim=st.integers(1, 40))
def test_random_layouts(impl, device, sizes, gap, dim):
    if sum(sizes) + gap:
        check(impl, device, torch.float32, 1.0, sizes, gap, dim, batch=1, heads=2)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("sizes", [[8, 8, 0], [8, 8, 8], [8, 8, 3]])
def test_equal_tiles_in_another_order_or_with_an_empty_one(impl, device, sizes):
    starts, sizes, length = ragged_layout(sizes, device)
    x = torch.randn(1, 2, length, 16, device=device)
    for turn in (lambda t: t, lambda t: t.flip(0), lambda t: t.roll(1, 0)):
        out = block_pool(x, turn(starts), turn(sizes), impl=impl)
        torch.testing.assert_close(out, eager(x, turn(starts), turn(sizes)))


def test_reference_gradient_in_float64():
    starts, sizes, length = ragged_layout([3, 0, 4], "cpu", 1)
    x = torch.randn(1, 2, length, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block_pool(x, starts, sizes, impl="reference"), x)
    assert torch.autograd.gradcheck(lambda x: block_pool(x, starts, sizes, impl="cpu"), x)


@pytest.mark.parametrize(("impl", "device"), [*IMPLS, pytest.param("reference", DEVICE, id="reference")])
def test_nan_stays_in_its_block(impl, device):
    starts, sizes, length = ragged_layout([4, 5, 4], device, 1)
    x = torch.randn(1, 1, length, 16, device=device)
    clean = block_pool(x, starts, sizes, impl=impl)
    x[:, :, 0] = x[:, :, 5] = float("nan")  # token 5 lies between the first two blocks
    assert torch.equal(block_pool(x, starts, sizes, impl=impl), clean)
    x[:, :, 7] = float("nan")
    out = block_pool(x, starts, sizes, impl=impl)
    assert out[:, :, 1].isnan().all() and torch.equal(out[:, :, [0, 2]], clean[:, :, [0, 2]])


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("last", [8, 5])
def test_tiles_within_a_longer_sequence(impl, device, last):
    """Tokens before and after equal tiles are in no block: not in a mean, and without gradient."""
    starts = torch.tensor([3, 11, 19], device=device)
    sizes = torch.tensor([8, 8, last], device=device)
    x = torch.randn(1, 2, 31, 16, device=device, requires_grad=True)
    out, expected = block_pool(x, starts, sizes, impl=impl), eager(x, starts, sizes)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(gradients(y, x, grad)[0] for y in (out, expected)))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_order_strides_and_repetition(impl, device):
    """Blocks in any order, a transposed view, and bit-equal runs."""
    starts, sizes, length = ragged_layout([8, 6, 8], device)
    starts, sizes = starts.flip(0), sizes.flip(0)
    x = torch.randn(2, length, 3, 24, device=device).transpose(1, 2)
    out = block_pool(x, starts.long(), sizes.long(), impl=impl)
    assert torch.equal(out, block_pool(x.contiguous(), starts, sizes, impl=impl))
    torch.testing.assert_close(out, eager(x, starts, sizes))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration(impl, device):
    starts, sizes, length = ragged_layout([4, 0, 5], device, 1)
    x = torch.randn(1, 2, length, 8, device=device, requires_grad=True)
    torch.library.opcheck(_forward, (x, starts, sizes, impl))
    torch.library.opcheck(_backward, (torch.randn(1, 2, 3, 8, device=device), starts, sizes, length, impl))
    assert_compiles(lambda x: block_pool(x, starts, sizes, impl=impl), x)


def test_refusals():
    x, starts = torch.randn(1, 1, 8, 4), torch.tensor([0, 4])
    sizes = torch.tensor([4, 4])
    for bad, name in (
        ((x[0], starts, sizes), "x"), ((x.int(), starts, sizes), "x"), ((x, starts[None], sizes), "starts"),
        ((x, starts, sizes[:1]), "sizes"), ((x, starts.float(), sizes), "starts"), ((x, starts, sizes, "gpu"), "impl"),
        ((x, starts + 1, sizes), "sizes"), ((x, starts - 1, sizes), "sizes"), ((x, starts, -sizes), "sizes"),
        ((x.double(), starts, sizes, "triton"), "impl"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            block_pool(*bad)
