"""The learned policy: damages from probes, gates from damages in closed form, decisions by Gumbel draws.

    probe                a few layers of each forward also run a neighbouring rung and mix both updates half and half; d loss / d mix is
                         then loss(other) − loss(rung) for a loss quadratic in the update: the one thing that is learned from
    damage               of every slot, with its uncertainty: a table (`input=none`), or a network over timestep and layer (`place`), or over
                         these and what is known of the input (`content`)                          usv/policy/damage.py, network.py
    gates                softmax of −(damage + price · cost) / temperature, the price such that the expected cost is the budget; as warm as
                         the damages are uncertain, so that exploration ends where it is known, and only there   usv/policy/gates.py
    decision             one rung a layer by Gumbel-max of the gates; probes are drawn where least is known
    plan                 the knapsack over the damages: exact integers within the budget

Steps: the candidates are the upper edges of the bins, so a bin is a step; the first (pure noise) always runs. What a jump does is
the difference of two rollouts that share noise and all other steps, one with and one without it. A third one, dense, says what the
rungs of the first did to the samples: that relates the two kinds of damage, of samples and of the loss. A jump's damage is that of
the rungs it was measured under plus its own, so that both sides of the gate count from the dense step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from usv.policy import AXES, Decisions, ProbeRequest, allowed, knapsack
from usv.policy.content import CONTENT
from usv.policy.damage import DamageTable, Estimate
from usv.policy.gates import Gates, Problem, solve, warm, with_row
from usv.policy.network import DamageNetwork
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, SparsityPlan

INPUTS = ("none", "place", "content")


class GumbelPolicy:
    """See the module. `costs` are those of `plan.RUNGS`, as fractions of the dense block; `axes`: what is decided at all.

    input: what damages are told from, none | place | content. most_density: bound on the mean density. merge_layers: only the first so
    many layers may merge. densities: what the density ladder executes at this grid, where counts of blocks are rounded up.
    """

    def __init__(
        self,
        edges: Sequence[float],
        num_layers: int,
        costs: Sequence[float],
        probes: int = 2,
        input: str = "none",
        memory: float = 0.1,
        axes: Sequence[str] = tuple(AXES),
        steps: bool = False,
        most_density: float = 1.0,
        merge_layers: int | None = None,
        densities: Sequence[float] = DENSITY_LADDER,
    ):
        self.edges, self.num_layers, self.probes, self.input = tuple(edges), num_layers, probes, input
        self.axes, self.steps, self.most_density, self.memory = tuple(axes), steps, most_density, memory
        self.merge_layers = num_layers if merge_layers is None or "merge" not in self.axes else merge_layers
        self.costs, self.ladder = np.asarray(costs, dtype=np.float64), np.asarray(densities, dtype=np.float64)
        self.densities = self.ladder[[rung.density for rung in RUNGS]]
        bins = len(self.edges)
        self.table = DamageTable(bins, num_layers, memory)
        self.network = None if input == "none" else DamageNetwork(bins, num_layers, CONTENT if input == "content" else 0)
        dearer = self.costs > self.costs[0] + 1e-9  # than dense, in seconds of some machine: no better, and no cheaper
        self.forbidden = np.array([[not allowed(r, self.axes) or (r.merge > 0 and i >= self.merge_layers) for r in RUNGS] for i in range(num_layers)]) | dearer
        self.jump_damage = torch.zeros(bins)  # to the samples, over the rollout with this step
        self.jump_base = torch.zeros(bins)  # to the loss, of the rungs that this step had there
        self.jump_seen = torch.zeros(bins)
        self.exchange = torch.zeros(2)  # of all rungs of a rollout: damage to the loss, to the samples
        self.target, self.price = 1.0, 0.0
        self._estimate: Estimate | None = None
        self._told: tuple[torch.Tensor, torch.Tensor] | None = None  # what the network said of a mean input, when the estimate was made
        self._gates: Gates | None = None

    # ---- damages -----------------------------------------------------------------------------------------------------

    def estimate(self) -> Estimate:
        """Damages as known now, of a mean input."""
        if self._estimate is None:
            if self.network is None or not self.network.ready:
                self._estimate = self.table.estimate()
            else:
                self._told = self.network.predict(self.network.typical_input())
                self._estimate = self.table.estimate(*self._told)
        return self._estimate

    def rung_damage(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected loss increase of every rung over the first, (bins, layers, 6) and (bins, layers, 4)."""
        return self.estimate().rungs()

    def _joint(self, density: torch.Tensor, merge: torch.Tensor) -> np.ndarray:
        """(…, layers, rungs) damage of both axes together, +inf where it is not allowed."""
        total = (merge[..., :, None] + density[..., None, :]).flatten(-2).numpy()
        return np.where(self.forbidden, np.inf, total)

    @torch.no_grad()
    def observe(self, decisions: Decisions, damages: Mapping[int, float | Sequence[float]], entropies: Mapping[int, float]) -> None:
        """`damages`: d loss / d mix of the probed layers, in one unit throughout; of every clip, or their mean."""
        for probe in decisions.probes:
            here, there = getattr(decisions.rungs[probe.layer], probe.axis), getattr(probe.other, probe.axis)
            values = np.atleast_1d(np.asarray(damages[probe.layer], dtype=np.float64)) * (1 if there > here else -1)
            slot = max(here, there) + (0 if probe.axis == "density" else AXES["density"])
            self.table.observe(decisions.bin, probe.layer, slot, float(values.mean()))
            if self.network is None:
                continue
            if decisions.content is None:
                self.network.observe(decisions.bin, probe.layer, slot, float(values.mean()))
            else:
                for value, content in zip(np.broadcast_to(values, len(decisions.content)), decisions.content, strict=True):
                    self.network.observe(decisions.bin, probe.layer, slot, float(value), content)
        if self.network is not None:
            for layer, value in entropies.items():
                self.network.entropy[decisions.bin, layer] += 0.05 * (value - self.network.entropy[decisions.bin, layer])
            self.network.fit(self.table.noise_variance(), self.table.prior())
        self._estimate = self._gates = None

    # ---- steps -------------------------------------------------------------------------------------------------------

    def run_probability(self) -> torch.Tensor:
        """(bins,) probability that the step at each bin's upper edge runs; 1 where steps are not decided."""
        return torch.from_numpy(self.gates().run)

    def decide_steps(self, generator: torch.Generator) -> tuple[bool, ...]:
        """Which candidate steps a rollout runs, by bin."""
        return tuple((torch.rand(len(self.edges), generator=generator) < self.run_probability()).tolist())

    @torch.no_grad()
    def observe_jump(self, bin: int, jump: float, cut: float = 0.0, rows: Mapping[int, Sequence[Rung]] | None = None) -> None:
        """What a rollout without this step did, and what its rungs did.

        Args:
            jump: how much worse its samples were than those with the step; cut: how much worse those were than with the same steps
                dense; both relative to the latter.
            rows: the rungs of the steps that ran, this one's among them, by bin.
        """
        damages = self._damages_of(rows or {})
        self.jump_seen[bin] += 1
        rate = max(self.memory, 1 / float(self.jump_seen[bin]))
        self.jump_damage[bin] += rate * (jump - self.jump_damage[bin])
        self.jump_base[bin] += rate * (damages.get(bin, 0.0) - self.jump_base[bin])
        if damages:
            seen = float(self.jump_seen.sum())
            self.exchange += max(self.memory, 1 / seen) * (self.exchange.new_tensor([sum(damages.values()), cut]) - self.exchange)
        self._gates = None

    def _damages_of(self, rows: Mapping[int, Sequence[Rung]]) -> dict[int, float]:
        """Known damage of a row of rungs, summed over its layers, by bin."""
        density, merge = (axis.tolist() for axis in self.rung_damage())
        return {b: sum(density[b][i][rung.density] + merge[b][i][rung.merge] for i, rung in enumerate(row)) for b, row in rows.items()}

    def exchange_rate(self) -> float:
        """Damage to the loss for one of samples. 1 until rungs are seen to do something to both."""
        loss, samples = (self.exchange.clamp_min(0) + 0.02).tolist()
        return min(max(loss / samples, 0.01), 10.0)

    def known_jump_damage(self) -> torch.Tensor:
        """(bins,) damage to the loss that a jump stands for, over a dense step.

        A step that was never jumped counts as the dearest of those that were (none: 1), not as free; one whose jump was seen to
        help, as one that does nothing.
        """
        seen = self.jump_seen > 0
        known = (self.jump_base + self.exchange_rate() * self.jump_damage).clamp_min(0)
        dearest = known[seen].max() if bool(seen.any()) else known.new_tensor(1.0)
        return torch.where(seen, known, dearest)

    # ---- gates -------------------------------------------------------------------------------------------------------

    def set_budget(self, target: float) -> None:
        """What a forward may cost on average, as a fraction of the dense one (with `steps`: all of them, of as many dense ones)."""
        if target != self.target:
            self.target, self._gates = target, None

    def _jump(self) -> np.ndarray | None:
        """(bins,) damage of not running each step, +inf for the first; None where steps are not decided."""
        if not self.steps:
            return None
        jump = self.known_jump_damage().double().numpy().copy()
        jump[-1] = np.inf
        return jump

    def problem(self) -> Problem:
        """What the gates are made from."""
        estimate = self.estimate()
        return Problem(self._joint(*estimate.rungs()), self.costs, self.densities, estimate.temperature().numpy(), self._jump())

    def gates(self) -> Gates:
        """The gates at this budget."""
        if self._gates is None:
            bound = self.most_density + (1 - self.most_density) * max(0.0, 2 * self.target - 1)  # met when the budget has come down to a half
            self._gates = solve(self.problem(), self.target, bound, self.price)
            self.price = warm(self._gates)
        return self._gates

    def decide(self, bin: int, generator: torch.Generator, content: torch.Tensor | None = None) -> Decisions:
        """content: (B, CONTENT) of the batch's inputs, of which the policy looks at their mean."""
        content = content if self.input == "content" else None
        gates = self.gates() if content is None or not self.network.ready else self._gates_of(bin, content)
        uniform = torch.rand(self.num_layers, len(RUNGS), generator=generator, dtype=torch.float64).clamp_min(1e-300).numpy()
        with np.errstate(divide="ignore"):
            picks = (np.log(gates.p[bin]) - np.log(-np.log(uniform))).argmax(-1)
        rungs = tuple(RUNGS[i] for i in picks)
        return Decisions(bin, rungs, self._probes(bin, rungs, generator), content)

    def _gates_of(self, bin: int, content: torch.Tensor) -> Gates:
        """The gates with the row of one bin told from the input, at the price that meets the budget over all inputs."""
        return with_row(self.gates(), self.problem(), bin, self._joint(*self.network_row(bin, content)))

    def network_row(self, bin: int, content: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Damage of every rung at an input, (layers, 6) and (layers, 4): the estimate, moved as the network says the input moves it."""
        rows = slice(bin, bin + 1)
        moved = self.estimate().mean[rows] + self.network.predict(content.mean(0), [bin])[0] - self._told[0][rows]
        return tuple(axis[0] for axis in Estimate(moved, moved).rungs())

    def _probes(self, bin: int, rungs: tuple[Rung, ...], generator: torch.Generator) -> tuple[ProbeRequest, ...]:
        """Layers and neighbouring rungs, drawn in proportion to how little is known of the step between."""
        std = self.estimate().std[bin]
        options, weights = [], []
        for layer, rung in enumerate(rungs):
            for axis, offset in zip(AXES, (0, AXES["density"])):
                position = getattr(rung, axis)
                for other in (position - 1, position + 1):
                    fields = {"density": rung.density, "merge": rung.merge, axis: other}
                    if 0 <= other < AXES[axis] and not self.forbidden[layer, RUNGS.index(Rung(**fields))]:
                        options.append(ProbeRequest(layer, axis, Rung(**fields)))
                        weights.append(float(std[layer, offset + max(position, other)]))
        chosen: dict[int, ProbeRequest] = {}
        weights = torch.tensor(weights, dtype=torch.float64).clamp_min(1e-300)
        noise = -torch.rand(len(options), generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
        for index in (noise / weights).argsort().tolist():  # Gumbel top-k, one a layer
            if len(chosen) == self.probes:
                break
            chosen.setdefault(options[index].layer, options[index])
        return tuple(chosen.values())

    # ---- what is reported, and the plan ------------------------------------------------------------------------------

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(bins, layers, 6) of density and (bins, layers, 4) of merging: the gates' marginals."""
        p = torch.from_numpy(self.gates().p).unflatten(-1, (AXES["merge"], AXES["density"]))
        return p.sum(-2), p.sum(-1)

    def decode(self, target: float) -> SparsityPlan:
        """The plan of least learned damage within the budget; of equals the likelier at this budget.

        Not the likeliest plan: gates say which rung, and not by how much. Where `most_density` binds, density is given the least
        price that meets it.
        """
        damage = self._joint(*self.rung_damage())
        return knapsack.plan_of(self.edges, damage, self.costs, target, self.densities, self.most_density, self._jump())

    def state_dict(self) -> dict:
        tensors = {name: getattr(self, name).clone() for name in ("jump_damage", "jump_base", "jump_seen", "exchange")}
        network = {} if self.network is None else {"network": self.network.state()}
        return {"input": self.input, "table": self.table.state_dict(), "target": self.target, "price": self.price, **tensors, **network}

    def load_state_dict(self, state: dict) -> None:
        """ValueError for a state of another input or shape."""
        if state["input"] != self.input:
            raise ValueError(f"policy.input: got a state of {state['input']}, this run's is {self.input}")
        self.table.load_state_dict(state["table"])
        for name in ("jump_damage", "jump_base", "jump_seen", "exchange"):
            getattr(self, name).copy_(state[name])
        if self.network is not None:
            self.network.load_state(state["network"])
        self.target, self.price = state["target"], state["price"]
        self._estimate = self._gates = None

    def summary(self) -> dict[str, float]:
        gates, estimate = self.gates(), self.estimate()
        merged = gates.p @ np.array([MERGE_LADDER[rung.merge] for rung in RUNGS])
        steps = {"expected_steps": float(gates.run.sum())} if self.steps else {}
        probed = self.table.seen[..., 1:] > 0
        return steps | {
            "gate_entropy": float(gates.entropy().mean()),
            "temperature": float(estimate.temperature().mean()),
            "expected_cost": gates.cost,
            "expected_density": gates.density,
            "expected_merged": float(merged.mean()),
            "budget_price": gates.price,
            "slots_probed": float(probed.sum()) / (probed.shape[0] * probed.shape[1] * (sum(AXES.values()) - len(AXES))),
        }
