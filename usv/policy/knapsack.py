"""Multi-choice knapsack: one rung for each cell of the plan, best total value within a mean cost; whole rows may be jumped.

Exact up to the rounding of costs to a grid of `resolution` per cell; costs are rounded up, so the budget is never exceeded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


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
