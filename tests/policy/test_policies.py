"""The three policies behind one protocol: budgets kept, damage remembered, sensitive layers spared, equal costs."""

import pytest
import torch
from policy_cases import COSTS, EDGES, LAYERS, LAYOUT, SHAPE, known, seeded

from usv.policy import AXES, Decisions, ProbeRequest
from usv.policy.baselines import CalibrationPolicy
from usv.policy.content import CONTENT
from usv.policy.fixed import EntropyPolicy, StaticPolicy, uniform_plan
from usv.policy.gumbel import GumbelPolicy
from usv.sparse.cost import plan_cost
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, timestep_bins

FLOOR = min(COSTS)
BUDGETS = [FLOOR, FLOOR + 0.01, 0.2, 0.32, 0.5, 0.8, 1.0]


def make(name):
    kinds = {"static": StaticPolicy, "entropy": EntropyPolicy, "gumbel": GumbelPolicy}
    return kinds[name](EDGES, LAYERS, COSTS)


def uneven_entropy(policy):
    """Entropies from one block to uniform: the weights of the entropy policy then differ a thousandfold."""
    table = torch.linspace(0.0, 1.0, policy.entropy.numel()).view_as(policy.entropy)
    for b in range(len(EDGES)):
        policy.observe(Decisions(b, (Rung(1, 0),) * LAYERS), {}, {i: float(table[b, i]) for i in range(LAYERS)})
    return policy


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["static", "entropy", "uneven entropy", "gumbel", "random gumbel"])
def test_decode_never_exceeds_the_budget(name, budget):
    """The decoded plan's cost is at most the budget; and a budget with room is used: less than one dense cell is left."""
    policy = make(name.split()[-1])
    if name == "uneven entropy":
        policy = uneven_entropy(policy)
    if name == "random gumbel":
        known(policy, torch.rand(policy.table.mean.shape, generator=seeded(1), dtype=torch.float64))
    plan = policy.decode(budget)
    assert (len(plan.edges), plan.num_layers) == (len(EDGES), LAYERS)
    assert plan_cost(plan, SHAPE, LAYOUT) <= budget + 1e-9
    if name in ("static", "gumbel"):
        assert plan_cost(plan, SHAPE, LAYOUT) > budget - 0.1
    if budget == FLOOR:
        assert {r for row in plan.rungs for r in row} == {RUNGS[COSTS.index(FLOOR)]}


def test_a_budget_of_one_is_dense():
    for name in ("static", "entropy"):
        assert {r for row in make(name).decode(1.0).rungs for r in row} == {Rung()}


@pytest.mark.parametrize("name", ["static", "entropy", "gumbel"])
def test_decide_gives_a_rung_a_layer_and_repeats(name):
    policy = make(name)
    policy.set_budget(0.4)
    for b in range(len(EDGES)):
        first, again = policy.decide(b, seeded(b)), policy.decide(b, seeded(b))
        assert first == again and first.bin == b and len(first.rungs) == LAYERS and set(first.rungs) <= set(RUNGS)


# ---- uniform plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [FLOOR, 0.13, 0.21, 0.32, 0.45, 0.61, 0.9, 1.0])
def test_uniform_plan_has_the_cost_and_prefers_nobody(target):
    """At most one cell's step below the target, never above; two rungs at most; shares of layers differ by one cell."""
    edges, layers = timestep_bins(8, 3.0), 8
    plan = uniform_plan(edges, layers, COSTS, target)
    rungs = sorted({r for row in plan.rungs for r in row}, key=RUNGS.index)
    assert len(rungs) <= 2
    by_rung = dict(zip(RUNGS, COSTS))
    step = max(by_rung[r] for r in rungs) - min(by_rung[r] for r in rungs)
    cost = plan_cost(plan, SHAPE, LAYOUT)
    reachable = max(c for c, r in zip(COSTS, RUNGS) if r.merge == rungs[0].merge)
    assert min(target, reachable) - step / (8 * layers) - 1e-9 <= cost <= target + 1e-9
    counts = [row.count(rungs[0]) for row in plan.rungs]
    assert max(counts) - min(counts) <= 1


def test_uniform_plan_with_a_given_merge_keeps_it():
    for merge in range(len(MERGE_LADDER)):
        own = [c for c, r in zip(COSTS, RUNGS) if r.merge == merge]
        target = 0.5 * (min(own) + max(own))
        plan = uniform_plan(EDGES, LAYERS, COSTS, target, merge)
        assert {r.merge for row in plan.rungs for r in row} == {merge}


# ---- entropy ---------------------------------------------------------------------------------------------------------


def test_entropy_policy_makes_concentrated_layers_sparser():
    policy = make("entropy")
    for b in range(len(EDGES)):
        policy.observe(Decisions(b, (Rung(1, 0),) * LAYERS), {}, {0: 0.2, 1: 0.9, 2: 0.5, 3: 0.5})
    by_rung = dict(zip(RUNGS, COSTS))
    for budget in (0.3, 0.5, 0.7):
        for row in policy.decode(budget).rungs:
            costs = [by_rung[r] for r in row]
            assert costs[0] <= costs[2] == costs[3] <= costs[1] and costs[0] < costs[1]


def test_entropy_plan_gets_cheaper_with_the_amount():
    """What the bisection stands on."""
    policy = uneven_entropy(make("entropy"))
    costs = [policy._cost(policy._plan(a)) for a in torch.logspace(-3, 4, 60).tolist()]
    assert all(b <= a + 1e-12 for a, b in zip(costs, costs[1:])) and costs[0] == 1.0
    assert costs[-1] == pytest.approx(FLOOR)


def test_entropy_is_a_running_mean_of_what_is_measured():
    policy = make("entropy")
    values = [0.8, 0.4, 0.6]
    for value in values:
        policy.observe(Decisions(1, (Rung(),) * LAYERS), {}, {2: value})
    assert float(policy.entropy[1, 2]) == pytest.approx(sum(values) / 3)
    untouched = torch.ones_like(policy.entropy, dtype=torch.bool)
    untouched[1, 2] = False
    assert (policy.entropy[untouched] == 0.5).all()


# ---- gumbel ----------------------------------------------------------------------------------------------------------

INPUTS = ("none", "place", "content")


def train(policy, damage_of, target, steps=200):
    """Runs a policy against a world in which damage_of(layer, rung) is the loss of a layer under a rung."""
    generator = seeded(5)
    for step in range(steps):
        policy.set_budget(max(target, 1 - 2 * step / steps * (1 - target)))
        content = torch.zeros(2, CONTENT)
        decisions = policy.decide(step % len(EDGES), generator, content)
        damages = {p.layer: damage_of(p.layer, p.other) - damage_of(p.layer, decisions.rungs[p.layer]) for p in decisions.probes}
        policy.observe(decisions, damages, {i: 0.5 for i in range(LAYERS)})
    return policy


@pytest.fixture(scope="module", params=INPUTS)
def trained(request):
    """A world in which layer 2 suffers ten times as much as the others from every step down either ladder."""

    def damage_of(layer, rung):
        return (0.2 if layer == 2 else 0.02) * (rung.density + rung.merge)

    return train(GumbelPolicy(EDGES, LAYERS, COSTS, input=request.param), damage_of, 0.35)


def test_gumbel_spares_the_sensitive_layer(trained):
    plan = trained.decode(0.35)
    by_rung = dict(zip(RUNGS, COSTS))
    layer_costs = [sum(by_rung[row[i]] for row in plan.rungs) / len(EDGES) for i in range(LAYERS)]
    others = layer_costs[:2] + layer_costs[3:]
    assert layer_costs[2] > 1.5 * max(others), layer_costs
    assert plan_cost(plan, SHAPE, LAYOUT) <= 0.35 + 1e-9


def test_gumbel_meets_the_budget_and_keeps_both_axes(trained):
    assert trained.gates().cost == pytest.approx(0.35, rel=1e-6)
    generator = seeded(2)
    by_rung, drawn = dict(zip(RUNGS, COSTS)), []
    for i in range(300):
        drawn += [by_rung[r] for r in trained.decide(i % len(EDGES), generator).rungs]
    spread = torch.tensor(drawn).std().item() / len(drawn) ** 0.5
    assert abs(sum(drawn) / len(drawn) - 0.35) < 5 * spread, "and so do the draws, to their own error"
    assert len({r for row in trained.decode(0.35).rungs for r in row}) >= 2


def test_gumbel_damage_estimates_the_world(trained):
    """Cells probed often hold the true step of one rung; the sums along the ladder follow it."""
    often = trained.table.seen >= 5
    assert often.any()
    truth = torch.full_like(trained.table.mean, 0.02)
    truth[:, 2] = 0.2
    torch.testing.assert_close(trained.table.mean[often], truth[often], rtol=1e-6, atol=1e-9)
    density, merge = trained.rung_damage()
    assert (density[:, 2, -1] > 2 * density[:, [0, 1, 3], -1].amax(-1)).all()
    assert not density[..., 0].any() and not merge[..., 0].any()  # the first rung is what damage is measured from


@pytest.mark.parametrize("input", INPUTS)
def test_gumbel_samples_its_gates(input):
    policy = GumbelPolicy(EDGES, LAYERS, COSTS, input=input)
    known(policy, torch.rand(policy.table.mean.shape, generator=seeded(3), dtype=torch.float64))
    policy.set_budget(0.4)
    generator, draws = seeded(0), 1000
    counts = torch.zeros(LAYERS, len(RUNGS), dtype=torch.float64)
    for _ in range(draws):
        for layer, rung in enumerate(policy.decide(1, generator).rungs):
            counts[layer, RUNGS.index(rung)] += 1
    p = torch.from_numpy(policy.gates().p[1])
    bound = 5 * (p * (1 - p) / draws).sqrt() + 5 / draws  # five standard deviations, and a few draws of what hardly ever comes
    assert ((counts / draws - p).abs() <= bound).all()
    density, merge = policy.probabilities()
    assert torch.allclose(density.sum(-1), torch.ones(1, dtype=torch.float64)) and torch.allclose(merge.sum(-1), torch.ones(1, dtype=torch.float64))


def test_gumbel_starts_by_keeping_all():
    assert set(make("gumbel").decide(0, seeded()).rungs) == {Rung()}


def test_gumbel_probes_are_neighbours_and_go_where_least_is_known():
    policy, generator = make("gumbel"), seeded(0)
    policy.set_budget(0.3)
    seen = set()
    for _ in range(200):
        decisions = policy.decide(0, generator)
        assert len({p.layer for p in decisions.probes}) == policy.probes
        for probe in decisions.probes:
            own = decisions.rungs[probe.layer]
            moves = {"density": probe.other.density - own.density, "merge": probe.other.merge - own.merge}
            assert abs(moves.pop(probe.axis)) == 1 and set(moves.values()) == {0} and probe.other in RUNGS
            seen.add((probe.axis, probe.other.density if probe.axis == "density" else probe.other.merge))
    assert len(seen) == len(DENSITY_LADDER) + len(MERGE_LADDER)  # every rung of both ladders gets looked at
    policy = GumbelPolicy(EDGES, LAYERS, COSTS, probes=1, input="none")
    policy.set_budget(0.3)
    for layer in range(3):  # all is known but of layer 3
        for slot in range(1, 10):
            for _ in range(19):
                policy.table.observe(0, layer, slot, 0.1 + 1e-4 * (-1) ** _)
    policy.table.observe(0, 3, 1, 5.0)
    policy._estimate = policy._gates = None
    probed = [policy.decide(0, generator).probes[0].layer for _ in range(60)]
    assert probed.count(3) > 40


def test_gumbel_damage_has_one_sign_whichever_side_is_probed():
    """damage is of the sparser of two rungs, over the denser: probing downwards gives −value. Of clips the mean is remembered."""
    for here, there, value, expected in ((1, 2, 0.5, 0.5), (2, 1, 0.5, -0.5), (2, 1, [0.25, 0.75], -0.5)):
        policy = make("gumbel")
        probe = ProbeRequest(3, "merge", Rung(0, there))
        policy.observe(Decisions(1, (Rung(0, here),) * LAYERS, (probe,)), {3: value}, {})
        slot = AXES["density"] + 2
        assert float(policy.table.mean[1, 3, slot]) == expected and float(policy.table.mean.abs().sum()) == 0.5


def test_gumbel_state_restores_exactly(trained):
    other = GumbelPolicy(EDGES, LAYERS, COSTS, input=trained.input)
    other.load_state_dict(trained.state_dict())
    content = torch.ones(2, CONTENT)
    assert other.decode(0.35) == trained.decode(0.35)
    mine, theirs = (p.decide(1, seeded(1), content) for p in (trained, other))
    assert (mine.rungs, mine.probes) == (theirs.rungs, theirs.probes)
    with pytest.raises(ValueError, match="policy.input: got a state of"):
        GumbelPolicy(EDGES, LAYERS, COSTS, input="none" if trained.input != "none" else "place").load_state_dict(trained.state_dict())


@pytest.mark.parametrize("name", ["static", "entropy"])
def test_fixed_policies_restore_exactly(name):
    policy, other = make(name), make(name)
    if name == "entropy":
        uneven_entropy(policy)
    policy.set_budget(0.37)
    other.load_state_dict(policy.state_dict())
    assert all(other.decide(b, seeded()) == policy.decide(b, seeded()) for b in range(len(EDGES)))
    assert other.decode(0.37) == policy.decode(0.37)


@pytest.mark.parametrize("axis, kept", [("density", "merge"), ("merge", "density")])
@pytest.mark.parametrize("name", ["static", "entropy", "gumbel"])
def test_an_axis_left_out_stays_dense(name, axis, kept):
    """Decisions, probes and the decoded plan touch the one axis only, and the budget holds."""
    kinds = {"static": StaticPolicy, "entropy": EntropyPolicy, "gumbel": GumbelPolicy}
    policy = kinds[name](EDGES, LAYERS, COSTS, axes=[axis])
    policy = uneven_entropy(policy) if name == "entropy" else policy
    policy.set_budget(0.6)
    generator = seeded()
    seen = [policy.decide(i % len(EDGES), generator) for i in range(30)]
    rungs = [r for d in seen for r in (*d.rungs, *(p.other for p in d.probes))] + [r for row in policy.decode(0.6).rungs for r in row]
    assert {getattr(r, kept) for r in rungs} == {0}
    assert len({getattr(r, axis) for r in rungs}) > 1
    assert plan_cost(policy.decode(0.6), SHAPE, LAYOUT) <= 0.6 + 1e-9


@pytest.mark.parametrize("name", ["gumbel", "calibration"])
def test_no_probe_where_none_is_asked_for_or_can_be(name):
    policy = (GumbelPolicy if name == "gumbel" else CalibrationPolicy)(EDGES, LAYERS, COSTS, 3, axes=["merge"], merge_layers=1)
    policy.set_budget(0.95)
    for _ in range(20):
        assert all(probe.layer == 0 and probe.axis == "merge" for probe in policy.decide(0, seeded(_)).probes)
    if name == "gumbel":
        assert GumbelPolicy(EDGES, LAYERS, COSTS, 0).decide(0, seeded()).probes == ()
