"""The two policies without parameters: `StaticPolicy` and `EntropyPolicy`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from usv.policy import AXES, Decisions, allowed
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, SparsityPlan


def uniform_plan(
    edges,
    num_layers: int,
    costs: Sequence[float],
    target: float,
    merge: int | None = None,
    axes: Sequence[str] = tuple(AXES),
) -> SparsityPlan:
    """The uniform plan of a cost: between the two neighbouring rungs that straddle the target, in the share that meets it.

    One rung everywhere would miss the target by up to a rung; the two rungs are dealt out evenly over layers and bins, so
    no layer or timestep is preferred. `merge` fixes the merge rung, else the one is taken whose density comes closest to the
    density : merge balance of the target (0.25 merged at most costs, 0.5 below a third). `axes`: what may differ from dense.
    """
    rungs = sorted(((cost, rung) for cost, rung in zip(costs, RUNGS) if allowed(rung, axes)), key=lambda x: -x[0])
    if "merge" not in axes:
        merge = 0
    if merge is None:
        merge = 0 if target > 0.6 else 1 if target > 0.33 else 2 if target > 0.2 else 3
        while merge > 0 and max(cost for cost, rung in rungs if rung.merge == merge) < target:  # nothing of it is that dear
            merge -= 1
    ladder = [x for x in rungs if x[1].merge == merge] if "density" in axes else rungs
    if ladder[-1][0] > target:
        ladder = rungs
    above = min((x for x in ladder if x[0] >= target), default=ladder[0], key=lambda x: x[0])
    below = max((x for x in ladder if x[0] <= target), default=ladder[-1], key=lambda x: x[0])
    share = 1.0 if above[0] == below[0] else (target - below[0]) / (above[0] - below[0])
    rows, owed = [], 0.0
    for bin in range(len(edges)):
        row = []
        for _ in range(num_layers):
            owed += share
            row.append(above[1] if owed >= 1.0 - 1e-9 else below[1])
            owed -= 1.0 if row[-1] is above[1] and above[1] != below[1] else 0.0
        shift = bin % num_layers  # else a share of 1/2 would give the same layers more in every bin
        rows.append(tuple(row[-shift:] + row[:-shift]))
    return SparsityPlan(tuple(edges), tuple(rows))


class StaticPolicy:
    """The same cost everywhere, warmed down with the budget."""

    def __init__(self, edges, num_layers: int, costs: Sequence[float], merge: int | None = None, axes=tuple(AXES)):
        self.edges, self.num_layers, self.costs, self.merge, self.axes = (
            tuple(edges),
            num_layers,
            list(costs),
            merge,
            tuple(axes),
        )
        self.target = 1.0

    def decide(self, bin: int, generator: torch.Generator, content=None) -> Decisions:
        return Decisions(bin, self.decode(self.target).rungs[bin])

    def observe(self, decisions, damages, entropies) -> None:
        pass

    def set_budget(self, target: float) -> None:
        self.target = target

    def decode(self, target: float) -> SparsityPlan:
        return uniform_plan(self.edges, self.num_layers, self.costs, target, self.merge, self.axes)

    def state_dict(self) -> dict:
        return {"target": self.target}

    def load_state_dict(self, state: dict) -> None:
        self.target = state["target"]

    def summary(self) -> dict[str, float]:
        return {}


class EntropyPolicy:
    """The paper's parameter-free policy: sparsity of layer l at timestep t is proportional to (1 − h_tl)^gamma.

    h is the normalised entropy of the coarse attention map, a running mean of what the student measures; a low entropy is a
    concentrated map, which loses little. The proportion is set so that the plan's cost meets the target.
    """

    def __init__(
        self,
        edges,
        num_layers: int,
        costs: Sequence[float],
        gamma: float = 1.0,
        merge_share: float = 0.5,
        axes=tuple(AXES),
    ):
        self.axes = tuple(axes)
        self.edges, self.num_layers, self.costs = tuple(edges), num_layers, dict(zip(RUNGS, costs))
        self.gamma, self.merge_share, self.target = gamma, merge_share, 1.0
        self.entropy = torch.full((len(self.edges), num_layers), 0.5)
        self.seen = torch.zeros(len(self.edges), num_layers)
        self.cached: tuple | None = None

    def decide(self, bin: int, generator: torch.Generator, content=None) -> Decisions:
        return Decisions(bin, self.decode(self.target).rungs[bin])

    def observe(self, decisions, damages, entropies) -> None:
        for layer, value in entropies.items():
            self.seen[decisions.bin, layer] += 1
            rate = max(0.05, 1 / float(self.seen[decisions.bin, layer]))
            self.entropy[decisions.bin, layer] += rate * (value - self.entropy[decisions.bin, layer])
        self.cached = None

    def set_budget(self, target: float) -> None:
        self.target = target
        self.cached = None

    def _weight(self) -> torch.Tensor:
        return (1 - self.entropy).clamp_min(1e-3) ** self.gamma

    def _plan(self, amount: float) -> SparsityPlan:
        weight = self._weight()
        sparsity = (amount * weight / weight.mean()).clamp(0, 1 - DENSITY_LADDER[-1])
        merged = (self.merge_share * amount * weight / weight.mean()).clamp(0, MERGE_LADDER[-1])
        rows = []
        for row_s, row_m in zip(sparsity.tolist(), merged.tolist()):
            rungs = []
            for s, m in zip(row_s, row_m):
                density = min(range(len(DENSITY_LADDER)), key=lambda i: abs(DENSITY_LADDER[i] - (1 - s)))
                merge = min(range(len(MERGE_LADDER)), key=lambda i: abs(MERGE_LADDER[i] - m))
                rungs.append(Rung(density if "density" in self.axes else 0, merge if "merge" in self.axes else 0))
            rows.append(tuple(rungs))
        return SparsityPlan(self.edges, tuple(rows))

    def _cost(self, plan: SparsityPlan) -> float:
        rungs = [r for row in plan.rungs for r in row]
        return sum(self.costs[r] for r in rungs) / len(rungs)

    def decode(self, target: float) -> SparsityPlan:
        if self.cached is None or self.cached[0] != target:
            weight = self._weight()  # at `high` even the layer of least weight is at the end of both ladders
            low, high = 0.0, float(weight.mean() / weight.min()) * max(1.0, 1 / max(self.merge_share, 1e-3))
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (middle, high) if self._cost(self._plan(middle)) > target else (low, middle)
            self.cached = (target, self._plan(high))
        return self.cached[1]

    def state_dict(self) -> dict:
        return {"target": self.target, "entropy": self.entropy, "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.target, self.entropy, self.seen = state["target"], state["entropy"], state["seen"]
        self.cached = None

    def summary(self) -> dict[str, float]:
        return {"coarse_entropy": float(self.entropy.mean())}
