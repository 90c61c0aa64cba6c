"""Multi-choice knapsack: one rung for each cell of the plan, best total value within a mean cost; whole rows may be jumped.

Small tables by dynamic programming, exact up to the rounding of costs to a grid of `resolution` per cell; costs are rounded up, so the
budget is never exceeded. Tables beyond `EXACT` by price (Lagrangian relaxation) and a greedy filling of what is left: a plan of 30 layers
× 50 timesteps then takes a few milliseconds and is worse than the best by less than one cell's step is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from usv.sparse.plan import RUNGS, SparsityPlan

EXACT = 40_000_000  # cells · choices · units of cost up to which dynamic programming is used


def plan_of(
    edges: Sequence[float], damage: np.ndarray, costs: np.ndarray, budget: float, densities: np.ndarray | None = None,
    most_density: float = 1.0, jump: np.ndarray | None = None,
) -> SparsityPlan:  # fmt: skip
    """The plan of least total damage within a mean cost.

    Args:
        damage: (bins, layers, rungs), +inf forbids. costs, densities: (rungs,).
        most_density: bound on the mean density of what runs; density is then given the least price that meets it.
        jump: (bins,) damage of leaving a step out, +inf where it must run; None: all run.

    Raises:
        ValueError: no plan meets the budget, or the bound.
    """

    finite = np.abs(damage[np.isfinite(damage)])
    tie = 1e-7 * (finite.max() or 1.0)

    def solve(price: float) -> np.ndarray:
        values = tie * costs - damage  # of equals the dearer: a budget is there to be used
        if price:
            values = values - price * (densities - most_density)  # a jumped step is neither denser nor sparser
        if jump is None:
            return choose(values.reshape(-1, values.shape[-1]), costs, budget).reshape(values.shape[:2])
        return choose_rows(values, costs, -jump, budget)

    if most_density >= 1:
        chosen = solve(0.0)
    else:
        chosen = least_price(solve, lambda found: densities[found[found[:, 0] >= 0]].mean(), most_density)
    if chosen is None:
        raise ValueError(f"most_density: got {most_density}, but no plan of this budget is as sparse; raise one of them")
    runs = () if jump is None else tuple(bool(row[0] >= 0) for row in chosen)
    for bin in reversed(range(len(runs) - 1)):  # training still passes through the bins of jumped steps, as the step before runs
        if not runs[bin]:
            chosen[bin] = chosen[bin + 1]
    return SparsityPlan(tuple(edges), tuple(tuple(RUNGS[i] for i in row) for row in chosen), runs)


def by_price(values: np.ndarray, costs: np.ndarray, budget: float, jump: np.ndarray | None = None) -> np.ndarray:
    """(rows, cells) choices whose total cost is at most `budget`, those of the least price on cost that does it, then filled up.

    values, costs: (rows, cells, choices), -inf forbids. jump: (rows,) value of leaving a row out, whose choices are then -1.
    The caller has made sure that the cheapest choices meet the budget.
    """

    def at(price: float) -> tuple[np.ndarray, float]:
        worth = values - price * costs  # -inf stays
        chosen = worth.argmax(-1)
        if jump is not None:
            best = np.take_along_axis(worth, chosen[..., None], -1)[..., 0].sum(1)
            chosen[best < jump] = -1
        spent = np.take_along_axis(costs, np.maximum(chosen, 0)[..., None], -1)[..., 0]
        return chosen, float(spent[chosen >= 0].sum())

    chosen, spent = at(0.0)
    if spent > budget:
        low, high = 0.0, 1e-9
        while spent > budget and high < 1e30:
            low, high = high, 4 * high
            chosen, spent = at(high)
        # to a billionth of the price; what cells change their choice within that is found by filling up
        for _ in range(30):
            middle = (low + high) / 2
            tried, cost = at(middle)
            if cost <= budget:
                high, chosen, spent = middle, tried, cost
            else:
                low = middle
    return _fill(values, costs, chosen, budget - spent)


def _fill(values: np.ndarray, costs: np.ndarray, chosen: np.ndarray, left: float) -> np.ndarray:
    """Spend what is left, dearest value for its cost first."""
    rows, cells = np.nonzero(chosen >= 0)
    values, costs, now = values[rows, cells], costs[rows, cells], chosen[rows, cells]
    every = np.arange(len(now))
    for _ in range(20):
        more, better = costs - costs[every, now][:, None], values - values[every, now][:, None]
        fits = (better > 0) & (more <= left + 1e-12)
        ratio = np.where(fits, better / np.maximum(more, 1e-12), -np.inf)
        best = ratio.argmax(1)
        order = np.argsort(-ratio[every, best], kind="stable")
        moved = False
        for cell in order[: int(np.isfinite(ratio[every, best]).sum())]:
            if more[cell, best[cell]] <= left + 1e-12:
                now[cell], left, moved = best[cell], left - more[cell, best[cell]], True
        if not moved:
            break
    chosen = chosen.copy()
    chosen[rows, cells] = now
    return chosen


def least_price(solve: Callable, measure: Callable, most: float):
    """`solve(price)` at about the least price at which `measure` of it is at most `most`; None if no price does it."""
    low, high, found = 0.0, 1e-6, solve(0.0)
    if measure(found) <= most:
        return found
    while measure(found := solve(high)) > most:
        low, high = high, 4 * high
        if high > 1e9:
            return None
    for _ in range(12):
        middle = (low + high) / 2
        tried = solve(middle)
        low, high, found = (low, middle, tried) if measure(tried) <= most else (middle, high, found)
    return found


def choose(values: np.ndarray, costs: np.ndarray, mean_budget: float, resolution: int = 400) -> np.ndarray:
    """The choice of each cell.

    Args:
        values: (cells, choices), to be maximised in sum; -inf forbids.
        costs: (choices,) or (cells, choices), each in [0, 1].
        mean_budget: bound on the mean cost of the chosen.

    Returns:
        (cells,) int, index of the choice.

    Raises:
        ValueError: the cheapest choices already exceed the budget.
    """
    cells, choices = values.shape
    costs = np.broadcast_to(costs, values.shape)
    cheapest = np.where(np.isfinite(values), costs, np.inf).min(1).mean()
    if cheapest > mean_budget + 1e-9:
        raise ValueError(
            f"budget: got {mean_budget:.3f} of the dense cost, but the sparsest rungs cost {cheapest:.3f}; "
            f"give a budget of at least {cheapest:.3f}"
        )
    weight = np.ceil(costs * resolution - 1e-9).astype(int)
    capacity = int(np.floor(mean_budget * cells * resolution + 1e-9))
    if capacity < int(np.where(np.isfinite(values), weight, 1 << 30).min(1).sum()):  # only rounding stands between
        return np.where(np.isfinite(values), costs, np.inf).argmin(1)
    if cells * choices * capacity > EXACT:
        return by_price(values[None], costs[None], mean_budget * cells)[0]
    best = np.full(capacity + 1, -np.inf)
    best[0] = 0.0
    taken = np.zeros((cells, capacity + 1), dtype=np.int16)
    for cell in range(cells):
        following = np.full(capacity + 1, -np.inf)
        for choice in range(choices):
            w = weight[cell, choice]
            if w > capacity or not np.isfinite(values[cell, choice]):
                continue
            candidate = best[: capacity + 1 - w] + values[cell, choice]
            better = candidate > following[w:]
            following[w:][better] = candidate[better]
            taken[cell, w:][better] = choice
        best = following
    position, chosen = int(np.argmax(best)), np.zeros(cells, dtype=int)
    for cell in reversed(range(cells)):
        chosen[cell] = taken[cell, position]
        position -= weight[cell, chosen[cell]]
    return chosen


def choose_rows(
    values: np.ndarray, costs: np.ndarray, jump: np.ndarray, mean_budget: float, most: int = 2500
) -> np.ndarray:
    """As `choose`, for a table whose rows (steps) may also be left out at no cost.

    Args:
        values: (rows, layers, choices), to be maximised in sum over the rows that run.
        costs: (choices,), each in [0, 1].
        jump: (rows,), value of leaving a row out; -inf forbids.
        mean_budget: bound on the sum of costs / (rows · layers).
        most: units that the budget is divided into.

    Returns:
        (rows, layers) int, index of the choice, -1 in rows that are left out.

    Raises:
        ValueError: the rows that must run exceed the budget at their cheapest.
    """
    rows, layers, choices = values.shape
    budget = mean_budget * rows * layers
    least = np.where(np.isfinite(values), costs, np.inf).min(2).sum(1)
    if least[~np.isfinite(jump)].sum() > budget + 1e-9:
        needed = least[~np.isfinite(jump)].sum() / (rows * layers)
        raise ValueError(
            f"budget: got {mean_budget:.4f}, but the steps that must run cost {needed:.4f}; give at least that"
        )
    if rows * layers * choices * most > EXACT:
        return by_price(values, np.broadcast_to(costs, values.shape), budget, jump)
    unit = budget / most
    weight = np.ceil(costs / unit - 1e-9).astype(int)
    best, history = np.full(most + 1, -np.inf), []
    best[0] = 0.0
    for row in range(rows):
        inside = np.full(most + 1, -np.inf)  # value of this row's layers at each cost
        inside[0] = 0.0
        taken = np.zeros((layers, most + 1), dtype=np.int16)
        for layer in range(layers):
            following = np.full(most + 1, -np.inf)
            for choice in range(choices):
                w = weight[choice]
                if w > most or not np.isfinite(values[row, layer, choice]):
                    continue
                candidate = inside[: most + 1 - w] + values[row, layer, choice]
                better = candidate > following[w:]
                following[w:][better] = candidate[better]
                taken[layer, w:][better] = choice
            inside = following
        following, spent = best + jump[row], np.full(most + 1, -1)
        for w in np.flatnonzero(np.isfinite(inside)):
            candidate = best[: most + 1 - w] + inside[w]
            better = candidate > following[w:]
            following[w:][better] = candidate[better]
            spent[w:][better] = w
        history.append((spent, taken))
        best = following
    if not np.isfinite(best).any():  # only rounding stands between
        cheapest = np.where(np.isfinite(values), costs, np.inf).argmin(2)
        return np.where(np.isfinite(jump)[:, None], -1, cheapest)
    return _walk_back(history, weight, int(np.argmax(best)), layers)


def _walk_back(history: list, weight: np.ndarray, position: int, layers: int) -> np.ndarray:
    chosen = np.full((len(history), layers), -1)
    for row in reversed(range(len(history))):
        spent, taken = history[row]
        used = spent[position]
        if used < 0:
            continue
        position -= used
        for layer in reversed(range(layers)):
            chosen[row, layer] = taken[layer, used]
            used -= weight[chosen[row, layer]]
    return chosen
