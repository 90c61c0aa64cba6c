"""Gates in closed form: which rungs a layer runs, given what every rung does and costs, and what all may cost together.

    p[t, l, r]  =  softmax_r( −(damage[t, l, r] + price · cost[r] + density_price · density[r]) / temperature[t, l] )
    run[t]      =  sigmoid( (jump[t] − Σ_l free[t, l]) / temperature of the row ),    free = −temperature · log mean exp(…)

They minimise expected damage less temperature · entropy among all gates of an expected cost; the price is the one multiplier of
that bound. Expected cost falls with the price without a jump, so Newton's method within a bracket finds it, and the budget is met at
every step, to rounding: nothing is integrated over time, hence nothing winds up. Σ p · damage has the gradient p in damage along
the optimum (the envelope theorem), which `tests/policy/test_gates.py` checks against finite differences.

All in fp64 on the host: a table of 8 bins × 30 layers × 24 rungs takes about a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

CLOSE = 1e-9  # of the budget


@dataclass(frozen=True)
class Problem:
    """What gates are made from.

    Attributes:
        damage: (bins, layers, rungs) rise of the loss over the first rung; +inf forbids.
        costs: (rungs,) as fractions of the dense block. densities: (rungs,), what each executes.
        temperature: (bins, layers), in units of damage, above 0.
        jump: (bins,) damage of leaving a step out, +inf where it must run; None where all steps run.
    """

    damage: np.ndarray
    costs: np.ndarray
    densities: np.ndarray
    temperature: np.ndarray
    jump: np.ndarray | None = None


@dataclass(frozen=True)
class Gates:
    """p: (bins, layers, rungs), each row a distribution. run: (bins,) probability that a step runs. cost, density: expected.

    slope: d cost / d price. objective: least Σ run · p · damage + (1 − run) · jump − temperature · entropy, up to a constant.
    """

    p: np.ndarray
    run: np.ndarray
    cost: float
    density: float
    price: float
    density_price: float = 0.0
    slope: float = 0.0

    def entropy(self) -> np.ndarray:
        """(bins, layers) of each categorical, 1 = all allowed rungs alike."""
        allowed = np.maximum((self.p > 0).sum(-1), 2)
        logs = np.log(np.where(self.p > 0, self.p, 1.0))
        return -(self.p * logs).sum(-1) / np.log(allowed)


def at_price(problem: Problem, price: float, density_price: float = 0.0) -> Gates:
    """The gates of given prices."""
    prices = price * problem.costs + density_price * problem.densities
    logits = -(problem.damage + prices) / problem.temperature[..., None]
    top = logits.max(-1, keepdims=True)
    weight = np.exp(logits - top)
    total = weight.sum(-1, keepdims=True)
    p = weight / total
    cost = p @ problem.costs
    variance = (p @ problem.costs**2 - cost**2) / problem.temperature
    run, steeper = np.ones(len(p)), 0.0
    if problem.jump is not None:
        allowed = np.isfinite(problem.damage).sum(-1, keepdims=True)
        free = (-problem.temperature * (top + np.log(total / allowed))[..., 0]).sum(1)
        row = np.sqrt((problem.temperature**2).sum(1))
        run = 1 / (1 + np.exp(np.clip((free - problem.jump) / row, -700, 700)))
        steeper = -(run * (1 - run) / row * cost.sum(1) ** 2).sum()
    cells = cost.size
    slope = (steeper - (run[:, None] * variance).sum()) / cells
    density = float((run[:, None] * (p @ problem.densities)).sum() / max(run.sum() * p.shape[1], 1e-12))
    return Gates(p, run, float((run[:, None] * cost).sum() / cells), density, price, density_price, float(slope))


def reach(problem: Problem) -> tuple[float, float]:
    """Least and largest expected cost that gates can have."""
    allowed = np.isfinite(problem.damage)
    least = np.where(allowed, problem.costs, np.inf).min(-1)
    most = np.where(allowed, problem.costs, -np.inf).max(-1)
    if problem.jump is not None:
        least = least * ~np.isfinite(problem.jump)[:, None]
    return float(least.mean()), float(most.mean())


def solve(problem: Problem, budget: float, most_density: float = 1.0, start: float = 0.0) -> Gates:
    """The gates whose expected cost is the budget; where they would be denser than `most_density`, at the least price on density.

    start: a guess of the price, e.g. the last one. A budget beyond what can be reached gives the nearest that can.
    """
    found = _at_cost(problem, budget, 0.0, start)
    if most_density >= 1 or found.density <= most_density:
        return found
    low, high, scale = 0.0, 0.0, float(problem.temperature.mean())
    while found.density > most_density and high < 1e9 * scale:
        low, high = high, max(4 * high, scale)
        found = _at_cost(problem, budget, high, found.price)
    for _ in range(30):
        middle = (low + high) / 2
        tried = _at_cost(problem, budget, middle, found.price)
        low, high, found = (low, middle, tried) if tried.density <= most_density else (middle, high, found)
    return found


def _at_cost(problem: Problem, budget: float, density_price: float, start: float) -> Gates:
    least, most = reach(problem)
    if budget >= most - CLOSE or budget <= least + CLOSE:
        return _end(problem, budget > least + CLOSE, density_price)
    scale = float(problem.temperature.max())
    found = at_price(problem, start, density_price)
    low, high, step = (start, np.inf, scale) if found.cost > budget else (-np.inf, start, scale)
    while not (np.isfinite(low) and np.isfinite(high)):
        price = low + step if np.isfinite(low) else high - step
        found, step = at_price(problem, price, density_price), 4 * step
        low, high = (price, high) if found.cost > budget else (low, price)
    for _ in range(200):
        if abs(found.cost - budget) <= CLOSE * budget or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        newton = found.price - (found.cost - budget) / found.slope if found.slope < 0 else np.inf
        price = newton if low < newton < high else (low + high) / 2
        found = at_price(problem, price, density_price)
        low, high = (price, high) if found.cost > budget else (low, price)
    return found


def _end(problem: Problem, dense: bool, density_price: float) -> Gates:
    """One-hot gates of the dearest rungs, or of the cheapest."""
    worth = np.where(np.isfinite(problem.damage), problem.costs if dense else -problem.costs, -np.inf)
    p = np.zeros_like(problem.damage)
    np.put_along_axis(p, worth.argmax(-1)[..., None], 1.0, -1)
    jumps = problem.jump is not None and not dense
    run = (~np.isfinite(problem.jump)).astype(float) if jumps else np.ones(len(p))
    cost = float((run[:, None] * (p @ problem.costs)).mean())
    density = float((run[:, None] * (p @ problem.densities)).sum() / (run.sum() * p.shape[1]))
    return Gates(p, run, cost, density, -np.inf if dense else np.inf, density_price)


def warm(gates: Gates) -> float:
    """A price to start from that is a number."""
    return gates.price if np.isfinite(gates.price) else 0.0


def with_row(gates: Gates, problem: Problem, bin: int, damage: np.ndarray) -> Gates:
    """The same prices, one bin's damages (layers, rungs) being those of the input at hand."""
    if not np.isfinite(gates.price):
        return gates
    row = replace(problem, damage=damage[None], temperature=problem.temperature[bin : bin + 1], jump=None)
    p = gates.p.copy()
    p[bin] = at_price(row, gates.price, gates.density_price).p[0]
    return replace(gates, p=p)
