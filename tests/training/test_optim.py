"""usv/training/optim.py: every parameter by its own optimiser, at one learning rate, with state that can be taken out and put back."""

import copy

import pytest
import torch

from usv.training.optim import MuonAdamW, muon


def network():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(6, 4)]), "head": torch.nn.Linear(4, 3)})


def run(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        net["head"](net["blocks"][0](x).relu()).square().mean().backward()
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


def make(net):
    return MuonAdamW(net.named_parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)


def test_equals_the_two_optimisers_apart():
    ours, theirs = network(), network()
    run(ours, make(ours), 3)
    matrix = theirs["blocks"][0].weight
    rest = [p for p in theirs.parameters() if p is not matrix]
    matrices = muon([matrix], 0.01, 0.1)
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        theirs["head"](theirs["blocks"][0](x).relu()).square().mean().backward()
        for part in (matrices, adamw):
            part.param_groups[0]["lr"] = 0.01 / (1 + step)
            part.step()
            part.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_goes_on_from_state_by_parameter():
    whole, cut = network(), network()
    run(whole, make(whole), 4)
    first = make(cut)
    run(cut, first, 2)
    saved = [copy.deepcopy(first.state[p]) for p in cut.parameters()]
    second = make(cut)
    for p, state in zip(cut.parameters(), saved):
        second.state[p] = state
    run(cut, second, 2, start=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters()))


def steps_of(make, shape, dtype, count=3):
    """A matrix and its momentum after some steps."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    optimizer = make([p])
    for _ in range(count):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]["momentum_buffer"]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (24, 24), (64, 8)])
def test_muon_where_bf16_is_emulated_is_torchs_without_its_rounding(monkeypatch, shape):
    """torch's own iteration with its cast to bf16 taken away is the exact value; ours in fp32 is far nearer to it than torch's."""

    def torchs(p):
        return torch.optim.Muon(p, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    def ours(p):
        return muon(p, 0.1, 0.1)

    rounded = steps_of(torchs, shape, torch.float32)[0]
    monkeypatch.setattr("usv.training.optim.multiplies_bf16", lambda: False)
    mine = steps_of(ours, shape, torch.float32)[0]
    exact, momentum = steps_of(ours, shape, torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        wanted, theirs = steps_of(torchs, shape, torch.float64)
    assert torch.allclose(exact, wanted, rtol=0, atol=1e-12) and torch.equal(momentum, theirs)
    assert (mine - wanted).abs().max() < 0.01 * (rounded - wanted).abs().max()
