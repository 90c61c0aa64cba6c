"""usv/policy/gates.py: the budget met exactly, the optimum it claims to be, and its gradient against finite differences."""

from dataclasses import replace

import numpy as np
import pytest
from policy_cases import COSTS

from usv.policy.gates import Problem, at_price, reach, solve
from usv.sparse.plan import DENSITY_LADDER, RUNGS

DENSITIES = np.array([DENSITY_LADDER[r.density] for r in RUNGS])


def problem(seed=0, bins=3, layers=4, jump=False) -> Problem:
    rng = np.random.default_rng(seed)
    damage = rng.uniform(0, 1, (bins, layers, len(RUNGS))) * (1.05 - np.array(COSTS))
    damage[0, 0, 3] = np.inf
    jumps = np.array([*rng.uniform(0, 2, bins - 1), np.inf]) if jump else None
    return Problem(damage, np.array(COSTS), DENSITIES, rng.uniform(0.01, 0.2, (bins, layers)), jumps)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("budget", [0.0, 0.12, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_the_budget_is_met_exactly(budget, jump):
    """At every budget that can be reached, whatever price the search begins from; beyond, the nearest end."""
    p = problem(jump=jump)
    least, most = reach(p)
    for start in (0.0, 50.0, -50.0):
        gates = solve(p, budget, start=start)
        cost = float((gates.run[:, None] * (gates.p @ p.costs)).mean())
        assert gates.cost == pytest.approx(cost) and cost == pytest.approx(min(max(budget, least), most), rel=1e-7)
        assert np.allclose(gates.p.sum(-1), 1) and gates.p[0, 0, 3] == 0


def test_no_gates_of_that_cost_are_better():
    """Σ p · damage − temperature · entropy is least: every feasible direction raises it (closed form against random feasible moves)."""
    p = problem()
    gates = solve(p, 0.3)

    def objective(q):
        logs = np.log(np.where(q > 0, q, 1.0))
        return (np.where(q > 0, q * np.where(np.isfinite(p.damage), p.damage, 0), 0) + p.temperature[..., None] * q * logs).sum()

    rng, best = np.random.default_rng(1), objective(gates.p)
    for _ in range(50):
        other = solve(replace(p, damage=p.damage + rng.normal(size=p.damage.shape) * 0.05), 0.3).p
        assert objective(other) >= best - 1e-12 and float((other @ p.costs).mean()) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("jump", [False, True])
def test_gradient_of_the_optimum_is_the_gates_themselves(jump):
    """The envelope theorem by finite differences: d (least objective) / d damage = run · p, and d cost / d price = slope."""
    p, budget, h = problem(2, jump=jump), 0.3, 1e-5

    def least(q: Problem) -> float:
        """min over gates of Σ run (p · damage − temperature · entropy) + (1 − run) jump − row · entropy(run), by the dual."""
        gates = solve(q, budget)
        logits = -(q.damage + gates.price * q.costs) / q.temperature[..., None]
        allowed = np.isfinite(q.damage).sum(-1)
        free = -q.temperature * (np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1) / allowed) + logits.max(-1))
        free = free.sum(1)
        if q.jump is not None:
            row, rest = np.sqrt((q.temperature**2).sum(1)), np.where(np.isfinite(q.jump), q.jump, 1e9)
            low = np.minimum(free, rest)
            free = low - row * np.log(np.exp(-(free - low) / row) + np.exp(-(rest - low) / row))
        return free.sum() - gates.price * budget * q.damage.shape[0] * q.damage.shape[1]

    gates = solve(p, budget)
    for cell in [(0, 1, 2), (1, 3, 0), (2, 2, 10), (1, 0, 23)]:
        up, down = p.damage.copy(), p.damage.copy()
        up[cell] += h
        down[cell] -= h
        slope = (least(replace(p, damage=up)) - least(replace(p, damage=down))) / (2 * h)
        assert slope == pytest.approx(gates.run[cell[0]] * gates.p[cell], abs=1e-6)
    near = (at_price(p, gates.price + h).cost - at_price(p, gates.price - h).cost) / (2 * h)
    assert gates.slope == pytest.approx(near, rel=1e-5) and near < 0


def test_a_bound_on_density_is_kept_at_the_same_budget():
    p = problem(4)
    free = solve(p, 0.5)
    bound = 0.6 * free.density
    held = solve(p, 0.5, bound)
    assert held.density <= bound * (1 + 1e-6) and held.density > 0.95 * bound and held.cost == pytest.approx(0.5, rel=1e-7)
    assert solve(p, 0.5, free.density + 1e-6).density_price == 0.0


def test_gates_are_as_warm_as_damages_are_uncertain():
    """A cell that is known has one rung; a cell of the same damages that is not keeps its entropy."""
    p = problem(5)
    warmth = np.full(p.temperature.shape, 1e-4)
    warmth[1, 2] = 1.0
    entropy = solve(replace(p, temperature=warmth), 0.4).entropy()
    assert entropy[1, 2] > 0.8 and np.median(np.delete(entropy.flatten(), 6)) < 0.05
