"""What deciding costs: the network and the decode, in seconds of this process's work, beside the forwards that they decide for."""

import pytest
import torch
from embedded import clips, wan_mini
from policy_cases import COSTS, least_seconds, seeded

from usv.policy.content import CONTENT, content_of
from usv.policy.dial import carried, plan_for
from usv.policy.gumbel import GumbelPolicy
from usv.sparse.plan import timestep_bins


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Work of several threads is counted together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def learned(bins, layers):
    """A policy that looks at its input, after forty forwards."""
    policy, generator = GumbelPolicy(timestep_bins(bins, 3.0), layers, COSTS, input="content"), seeded()
    policy.set_budget(0.3)
    for number in range(40):
        decisions = policy.decide(number % bins, generator, torch.randn(2, CONTENT, generator=generator))
        policy.observe(decisions, {p.layer: [0.01, 0.02] for p in decisions.probes}, {})
    assert policy.network.ready
    return policy


def test_thirty_layers_and_fifty_steps_take_fifty_milliseconds():
    """All damages told by the network, and a plan decoded from what travels."""
    policy = learned(50, 30)
    record = carried(policy, [0.15, 0.6])
    told = least_seconds(lambda: policy.network.predict(policy.network.typical_input()))
    decoded = least_seconds(lambda: plan_for(record, policy.edges, budget=0.2))
    print(f"network {1000 * told:.1f} ms, decode {1000 * decoded:.1f} ms")
    assert told + decoded < 0.05, f"network {1000 * told:.1f} ms, decode {1000 * decoded:.1f} ms"


def test_deciding_is_less_than_a_hundredth_of_a_forward():
    """On the smallest model there is: the decode once for a clip of fifty forwards, the network's row for every batch of a training of six clips."""
    policy, (pipe, model) = learned(4, 8), wan_mini()
    x, text, _ = clips(pipe, 2)
    sigma, record = torch.full((2,), 500.0), carried(policy, [0.15, 0.6])
    row = plan_for(record, policy.edges, budget=0.15).rungs[0]
    with torch.no_grad():
        forward = least_seconds(lambda: model(x[:1], sigma[:1], text[:1], row), 3)
        batch = 3 * least_seconds(lambda: model(x, sigma, text, row), 3)
    decoded = least_seconds(lambda: plan_for(record, policy.edges, budget=0.15)) / 50
    decided = least_seconds(lambda: policy.decide(0, seeded(), content_of(x.repeat(3, 1, 1, 1, 1), text.repeat(3, 1, 1))))
    print(f"forward {1000 * forward:.0f} ms, decode {1000 * decoded:.2f} ms of it; of a batch {1000 * batch:.0f} ms, decision {1000 * decided:.2f} ms")
    assert decoded < 0.01 * forward, f"{1000 * decoded:.2f} of {1000 * forward:.0f} ms"
    assert decided < 0.01 * batch, f"{1000 * decided:.2f} of {1000 * batch:.0f} ms"
