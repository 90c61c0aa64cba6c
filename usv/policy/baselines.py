"""What a learned policy has to beat: a rule of two numbers, and a calibration of layers without gates. Trained like any policy.

    hand_rule      the first three quarters of the layers merge alike, all others nothing; one density everywhere (two neighbouring rungs,
                   dealt out evenly, where one would miss the budget). The two numbers: how many tokens merge, and the density.
    calibration    damages of every rung of every layer, the same at all timesteps, from the same probes as the learned policy's; the knapsack
                   over them, renewed every so often. No gates: what it runs is its plan, and its probes are drawn evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from usv.policy import AXES, Decisions, ProbeRequest, allowed, knapsack
from usv.policy.damage import DamageTable
from usv.policy.fixed import StaticPolicy
from usv.sparse.plan import MERGE_LADDER, RUNGS, Rung, SparsityPlan

MERGING = 0.75  # of the layers, the first


class HandRulePolicy(StaticPolicy):
    """See the module."""

    def decode(self, target: float) -> SparsityPlan:
        """The strongest merging at which the densest plan still costs the target; then the density that meets it.

        ValueError where no such plan is cheap enough.
        """
        by_rung = dict(zip(RUNGS, self.costs))
        merging = round(MERGING * self.num_layers) if "merge" in self.axes else 0

        def cost(density: int, merge: int) -> float:
            return (merging * by_rung[Rung(density, merge)] + (self.num_layers - merging) * by_rung[Rung(density, 0)]) / self.num_layers

        merges = range(len(MERGE_LADDER)) if merging else (0,)
        merge = max((m for m in merges if cost(0, m) >= target - 1e-9), default=0)
        rungs = range(AXES["density"]) if "density" in self.axes else (0,)
        costs = [cost(d, merge) for d in rungs]
        if min(costs) > target + 1e-9:
            raise ValueError(f"policy.budget: got {target:.3f}, but the hand rule's sparsest plan costs {min(costs):.3f}; give at least that")
        above = max((d for d in rungs if costs[d] >= target - 1e-9), default=0)
        below = min((d for d in rungs if costs[d] <= target + 1e-9), default=above)
        owed, spent, total, cells, rows = 0.0, 0.0, target * len(self.edges) * self.num_layers, [], []
        share = 1.0 if above == below else (target - costs[below]) / (costs[above] - costs[below])
        for _ in self.edges:
            for layer in range(self.num_layers):
                owed += share
                take = above if owed >= 1 - 1e-9 else below
                owed -= 1.0 if take == above and above != below else 0.0
                cells.append(Rung(take, merge if layer < merging else 0))
        spent = sum(by_rung[r] for r in cells)
        for index in reversed(range(len(cells))):  # the two kinds of layers differ in what a density saves
            if spent <= total + 1e-9:
                break
            if cells[index].density != below:
                spent += by_rung[Rung(below, cells[index].merge)] - by_rung[cells[index]]
                cells[index] = Rung(below, cells[index].merge)
        for start in range(0, len(cells), self.num_layers):
            rows.append(tuple(cells[start : start + self.num_layers]))
        return SparsityPlan(self.edges, tuple(rows))


class CalibrationPolicy(StaticPolicy):
    """See the module. probes: layers probed in each forward. renew: forwards from one plan to the next."""

    def __init__(
        self, edges, num_layers: int, costs: Sequence[float], probes: int = 2, axes=tuple(AXES), merge_layers: int | None = None, renew: int = 8
    ):  # fmt: skip
        super().__init__(edges, num_layers, costs, axes=axes)
        self.probes, self.renew, self.table, self.count = probes, renew, DamageTable(1, num_layers), 0
        merging = num_layers if merge_layers is None else merge_layers
        self.forbidden = np.array([[not allowed(r, axes) or (r.merge > 0 and i >= merging) for r in RUNGS] for i in range(num_layers)])
        self.plan: SparsityPlan | None = None

    def set_budget(self, target: float) -> None:
        if target != self.target:
            self.target, self.plan = target, None

    def decide(self, bin: int, generator: torch.Generator, content=None) -> Decisions:
        if self.plan is None:
            self.plan = self.decode(self.target)
        rungs, probes = self.plan.rungs[bin], []
        for layer in torch.randperm(self.num_layers, generator=generator)[: self.probes].tolist():
            options = []
            for axis in self.axes:
                for step in (-1, 1):
                    fields = {"density": rungs[layer].density, "merge": rungs[layer].merge}
                    fields[axis] += step
                    if 0 <= fields[axis] < AXES[axis] and not self.forbidden[layer, RUNGS.index(Rung(**fields))]:
                        options.append(ProbeRequest(layer, axis, Rung(**fields)))
            if options:  # a layer beyond merge_layers has none where density is not decided
                probes.append(options[int(torch.randint(len(options), (1,), generator=generator))])
        return Decisions(bin, rungs, tuple(probes))

    def observe(self, decisions: Decisions, damages: Mapping[int, float], entropies: Mapping[int, float]) -> None:
        for probe in decisions.probes:
            here, there = getattr(decisions.rungs[probe.layer], probe.axis), getattr(probe.other, probe.axis)
            slot = max(here, there) + (0 if probe.axis == "density" else AXES["density"])
            self.table.observe(0, probe.layer, slot, damages[probe.layer] * (1 if there > here else -1))
        self.count += 1
        if self.count % self.renew == 0:
            self.plan = None

    def decode(self, target: float) -> SparsityPlan:
        density, merge = self.table.estimate().rungs()
        damage = np.where(self.forbidden, np.inf, (merge[0][:, :, None] + density[0][:, None, :]).flatten(1).numpy())
        damage = damage + 1e-9 * (1 - np.asarray(self.costs))  # of what is not known apart, the denser
        return knapsack.plan_of(self.edges, np.broadcast_to(damage, (len(self.edges), *damage.shape)), np.asarray(self.costs), target)

    def state_dict(self) -> dict:
        return {"target": self.target, "table": self.table.state_dict(), "count": self.count, "plan": None if self.plan is None else self.plan.to_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.target, self.count = state["target"], state["count"]
        self.table.load_state_dict(state["table"])
        self.plan = None if state["plan"] is None else SparsityPlan.from_dict(state["plan"])
