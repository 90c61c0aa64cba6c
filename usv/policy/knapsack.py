"""Multi-choice knapsack: one rung for each cell of the plan, best total value within a mean cost.

Exact up to the rounding of costs to a grid of `resolution` per cell; costs are rounded up, so the budget is never exceeded.
"""

from __future__ import annotations

import numpy as np


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
