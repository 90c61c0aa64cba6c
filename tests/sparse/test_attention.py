"""usv/sparse/attention.py: full density is exact, the gate's and the coarse branch's gradients, statistics, recall."""

import math

import pytest
import torch
import torch.nn.functional as F
from usv_kernels import BlockSelection

from usv.sparse.attention import attention_recall, sparse_attention
from usv.sparse.grid import Tile, TokenGrid, tile_layout

B, H, D = 2, 3, 16
GRIDS = {"whole": (TokenGrid(4, 4, 4), Tile(2, 2, 2)), "partial": (TokenGrid(3, 5, 3), Tile(2, 2, 2))}


def inputs(kind, seed=0, dtype=torch.float64, scale=1.0):
    layout = tile_layout(*GRIDS[kind])
    g = torch.Generator().manual_seed(seed)
    size = (B, H, layout.grid.num_tokens, D)
    q, k, v = (scale * torch.randn(size, generator=g, dtype=dtype) for _ in range(3))
    return layout, q, k, v


def dense(q, k, v, bias=None):
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (logits if bias is None else logits + bias[:, :, None]).softmax(-1) @ v


def by_hand(q, k, v, layout, num_kept, gate=None, bias=None):
    """The module's equations with plain masks, one block mean at a time."""
    blocks = [slice(a, a + n) for a, n in zip(layout.starts.tolist(), layout.sizes.tolist())]
    q_c, k_c, v_c = (torch.stack([x[:, :, s].mean(2) for s in blocks], 2) for x in (q, k, v))
    scores = q_c @ k_c.transpose(-1, -2) / math.sqrt(q.shape[-1])
    chosen = scores.topk(num_kept, -1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    owner = torch.repeat_interleave(torch.arange(len(blocks)), layout.sizes.long())
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias[:, :, None]
    out = logits.masked_fill(~mask[:, :, owner][..., owner], float("-inf")).softmax(-1) @ v
    if gate is not None:
        out = out + gate * (scores.softmax(-1) @ v_c)[:, :, owner]
    return out, scores.softmax(-1), mask


@pytest.mark.parametrize("kind", GRIDS)
def test_full_density_is_dense_attention(kind):
    """fp32, against SDPA: both round, so the bound is twice SDPA's own error against fp64."""
    layout, q, k, v = inputs(kind, dtype=torch.float32, scale=4.0)
    out, _ = sparse_attention(q, k, v, layout.starts, layout.sizes, layout.num_blocks)
    exact = dense(q.double(), k.double(), v.double())
    eager = (F.scaled_dot_product_attention(q, k, v).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * eager + 1e-6
    gate = torch.zeros(B, H, q.shape[2], 1)
    gated, _ = sparse_attention(q, k, v, layout.starts, layout.sizes, layout.num_blocks, gate)
    assert torch.equal(gated, out)  # a zero gate adds zero


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("num_kept", [1, 3, 8])
@pytest.mark.parametrize("kind", GRIDS)
def test_equations(kind, num_kept, impl):
    """Output with gate and key bias, fp64."""
    layout, q, k, v = inputs(kind, seed=num_kept)
    g = torch.Generator().manual_seed(9)
    gate = torch.randn(B, H, q.shape[2], 1, generator=g, dtype=torch.float64)
    bias = torch.rand(B, 1, q.shape[2], generator=g, dtype=torch.float64)
    out, _ = sparse_attention(q, k, v, layout.starts, layout.sizes, num_kept, gate, bias, impl)
    torch.testing.assert_close(out, by_hand(q, k, v, layout, num_kept, gate, bias)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", GRIDS)
def test_gradients_of_everything(kind):
    """q, k, v and the gate, against autograd through the equations by hand; the coarse branch reaches q and k."""
    layout, *leaves = inputs(kind)
    gate = torch.full((B, H, leaves[0].shape[2], 1), 0.3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*leaves, gate)]
    weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    q, k, v, gate = leaves
    ours = torch.autograd.grad((sparse_attention(q, k, v, layout.starts, layout.sizes, 2, gate)[0] * weight).sum(), leaves)
    hand = torch.autograd.grad((by_hand(q, k, v, layout, 2, gate)[0] * weight).sum(), leaves)
    for name, a, b in zip("q k v gate".split(), ours, hand):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_zero_gate_has_a_gradient():
    """Training starts with the gate at zero; it must be able to leave it."""
    layout, q, k, v = inputs("whole")
    gate = torch.zeros(B, H, q.shape[2], 1, dtype=torch.float64, requires_grad=True)
    sparse_attention(q, k, v, layout.starts, layout.sizes, 2, gate)[0].sum().backward()
    assert (gate.grad.abs() > 0).all()


@pytest.mark.parametrize("num_kept", [1, 3, 8])
def test_statistics(num_kept):
    layout, q, k, v = inputs("whole", scale=2.0)
    _, coarse, mask = by_hand(q, k, v, layout, num_kept)
    _, stats = sparse_attention(q.requires_grad_(), k, v, layout.starts, layout.sizes, num_kept)
    entropy = -(coarse * coarse.log()).sum(-1).mean() / math.log(layout.num_blocks)
    assert float(stats.entropy) == pytest.approx(float(entropy), abs=1e-5)
    assert float(stats.coarse_recall) == pytest.approx(float((coarse * mask).sum(-1).mean()), abs=1e-5)
    assert float(stats.density) == num_kept / layout.num_blocks
    assert not any(getattr(stats, name).requires_grad for name in ("entropy", "coarse_recall", "density"))


def test_entropy_ends():
    """Equal blocks: uniform, 1. One block that every query points at: 0."""
    layout, q, k, v = inputs("whole")
    _, uniform = sparse_attention(torch.zeros_like(q), k, v, layout.starts, layout.sizes, 2)
    assert float(uniform.entropy) == pytest.approx(1.0, abs=1e-6)
    k = torch.zeros_like(k)
    k[:, :, :8] = 400.0  # the first block
    _, one = sparse_attention(torch.ones_like(q), k, v, layout.starts, layout.sizes, 1)
    assert float(one.entropy) == pytest.approx(0.0, abs=1e-6) and float(one.coarse_recall) == pytest.approx(1.0, abs=1e-6)
    single = tile_layout(TokenGrid(2, 2, 2), Tile(2, 2, 2))
    _, alone = sparse_attention(q[:, :, :8], k[:, :, :8], v[:, :, :8], single.starts, single.sizes, 1)
    assert float(alone.entropy) == 0.0


def test_attention_recall_of_all_rows_is_the_kept_mass():
    layout, q, k, v = inputs("partial", scale=2.0)
    _, _, mask = by_hand(q, k, v, layout, 3)
    selection = BlockSelection.from_mask(mask, layout.sizes, layout.sizes)
    owner = torch.repeat_interleave(torch.arange(layout.num_blocks), layout.sizes.long())
    probs = (q @ k.transpose(-1, -2) / math.sqrt(D)).softmax(-1)
    expected = float((probs * mask[:, :, owner][..., owner]).sum(-1).mean())
    assert float(attention_recall(q, k, selection, rows=q.shape[2])) == pytest.approx(expected, abs=1e-5)
    full = BlockSelection.from_mask(torch.ones_like(mask), layout.sizes, layout.sizes)
    assert float(attention_recall(q, k, full)) == pytest.approx(1.0, abs=1e-6)
