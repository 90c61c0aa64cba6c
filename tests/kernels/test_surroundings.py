"""What stands around an operator's call, autocast, fake tensors, a loss of the empty rows' lse, changes no value."""

import pytest
import torch
from companion_checks import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from usv_kernels import BlockProxy, BlockSelection, block_pool, block_proxy, block_sparse_attention, kmeans, norm_rope
from usv_kernels.token_merge import MergeLayout, match

SIZES = torch.tensor([16, 16, 5])


def attention(grad: bool):
    """Output, lse and all gradients of a call with proxies, q and k ×4."""
    generator = torch.Generator().manual_seed(0)
    selection = BlockSelection.from_mask(torch.rand(1, 2, 3, 3, generator=generator) > 0.3, SIZES, SIZES)
    q, k, v = (4 * torch.randn(1, 2, 37, 64, generator=generator) for _ in range(3))
    leaves = [x.detach().requires_grad_(grad) for x in (q, k, v, *block_proxy(k, v, selection))]

    def call(impl):
        out, lse = block_sparse_attention(*leaves[:3], selection, impl=impl, proxy=BlockProxy(*leaves[3:]))
        return (out, lse, *(torch.autograd.grad(out.square().sum() + lse.sum(), leaves) if grad else ()))

    return call


def clusters(impl):
    return (kmeans(torch.randn(1, 2, 800, 64, generator=torch.Generator().manual_seed(0)) + 3, 50, 5, impl=impl).assignment,)


def matched(impl):
    layout = MergeLayout.build([[4 * i + j for j in range(4)] for i in range(16)], [64] * 4, 16)
    return (match(torch.randn(1, 256, 96, generator=torch.Generator().manual_seed(0)) + 2, layout, impl=impl).token_slot,)


def turned(impl):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 40, 64, generator=generator).requires_grad_(), torch.rand(64, generator=generator).requires_grad_()
    angle = torch.rand(40, 8, generator=generator).repeat_interleave(2, 1)
    out = norm_rope(x, weight, 1e-6, angle.cos(), angle.sin(), impl=impl)
    return (out, *torch.autograd.grad(out.square().sum() + out.sum(), [x, weight]))


@pytest.mark.parametrize(
    "call, impl",
    [(attention(True), "cpu"), (attention(False), "reference"), (clusters, "cpu"), (matched, "cpu"), (turned, "cpu")],
    ids=["attention", "reference", "kmeans", "match", "norm_rope"],
)
def test_autocast_stays_outside(call, impl):
    """Operators say that they add up in fp32; products of fp32 inside them would be of bf16, which is how runs train on a CPU."""
    plain = call(impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        surrounded = call(impl)
    for a, b in zip(plain, surrounded):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.parametrize(
    "impl, dtype, size, grad",
    [("cpu", torch.float16, 70_000, 1000.0), *((impl, *case) for impl in ("cpu", "triton") for case in ((torch.float16, 2049, 1000.0), (torch.bfloat16, 257, 1.0)))],
)
def test_a_mean_divides_by_its_size_and_not_by_one_rounded(impl, dtype, size, grad):
    x = torch.zeros(1, 1, size + 3, 2, dtype=dtype, device=DEVICE, requires_grad=True)
    out = block_pool(x, torch.tensor([0, size], device=DEVICE), torch.tensor([size, 3], device=DEVICE), impl=impl)
    out.backward(torch.full_like(out, grad))
    assert (x.grad[0, 0, :size] == torch.tensor(grad / size).to(dtype).to(DEVICE)).all()


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_row_without_keys_has_no_gradient_whatever_its_lse_is_used_for(impl):
    sizes = torch.tensor([16, 16], device=DEVICE)
    selection = BlockSelection.from_mask(torch.eye(2, dtype=torch.bool, device=DEVICE).expand(1, 1, 2, 2), sizes, sizes)
    bias = torch.zeros(1, 1, 32, device=DEVICE)
    bias[..., :16] = float("-inf")
    losses = {
        "square": lambda out, lse: out.sum() + torch.where(lse.isinf(), 0, lse**2).sum(),
        "logaddexp": lambda out, lse: out.sum() + torch.logaddexp(lse, lse.detach()).nan_to_num(neginf=0).sum(),
    }
    for name, loss in losses.items():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, 32, 32, generator=generator).to(DEVICE).requires_grad_() for _ in range(3))
        loss(*block_sparse_attention(q, k, v, selection, key_bias=bias, impl=impl)).backward()
        for x in (q, k, v):
            assert torch.isfinite(x.grad).all() and not x.grad[:, :, :16].any() and x.grad[:, :, 16:].any(), name


def test_empty_lists_beside_lists_of_empty_blocks():
    q_sizes, kv_sizes = torch.tensor([7, 9, 5]), torch.tensor([0, 8, 13])
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 0] = mask[0, 0, 2, 1] = True
    selection = BlockSelection.from_mask(mask, q_sizes, kv_sizes)
    q, k, v = (torch.randn(1, 1, 21, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    reference, cpu = (block_sparse_attention(q, k, v, selection, impl=impl, proxy=block_proxy(k, v, selection)) for impl in ("reference", "cpu"))
    torch.testing.assert_close(cpu, reference, rtol=1e-5, atol=1e-5)


def test_a_selection_of_tensors_without_values():
    with FakeTensorMode():
        sizes = torch.full((4,), 16)
        selection = BlockSelection.from_mask(torch.ones(1, 2, 4, 4, dtype=torch.bool), sizes, sizes)
        assert selection.kv_max == 0, "no bound is known"
