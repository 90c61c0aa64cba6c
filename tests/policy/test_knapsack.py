"""usv/policy/knapsack.py against brute force, and its promise: never above the budget."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usv.policy.knapsack import choose, choose_rows


def brute_force(values, costs, budget):
    """Best total value over all choices whose mean cost meets the budget."""
    cells, choices = values.shape
    costs = np.broadcast_to(costs, values.shape)
    best = -np.inf
    for pick in itertools.product(range(choices), repeat=cells):
        if sum(costs[i, c] for i, c in enumerate(pick)) <= budget * cells + 1e-9:
            best = max(best, sum(values[i, c] for i, c in enumerate(pick)))
    return best


def total(values, chosen):
    return sum(values[i, c] for i, c in enumerate(chosen))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_best_where_costs_lie_on_the_grid(seed, per_cell):
    """With costs that are multiples of 1/resolution rounding plays no part: the value is the optimum exactly."""
    rng = np.random.default_rng(seed)
    cells, choices, resolution = int(rng.integers(1, 5)), int(rng.integers(1, 5)), 20
    costs = rng.integers(0, resolution + 1, (cells, choices) if per_cell else choices) / resolution
    values = rng.normal(size=(cells, choices))
    cheapest = np.broadcast_to(costs, values.shape).min(1).sum()
    budget = int(rng.integers(round(cheapest * resolution), cells * resolution + 1)) / (cells * resolution)
    chosen = choose(values, costs, budget, resolution)
    assert total(np.broadcast_to(costs, values.shape), chosen) <= budget * cells + 1e-9
    assert total(values, chosen) == pytest.approx(brute_force(values, costs, budget), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_never_above_the_budget(seed, position):
    """Costs off the grid, budgets from the cheapest possible to everything."""
    rng = np.random.default_rng(seed)
    values, costs = rng.normal(size=(4, 3)), rng.uniform(0.01, 1, 3)
    budget = costs.min() + position * (1 - costs.min())
    chosen = choose(values, costs, budget, resolution=50)
    assert costs[chosen].mean() <= budget + 1e-9
    coarser = brute_force(values, np.ceil(costs * 50) / 50, np.floor(budget * 200) / 200)
    assert total(values, chosen) >= coarser - 1e-9


def test_budget_of_exactly_the_cheapest():
    """Two rungs that round to one grid cost: at the cheapest budget the dearer one must not be taken for its value."""
    values, costs = np.array([[0.0, 1.0]] * 3), np.array([0.1001, 0.1024])
    assert choose(values, costs, 0.1001).tolist() == [0, 0, 0]


def test_forbidden_choices_are_never_taken():
    values = np.array([[-np.inf, 0.0], [1.0, -np.inf]])
    assert choose(values, np.array([0.1, 0.9]), 0.5).tolist() == [1, 0]


def test_unreachable_budget_is_refused():
    with pytest.raises(ValueError, match=r"budget: got 0\.100 .*at least 0\.200"):
        choose(np.zeros((3, 2)), np.array([0.2, 1.0]), 0.1)


def test_wan_sized_problem_meets_its_budget_closely():
    """30 layers × 8 bins × 24 rungs: within one grid step a cell of the budget where spending more always pays."""
    rng = np.random.default_rng(0)
    costs = np.sort(rng.uniform(0.05, 1, 24))
    values = np.log(costs)[None] * rng.uniform(0.5, 2, (240, 1))
    chosen = choose(values, costs, 0.3, resolution=100)
    assert 0.3 - 0.011 <= costs[chosen].mean() <= 0.3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_rows_may_be_left_out(seed):
    """choose_rows against brute force over jumps and choices, with costs on its grid; rows that must run do."""
    rng = np.random.default_rng(seed)
    rows, layers, choices = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    units, most = rng.integers(1, 11, choices), 40
    costs, values = units / 10, rng.normal(size=(rows, layers, choices))
    jump = rng.normal(size=rows)
    jump[-1] = -np.inf
    budget = max(most / 10, layers * costs.min()) / (rows * layers)  # 40 units of a tenth
    chosen = choose_rows(values, costs, jump, budget, round(budget * rows * layers * 10))
    best = -np.inf
    options = [-1, *itertools.product(range(choices), repeat=layers)]
    for pick in itertools.product(options, repeat=rows):
        spent = sum(costs[c] for p in pick if p != -1 for c in p)
        if spent <= budget * rows * layers + 1e-9:
            worth = sum(jump[r] if p == -1 else sum(values[r, i, c] for i, c in enumerate(p)) for r, p in enumerate(pick))
            best = max(best, worth)
    assert (chosen[-1] >= 0).all() and all((row >= 0).all() or (row == -1).all() for row in chosen)
    assert sum(costs[c] for c in chosen[chosen >= 0]) <= budget * rows * layers + 1e-9
    got = sum(jump[r] if row[0] < 0 else sum(values[r, i, c] for i, c in enumerate(row)) for r, row in enumerate(chosen))
    assert got == pytest.approx(best, abs=1e-9)


def test_steps_that_must_run_above_the_budget_are_refused():
    with pytest.raises(ValueError, match="the steps that must run cost 0.2500"):
        choose_rows(np.zeros((2, 1, 1)), np.array([0.5]), np.array([0.0, -np.inf]), 0.2)
