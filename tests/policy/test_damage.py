"""What is remembered of the probes: means, uncertainty, what slots without probes are thought to do, and exact states."""

import numpy as np
import pytest
import torch
from policy_cases import seeded

from usv.policy import AXES
from usv.policy.content import CONTENT, content_of
from usv.policy.damage import FIRST, GUMBEL, STEPS, WIDTH, DamageTable
from usv.policy.network import DamageNetwork


def test_a_slot_seen_often_is_its_mean_and_as_uncertain_as_its_mean_is():
    rng, table = np.random.default_rng(0), DamageTable(2, 3, memory=0.01)
    for _ in range(150):
        for layer in range(3):
            table.observe(0, layer, 3, 0.1 * (layer + 1) + 0.02 * rng.normal())
    estimate = table.estimate()
    assert estimate.mean[0, :, 3].tolist() == pytest.approx([0.1, 0.2, 0.3], abs=5 * 0.02 / 150**0.5)
    assert estimate.std[0, :, 3].tolist() == pytest.approx([0.02 / 150**0.5] * 3, rel=0.25)
    assert (estimate.std[1, :, 3] > 3 * estimate.std[0, :, 3]).all(), "the other timestep was never looked at"
    assert not estimate.mean[..., list(FIRST)].any() and not estimate.std[..., list(FIRST)].any()


def test_what_was_never_probed_is_thought_dearer_the_further_down():
    table = DamageTable(2, 2)
    table.observe(0, 0, 1, 0.1)
    table.observe(0, 0, AXES["density"] + 1, 0.3)
    kinds = table.kinds()
    assert kinds[5] > kinds[4] > kinds[3] > kinds[2] > kinds[1] > 0 and kinds[9] > kinds[8] > kinds[7] > 0
    density, merge = table.estimate().rungs()
    assert (density.diff(dim=-1) >= 0).all() and (merge.diff(dim=-1) >= 0).all() and not density[..., 0].any()


def test_gates_cool_as_probes_come():
    table, temperatures = DamageTable(1, 1), []
    rng = np.random.default_rng(3)
    for _ in range(39):
        for slot in STEPS:
            table.observe(0, 0, slot, 0.1 + 0.05 * rng.normal())
        temperatures.append(float(table.estimate().temperature()))
    assert temperatures[-1] < 0.75 * temperatures[3], "(4 + 2) / (19 + 2) of the variance"
    assert temperatures[-1] == pytest.approx(GUMBEL * 0.05 / 19**0.5, rel=0.5), "the memory of 0.1 is worth 19 probes"


def landscape(bins, layers, seed=0):
    """(bins, layers, WIDTH): every layer has a size of its own and a timestep at which it matters most, later the deeper it lies; twice as
    dear with every step of a ladder. Not a product of factors."""
    rng = np.random.default_rng(seed)
    time, depth, layer = (np.arange(bins) + 0.5) / bins, (np.arange(layers) + 0.5) / layers, np.exp(0.5 * rng.normal(size=layers))
    matters = np.exp(1.5 * np.cos(2 * np.pi * (time[:, None] - depth)))
    out = np.zeros((bins, layers, WIDTH))
    for axis, (first, length) in enumerate(zip(FIRST, AXES.values())):
        for rung in range(1, length):
            out[..., first + rung] = 0.002 * (axis + 1) * 2.0**rung * matters * layer
    return out


def fill(network, table, truth, probes, seed):
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy((0.3 * truth.mean((0, 1))) ** 2 + 1e-12)
    for index in range(probes):
        bin, layer, slot = int(rng.integers(truth.shape[0])), int(rng.integers(truth.shape[1])), int(rng.choice(STEPS))
        value = truth[bin, layer, slot] + 0.5 * truth[..., slot].mean() * rng.normal()
        table.observe(bin, layer, slot, value)
        network.observe(bin, layer, slot, value)
        if index % 3 == 2:
            network.fit(noise, table.prior())


@pytest.fixture(scope="module")
def pooled():
    """600 probes of a landscape of 12 layers × 8 bins, 768 slots, half of which stay without one."""
    truth, table, network = landscape(8, 12), DamageTable(8, 12), DamageNetwork(8, 12, updates=6)
    fill(network, table, truth, 600, 1)
    return truth, table, network


def test_pooling_tells_what_was_never_probed(pooled):
    """In slots without a probe the network is nearer to the truth than the table's own factors, every kind having equal weight."""
    truth, table, network = pooled
    unseen = (table.seen[..., list(STEPS)] == 0).numpy()
    assert 0.3 < unseen.mean() < 0.7
    scale = truth.mean((0, 1))[list(STEPS)]
    error = {
        name: float((((estimate.mean.numpy() - truth)[..., list(STEPS)] / scale)[unseen] ** 2).mean() ** 0.5)
        for name, estimate in {"table": table.estimate(), "network": table.estimate(*network.predict())}.items()
    }
    assert error["network"] < 0.7 * error["table"], error


def test_the_uncertainty_covers_the_error(pooled):
    """Within two standard deviations in most slots, seen and unseen (95% of a normal distribution; at least 80% is asked for)."""
    truth, table, network = pooled
    estimate = table.estimate(*network.predict())
    off = (estimate.mean.numpy() - truth)[..., list(STEPS)] / estimate.std.numpy()[..., list(STEPS)]
    assert (np.abs(off) < 2).mean() > 0.8


def test_states_go_on_exactly(pooled):
    truth, table, network = pooled
    other, theirs = DamageNetwork(8, 12, updates=6, seed=9), DamageTable(8, 12)
    other.load_state(network.state())
    theirs.load_state_dict(table.state_dict())
    fill(network, table, truth, 6, 5)
    fill(other, theirs, truth, 6, 5)
    assert all(torch.equal(a, b) for a, b in zip(network.predict(), other.predict()))
    assert torch.equal(theirs.estimate().mean, table.estimate().mean)


def test_content_tells_inputs_apart_and_the_network_learns_from_it():
    """Damage of one slot is three times as large where the first number of the input is positive."""
    network, generator = DamageNetwork(1, 1, CONTENT, updates=8), seeded()
    for _ in range(60):
        content = torch.randn(CONTENT, generator=generator)
        network.observe(0, 0, 2, 0.3 if content[0] > 0 else 0.1, content)
        network.fit(torch.full((WIDTH,), 0.01), torch.full((1, 1, WIDTH), 0.2))
    high, low = (float(network.predict(torch.tensor([x, *[0.0] * (CONTENT - 1)]))[0][0, 0, 2]) for x in (1.0, -1.0))
    assert high > 1.5 * low
    latents, text = torch.randn(2, 4, 3, 6, 6, generator=generator), torch.randn(2, 5, 64, generator=generator)
    told = content_of(torch.stack([latents[0], 3 * latents[0]]), text)
    assert told.shape == (2, CONTENT) and told.isfinite().all() and told.abs().max() < 10
    assert (told[0, -2:] - told[1, -2:]).abs().max() < 1e-5 and told[1, -3] - told[0, -3] == pytest.approx(np.log(3), abs=1e-4)
