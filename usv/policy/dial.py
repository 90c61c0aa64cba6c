"""One student, any budget: the damages that its policy learned travel with it, and the plan is decoded when it is asked for.

    {"damage": {"density": bins × layers × 6, "merge": bins × layers × 4}, "costs": (24,), "densities": (6,), "budgets": [smallest, largest], …}

stands in a student's config.json under "policy" (`carried`). A budget is a share of the dense forward: of its FLOPs, or of its
seconds on the machine at hand where a file of costs is given, and there a speed-up is the same thing the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from usv.policy import AXES, knapsack
from usv.sparse.measured import MeasuredCosts
from usv.sparse.plan import RUNGS, SparsityPlan


class BudgetError(ValueError):
    """A budget or speed-up that this student cannot be given; the message says which it can."""


@dataclass(frozen=True)
class Dial:
    """What a plan is decoded from. damage: (bins, layers, rungs), +inf forbids. budgets: smallest and largest that were trained for."""

    edges: tuple[float, ...]
    damage: np.ndarray
    costs: np.ndarray
    densities: np.ndarray
    most_density: float
    budgets: tuple[float, float]

    def plan(self, budget: float) -> SparsityPlan:
        """The plan of least damage within a share of the dense cost. BudgetError: not a number, or out of reach."""
        least, most = self.reach()
        budget = number("budget", budget)
        if not least - 1e-9 <= budget <= most + 1e-9:
            raise BudgetError(f"budget: got {budget:g}, accepted: {math.ceil(1e4 * least) / 1e4:g} to {most:g}, what this student was trained for, as a share of the dense cost")
        return self._decode(max(budget, self._least()))

    def reach(self) -> tuple[float, float]:
        """Smallest and largest budget."""
        return max(self._least(), self.budgets[0]), self.budgets[1]

    def _least(self) -> float:
        return float(np.where(np.isfinite(self.damage), self.costs, np.inf).min(-1).mean())

    def _decode(self, budget: float) -> SparsityPlan:
        return knapsack.plan_of(self.edges, self.damage, self.costs, budget, self.densities, self.most_density)

    def _cheapest(self) -> tuple[float, SparsityPlan] | None:
        """The least cost that can be decoded, and its plan. The cheapest rungs may be denser than most_density allows; None where all but dense ones are."""
        low, high, found = self._least(), float(self.costs[0]), None
        cost = low
        for _ in range(21):
            try:
                found, high = (cost, self._decode(cost)), cost
            except ValueError:
                low = cost
            if low == high:
                break
            cost = (low + high) / 2
        return found

    def timed(self, costs: MeasuredCosts) -> Dial:
        """The same damages, costs being shares of the dense forward's seconds."""
        own = np.asarray(costs.rung_costs())
        forbidden = np.broadcast_to(own > 1 + 1e-9, self.damage.shape)  # dearer than dense, and not better
        return replace(self, costs=own, damage=np.where(forbidden, np.inf, self.damage))

    def plan_in_seconds(self, share: float, costs: MeasuredCosts, name: str = "budget") -> SparsityPlan:
        """The plan of least damage whose predicted seconds are at most this share of the dense forward's.

        What switching between merged and other layers costs depends on the neighbours, which the knapsack does not see: its own
        budget is searched such that the prediction of the whole plan meets the share.
        """
        dial = self.timed(costs)
        if (cheapest := dial._cheapest()) is None:
            raise BudgetError(f"{name}: no plan is as sparse as this student was trained to be (most_density {self.most_density:g}) and cheaper than dense on this machine")
        (least, fastest), most = cheapest, float(dial.costs[0])
        bound = costs.plan_cost(fastest)
        if not bound <= share + 1e-9 <= most + 1e-9:
            accepted = f"{math.ceil(1e4 * bound) / 1e4:g} to 1 of the dense forward's seconds" if name == "budget" else f"1 to {math.floor(1e3 / bound) / 1e3:g}"
            raise BudgetError(f"{name}: got {share if name == 'budget' else 1 / share:g}, accepted: {accepted}, on this machine")
        low, high, found = least, most, fastest
        for _ in range(12):
            middle = (low + high) / 2
            plan = dial._decode(middle)
            cost = costs.plan_cost(plan)
            low, high = (middle, high) if cost <= share + 1e-9 else (low, middle)
            found = plan if costs.plan_cost(found) < cost <= share + 1e-9 else found
        return found


def number(name: str, value) -> float:
    """A finite float above 0. BudgetError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise BudgetError(f"{name}: got {value!r}, accepted: a number above 0, e.g. {'0.2' if name == 'budget' else '2.5'}")
    return float(value)


def carried(policy, budgets) -> dict:
    """What of a `GumbelPolicy` travels in the checkpoint. Nothing where it decides steps: these were trained for, and only these.

    budgets: [smallest, largest] of a dial, else (own, own).
    """
    if policy.steps:
        return {}
    density, merge = (axis.double().numpy().round(8).tolist() for axis in policy.rung_damage())
    return {
        "damage": {"density": density, "merge": merge}, "costs": policy.costs.round(8).tolist(), "densities": policy.ladder.round(8).tolist(),
        "axes": list(policy.axes), "merge_layers": policy.merge_layers, "most_density": policy.most_density, "budgets": [float(b) for b in budgets],
    }  # fmt: skip


def dial_of(record: Mapping, edges) -> Dial:
    """The Dial of a student's `policy` record and its plan's edges. BudgetError where it carries no damages, or damaged ones."""
    if "damage" not in record:
        raise BudgetError("budget: this student carries no damages, accepted: none; it runs the plan it was trained with. Train one with policy.budgets=[smallest,largest]")
    try:
        density, merge = (np.asarray(record["damage"][axis], dtype=np.float64) for axis in AXES)
        costs = np.asarray(record["costs"], dtype=np.float64)
        densities = np.asarray(record["densities"], dtype=np.float64)[[rung.density for rung in RUNGS]]
        damage = (merge[..., :, None] + density[..., None, :]).reshape(*density.shape[:2], len(RUNGS))
        for axis in AXES:
            if axis not in record["axes"]:
                damage[..., [getattr(rung, axis) > 0 for rung in RUNGS]] = np.inf
        damage[:, record["merge_layers"] :, [rung.merge > 0 for rung in RUNGS]] = np.inf
        if costs.shape != (len(RUNGS),) or damage.shape[0] != len(edges) or np.isnan(damage).any() or not np.isfinite(costs).all():
            raise ValueError(f"shapes {damage.shape} and {costs.shape}")
        return Dial(tuple(edges), damage, costs, densities, float(record["most_density"]), tuple(record["budgets"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BudgetError(f"budget: the damages that this student carries are not usable ({type(error).__name__}: {error}); load it without a budget") from None


def plan_for(record: Mapping, edges, budget=None, speedup=None, costs: MeasuredCosts | None = None) -> SparsityPlan:
    """The plan of a student for a budget, or for a speed-up on the machine whose costs are given.

    Args:
        record: the student's `policy`. edges: of its plan.
        budget: share of the dense forward's FLOPs, or with `costs` of its seconds. speedup: above 1, with `costs` only.

    Raises:
        BudgetError: both or neither, no number, out of reach (the message names what is), or a student without damages.
    """
    if (budget is None) == (speedup is None):
        raise BudgetError("budget, speedup: got both or neither, accepted: one of them")
    if speedup is not None and costs is None:
        raise BudgetError("speedup: got one without costs, accepted: with costs=FILE of python -m usv.bench costs on this machine; or give a budget")
    dial = dial_of(record, edges)
    if costs is None:
        return dial.plan(budget)
    if speedup is not None:
        return dial.plan_in_seconds(1 / number("speedup", speedup), costs, "speedup")
    return dial.plan_in_seconds(number("budget", budget), costs)
