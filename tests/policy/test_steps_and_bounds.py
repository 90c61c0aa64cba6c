"""The learned policy beyond the budget: which steps run, and bounds on density and on the layers that merge."""

import pytest
import torch
from policy_cases import COSTS, EDGES, LAYERS, LAYOUT, SHAPE, known, seeded

from usv.config import TrainConfig
from usv.policy.gumbel import GumbelPolicy
from usv.sparse.cost import plan_cost, rung_costs
from usv.sparse.plan import DENSITY_LADDER, RUNGS, Rung, timestep_bins
from usv.training.feasible import least_cost


def steps_of(policy, size):
    """Every step down the density ladder does `size`, every merge nothing."""
    damage = torch.zeros_like(policy.table.mean)
    damage[..., 1:6] = size
    return damage


def test_a_step_that_was_never_probed_is_not_free_to_jump():
    policy = GumbelPolicy(timestep_bins(4, 3.0), LAYERS, COSTS, axes=["density"], steps=True)
    assert policy.known_jump_damage().tolist() == [1.0] * 4
    policy.observe_jump(0, 0.01)
    policy.observe_jump(1, 2.0)
    assert policy.known_jump_damage().tolist() == pytest.approx([0.01, 2.0, 2.0, 2.0])
    known(policy, steps_of(policy, 0.05))
    assert policy.decode(3 * 0.6 / 4).steps == (False, True, True, True)


def test_a_jump_is_weighed_with_the_rungs_it_was_measured_under():
    """Rungs that do more than a jump over them are no reason to jump: without the step the samples were worse still."""
    policy = GumbelPolicy(timestep_bins(4, 3.0), LAYERS, COSTS, axes=["density"], steps=True)
    known(policy, steps_of(policy, 0.1))
    row = (Rung(5),) * LAYERS
    own = policy._damages_of({0: row})[0]
    for bin in range(3):
        policy.observe_jump(bin, 0.9 * own, cut=4 * own, rows={b: row for b in range(4)})
    assert policy.exchange_rate() == pytest.approx(1.0, rel=0.02), "four steps' rungs did to the samples what they do to the loss"
    assert policy.known_jump_damage()[0].item() == pytest.approx(1.9 * own, rel=0.02)
    policy.set_budget(0.9)
    assert (policy.run_probability() > 0.99).all(), "where little is to be saved, every step is worth running"
    for bin in range(3):
        for _ in range(50):
            policy.observe_jump(bin, -2.0, cut=8 * own, rows={b: row for b in range(4)})
    assert policy.exchange_rate() == pytest.approx(0.5, rel=0.05) and (policy.known_jump_damage()[:3] <= own).all()
    assert (policy.known_jump_damage() >= 0).all(), "a jump that helped counts as nothing, not as a reward"


def test_jumped_steps_are_trained_as_the_step_before_runs():
    policy = GumbelPolicy(timestep_bins(3, 3.0), LAYERS, COSTS, axes=["density"], steps=True)
    damage = steps_of(policy, 0.5)
    damage[2] = steps_of(policy, 0.02)[2]
    known(policy, damage)
    policy.observe_jump(0, 0.0)
    policy.observe_jump(1, 0.0)
    plan = policy.decode(0.2)
    assert plan.steps == (False, False, True) and plan.rungs[0] == plan.rungs[1] == plan.rungs[2]


def test_steps_are_learned_under_the_same_budget():
    """Of five candidate steps two hurt when jumped; at a budget of two dense forwards those two and pure noise stay."""
    edges = timestep_bins(6, 3.0)
    policy = GumbelPolicy(edges, LAYERS, COSTS, axes=["density"], steps=True)
    known(policy, steps_of(policy, 0.05))  # a fourth step, which gains 0.01, would be paid for by all layers of the others
    for bin in range(5):
        for _ in range(4):
            policy.observe_jump(bin, 2.0 if bin in (1, 3) else 0.01)
    target = 3 * 0.6 / 6
    policy.set_budget(target)
    run = policy.run_probability()
    assert policy.gates().cost == pytest.approx(target, rel=1e-6) and run[[1, 3, 5]].min() > 0.9 > 0.1 > run[[0, 2, 4]].max()
    plan = policy.decode(target)
    assert plan.steps == (False, True, False, True, False, True)
    assert plan.student_timesteps() == [edges[5], edges[3], edges[1]]
    assert plan_cost(plan, SHAPE, LAYOUT) * sum(plan.steps) / 6 <= target + 1e-9
    again = type(plan).from_dict(plan.to_dict())
    assert again == plan
    sampled = [policy.decide_steps(seeded(i)) for i in range(20)]
    assert all(steps[-1] for steps in sampled)


@pytest.mark.parametrize("bound", [0.25, 0.1])
def test_a_bound_on_density_is_met_at_the_least_price(bound):
    free, bounded = (GumbelPolicy(EDGES, LAYERS, COSTS, most_density=d) for d in (1.0, bound))
    damage = torch.rand(free.table.mean.shape, generator=seeded(), dtype=torch.float64)
    damage[..., 7:] *= 0.2
    known(free, damage)
    known(bounded, damage)
    mean = lambda plan: sum(DENSITY_LADDER[r.density] for row in plan.rungs for r in row) / LAYERS / len(EDGES)  # noqa: E731
    plan = bounded.decode(0.3)
    assert mean(free.decode(0.3)) > bound >= mean(plan)
    assert mean(plan) > 0.5 * bound  # the least price, not the sparsest plan
    assert plan_cost(plan, SHAPE, LAYOUT) <= 0.3 + 1e-9


def test_the_bound_on_density_is_learned_not_left_to_decoding():
    """Where density costs little and its loss is dear, gates that know the bound keep to it, in expectation."""
    damage = torch.zeros(len(EDGES), LAYERS, 10, dtype=torch.float64)
    damage[..., 1:6], damage[..., 7:] = 0.05, 0.001

    def learned(bound):
        policy = known(GumbelPolicy(EDGES, LAYERS, COSTS, most_density=bound), damage)
        policy.set_budget(0.35)
        return policy.gates()

    free, bounded = learned(1.0), learned(0.25)
    assert free.density > 0.35 and bounded.density < 0.2501
    assert free.cost == pytest.approx(0.35, rel=1e-6) and bounded.cost == pytest.approx(0.35, rel=1e-6)


def test_last_layers_that_may_not_merge_never_do():
    policy = GumbelPolicy(EDGES, LAYERS, COSTS, probes=LAYERS, merge_layers=2)
    policy.set_budget(0.4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        decisions = policy.decide(0, generator)
        assert not any(rung.merge for rung in decisions.rungs[2:])
        assert all(p.other.merge == 0 for p in decisions.probes if p.layer >= 2)
    plan = policy.decode(0.6)
    assert all(rung.merge == 0 for row in plan.rungs for rung in row[2:]) and any(row[0].merge for row in plan.rungs)


def test_the_bound_on_density_counts_what_is_executed():
    """Of 3 blocks a sixteenth is one block: a third. A bound below that cannot be met, and is refused."""
    policy = GumbelPolicy(EDGES, LAYERS, COSTS, most_density=0.3, densities=[1.0, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    with pytest.raises(ValueError, match="most_density"):
        policy.decode(0.5)


def test_the_plan_is_of_least_damage_whatever_the_gates_have_settled_on():
    """Exhaustive over one bin and two layers; gates that are one-hot on something else change nothing."""
    costs = rung_costs(SHAPE, LAYOUT)
    policy = GumbelPolicy((1000.0,), 2, costs)
    known(policy, 0.3 * torch.rand(policy.table.mean.shape, generator=seeded(3), dtype=torch.float64))
    policy.decide(0, seeded(4))
    density, merge = policy.rung_damage()
    damage = lambda layer, rung: float(density[0, layer, rung.density] + merge[0, layer, rung.merge])  # noqa: E731
    cost = dict(zip(RUNGS, costs))
    within = [(a, b) for a in RUNGS for b in RUNGS if (cost[a] + cost[b]) / 2 <= 0.5 - 0.01]  # costs are rounded up
    best = min(damage(0, a) + damage(1, b) for a, b in within)
    (row,) = policy.decode(0.5).rungs
    assert damage(0, row[0]) + damage(1, row[1]) <= best + 1e-6


@pytest.mark.parametrize(("axes", "merge_layers"), [(["density", "merge"], None), (["density", "merge"], 2), (["merge"], 1), (["density"], 3)])
def test_the_least_budget_is_what_the_sparsest_plan_costs(axes, merge_layers):
    """What train.py accepts at the start can be decoded at the end, and no less."""
    config = TrainConfig()
    config.policy.axes, config.policy.merge_layers = axes, merge_layers
    least = least_cost(config, dict(zip(RUNGS, COSTS)), LAYERS)
    policy = GumbelPolicy(EDGES, LAYERS, COSTS, axes=axes, merge_layers=merge_layers)
    cost = [COSTS[RUNGS.index(rung)] for row in policy.decode(least + 1e-6).rungs for rung in row]
    assert sum(cost) / len(cost) == pytest.approx(least)
    with pytest.raises(ValueError, match="give a budget of at least"):
        policy.decode(least - 1e-3)
