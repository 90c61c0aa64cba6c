"""usv/training/optim.py: every parameter by its own optimiser, at one learning rate, with state that can be taken out and put back."""

import copy

import torch

from usv.training.optim import MuonAdamW


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
    muon = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        theirs["head"](theirs["blocks"][0](x).relu()).square().mean().backward()
        for part in (muon, adamw):
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
