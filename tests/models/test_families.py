"""Every family (tests/models/family_cases.py): dense is diffusers', every block kept is dense, sparse and merged differ and train."""

import copy

import pytest
import torch
from family_cases import CASES

from usv.models.forward import Probe, SparseTransformer
from usv.sparse.grid import Tile, tile_layout
from usv.sparse.plan import LayerPlan, Rung

TILE = Tile(2, 2, 2)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.__name__)
def case(request):
    """The stock transformer, one that was made sparse, its keyword arguments, and the stock one's output."""
    torch.manual_seed(0)
    transformer, arguments = request.param()
    with torch.no_grad():
        for p in transformer.parameters():  # zero-initialised gates, norms and tables that matter
            p.add_(0.1 * torch.randn_like(p))
    transformer.eval()
    model = SparseTransformer(copy.deepcopy(transformer), TILE).eval()
    with torch.no_grad():
        stock = transformer(**copy.deepcopy(arguments), return_dict=False)[0]
    return transformer, model, arguments, stock


def run(model, arguments, rungs=None, probes=None):
    return model.run(copy.deepcopy(arguments), rungs, probes)


def close(out, stock):
    return (out - stock).abs().max() <= 1e-5 * max(1.0, float(stock.abs().max()))


@torch.no_grad()
def test_dense_is_diffusers(case):
    _, model, arguments, stock = case
    out, stats = run(model, arguments)
    assert stats == {} and close(out, stock)


@torch.no_grad()
def test_every_block_kept_is_dense(case):
    _, model, arguments, stock = case
    blocks = tile_layout(model.family.grid(model.transformer, arguments), TILE).num_blocks
    out, stats = run(model, arguments, [LayerPlan(blocks, 0.0)] * model.num_layers)
    assert set(stats) == set(range(model.num_layers)) and all(float(s.density) == 1 for s in stats.values())
    assert close(out, stock)


@torch.no_grad()
@pytest.mark.parametrize("rung", [Rung(1, 0), Rung(1, 2)], ids=["half", "merged"])
def test_sparse_differs_and_the_transformer_stays_what_it_was(case, rung):
    _, model, arguments, stock = case
    out, stats = run(model, arguments, [rung] * model.num_layers)
    assert out.shape == stock.shape and out.isfinite().all() and not close(out, stock)
    assert all(float(s.density) == 0.5 for s in stats.values())
    assert torch.equal(model.transformer(**copy.deepcopy(arguments), return_dict=False)[0], stock)


def test_gradients_reach_what_they_reach_dense(case):
    """And with checkpointing they are the same, a probe's mix included."""
    transformer, model, arguments, _ = case
    transformer(**copy.deepcopy(arguments), return_dict=False)[0].square().sum().backward()
    wanted = {name for name, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad(set_to_none=True)
    rungs, mix = [Rung(1, 1)] * model.num_layers, torch.tensor(0.5, requires_grad=True)

    def gradients():
        out, _ = run(model, arguments, rungs, {1: Probe(Rung(2, 0), mix)})
        named = dict(model.named_parameters())
        return dict(zip([*named, "mix"], torch.autograd.grad(out.square().sum(), [*named.values(), mix], allow_unused=True)))

    plain = gradients()
    assert plain["mix"] is not None and {n.removeprefix("transformer.") for n, g in plain.items() if g is not None} >= wanted
    assert all(plain[f"gates.{i}.weight"] is not None for i in range(model.num_layers))
    model.transformer.enable_gradient_checkpointing()
    again = gradients()
    model.transformer.disable_gradient_checkpointing()
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None) and (gradient is None or torch.equal(gradient, again[name])), name
