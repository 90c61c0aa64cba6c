"""The learned policy: a categorical over the ladders for every (timestep bin, layer), sampled by Gumbel-max.

    logits[t, l, axis] = time[t] + layer[l] + cell[t, l] + content · entropy[t, l]      p = softmax(logits / tau)
    step[t]: whether a few-step student runs at the t-th of its candidate timesteps at all,       run = sigmoid(step / tau)
    minimise  Σ_t [ run_t · Σ_l Σ_r p_r · damage_r + (1 − run_t) · damage of the jump ] / cells  +  λ1 · Δ + λ2 · Δ²  −  β · H,
              Δ = E[cost] − target,  the cost of a jumped step being zero

A hard choice gives the rungs that did not run no gradient. So in each forward a few layers also run a neighbouring rung and mix
both updates half and half; d loss / d mix is then loss(other) − loss(rung) for a loss quadratic in the update. A cell is probed
once in tens of steps, so these differences are remembered: `damage` is their running mean per (bin, layer, axis, pair),
and its cumulative sum along the ladder is what p is averaged over at *every* step. The budget is an augmented Lagrangian
on the exact expected cost; λ1 follows the violation. A bound on the mean density, where there is one, is held likewise.

Steps: the candidates are the upper edges of the bins, so a bin is a step; the first (pure noise) always runs. What a jump does is
the difference of two rollouts that share noise and all other steps, one with and one without it. A third one, dense, says what the
rungs of the first did to the samples: that relates the two kinds of damage, of samples and of the loss. A jump's damage is that of
the rungs it was measured under plus its own, so that both sides of the gate count from the dense step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from usv.policy import AXES, Decisions, ProbeRequest, knapsack
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, SparsityPlan


class GumbelPolicy(nn.Module):
    """See the module. `costs` are those of `plan.RUNGS`, as fractions of the dense block; `axes`: what is decided at all.

    most_density: bound on the mean density. merge_layers: only the first so many layers may merge. densities: what the density
    ladder executes at this grid, where counts of blocks are rounded up.
    """

    def __init__(
        self,
        edges: Sequence[float],
        num_layers: int,
        costs: Sequence[float],
        probes: int = 2,
        tau: float = 1.0,
        entropy_bonus: float = 0.01,
        memory: float = 0.1,
        budget_quadratic: float = 20.0,
        budget_rate: float = 0.02,
        init_keep: float = 3.0,
        axes: Sequence[str] = tuple(AXES),
        steps: bool = False,
        most_density: float = 1.0,
        merge_layers: int | None = None,
        densities: Sequence[float] = DENSITY_LADDER,
    ):
        super().__init__()
        self.edges, self.num_layers, self.probes, self.tau = tuple(edges), num_layers, probes, tau
        self.entropy_bonus, self.memory, self.init_keep = entropy_bonus, memory, init_keep
        self.budget_quadratic, self.budget_rate = budget_quadratic, budget_rate
        bins, width = len(self.edges), sum(AXES.values())
        self.time = nn.Parameter(torch.zeros(bins, 1, width))
        self.layer = nn.Parameter(torch.zeros(1, num_layers, width))
        self.cell = nn.Parameter(torch.zeros(bins, num_layers, width))
        self.content = nn.Parameter(torch.zeros(width))
        self.steps, self.most_density = steps, most_density
        self.step = nn.Parameter(torch.zeros(bins)) if steps else None
        self.register_buffer("jump_damage", torch.zeros(bins))  # to the samples, over the rollout with this step
        self.register_buffer("jump_base", torch.zeros(bins))  # to the loss, of the rungs that this step had there
        self.register_buffer("jump_seen", torch.zeros(bins))
        self.register_buffer("exchange", torch.zeros(2))  # of all rungs of a rollout: damage to the loss, to the samples
        keep = torch.zeros(width)
        keep[0] = keep[AXES["density"]] = init_keep
        self.axes = tuple(axes)
        for axis, part in zip(AXES, keep.split(list(AXES.values()))):
            if axis not in self.axes:
                part[1:] = -torch.inf  # the first rung, always
        start = keep.repeat(num_layers, 1)
        self.merge_layers = num_layers if merge_layers is None or "merge" not in self.axes else merge_layers
        start[self.merge_layers :, AXES["density"] + 1 :] = -torch.inf
        self.register_buffer("start", start)
        self.register_buffer("densities", torch.tensor(densities))
        self.register_buffer("costs", torch.tensor(costs).view(AXES["merge"], AXES["density"]))
        self.register_buffer("damage", torch.zeros(bins, num_layers, width))  # [..., r]: step from rung r − 1 to r
        self.register_buffer("seen", torch.zeros(bins, num_layers, width))
        self.register_buffer("entropy", torch.full((bins, num_layers), 0.5))
        self.register_buffer("multiplier", torch.tensor(0.0))
        self.register_buffer("density_multiplier", torch.tensor(0.0))

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(bins, layers, 6) of density and (bins, layers, 4) of merging."""
        total = self.start + self.time + self.layer + self.cell + self.content * (self.entropy[..., None] - 0.5)
        return total.split(list(AXES.values()), dim=-1)

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple((axis / self.tau).softmax(-1) for axis in self.logits())

    def run_probability(self) -> torch.Tensor:
        """(bins,) probability that the step at each bin's upper edge runs; 1 where steps are not decided."""
        if not self.steps:
            return self.jump_damage.new_ones(len(self.edges))
        run = ((self.step + self.init_keep) / self.tau).sigmoid()
        return torch.cat([run[:-1], torch.ones_like(run[-1:])])

    @torch.no_grad()
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

    def _damages_of(self, rows: Mapping[int, Sequence[Rung]]) -> dict[int, float]:
        """Known damage of a row of rungs, summed over its layers, by bin."""
        density, merge = (axis.tolist() for axis in self.rung_damage())
        return {b: sum(density[b][i][rung.density] + merge[b][i][rung.merge] for i, rung in enumerate(row)) for b, row in rows.items()}

    def exchange_rate(self) -> float:
        """Damage to the loss for one of samples. 1 until rungs are seen to do something to both."""
        loss, samples = (self.exchange.clamp_min(0) + 0.02).tolist()
        return min(max(loss / samples, 0.1), 10.0)

    def known_jump_damage(self) -> torch.Tensor:
        """(bins,) damage to the loss that a jump stands for, over a dense step.

        A step that was never jumped counts as the dearest of those that were (none: 1), not as free; one whose jump was seen to
        help, as one that does nothing.
        """
        seen = self.jump_seen > 0
        known = (self.jump_base + self.exchange_rate() * self.jump_damage).clamp_min(0)
        dearest = known[seen].max() if bool(seen.any()) else known.new_tensor(1.0)
        return torch.where(seen, known, dearest)

    @torch.no_grad()
    def decide(self, bin: int, generator: torch.Generator) -> Decisions:
        picks = []
        for axis in self.logits():
            uniform = torch.rand(axis[bin].shape, generator=generator).clamp_min(1e-9)
            picks.append((axis[bin] / self.tau - (-uniform.log()).log()).argmax(-1).tolist())
        rungs = tuple(Rung(d, m) for d, m in zip(*picks))
        order = [layer for layer in torch.randperm(self.num_layers, generator=generator).tolist() if self._open_axes(layer)][: self.probes]
        return Decisions(bin, rungs, tuple(self._probe(layer, rungs[layer], generator) for layer in order))

    def _open_axes(self, layer: int) -> list[str]:
        return [axis for axis in self.axes if axis != "merge" or layer < self.merge_layers]

    def _probe(self, layer: int, rung: Rung, generator: torch.Generator) -> ProbeRequest:
        axes = self._open_axes(layer)
        axis = axes[int(torch.randint(len(axes), (1,), generator=generator))]
        position, length = getattr(rung, axis), AXES[axis]
        step = 1 if int(torch.randint(2, (1,), generator=generator)) else -1
        step = 1 if position == 0 else -1 if position == length - 1 else step
        fields = {"density": rung.density, "merge": rung.merge, axis: position + step}
        return ProbeRequest(layer, axis, Rung(**fields))

    @torch.no_grad()
    def observe(self, decisions: Decisions, damages: Mapping[int, float], entropies: Mapping[int, float]) -> None:
        """`damages` are d loss / d mix relative to the loss (1 = the loss doubles)."""
        for probe in decisions.probes:
            here, there = getattr(decisions.rungs[probe.layer], probe.axis), getattr(probe.other, probe.axis)
            value = damages[probe.layer] if there > here else -damages[probe.layer]
            slot = max(here, there) + (0 if probe.axis == "density" else AXES["density"])
            cell = (decisions.bin, probe.layer, slot)
            self.seen[cell] += 1
            rate = max(self.memory, 1 / float(self.seen[cell]))
            self.damage[cell] += rate * (value - self.damage[cell])
        for layer, value in entropies.items():
            self.entropy[decisions.bin, layer] += 0.05 * (value - self.entropy[decisions.bin, layer])

    def filled_damage(self) -> torch.Tensor:
        """`damage`, with cells not probed yet taken from their layer's, then their slot's mean."""
        weight = self.seen.clamp_max(8)
        prior = torch.zeros_like(self.damage)
        for dims in ((0, 1), (0,)):
            total = weight.sum(dims, keepdim=True)
            mean = (self.damage * weight).sum(dims, keepdim=True)
            prior = (mean + 2 * prior) / (total + 2)
        return (self.damage * weight + 2 * prior) / (weight + 2)

    def rung_damage(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected loss increase of every rung over the first, (bins, layers, 6) and (bins, layers, 4).

        A step towards sparser counts as no better than none: where it was seen to be, that was noise, or a student used to it.
        """
        return tuple(axis.clamp_min(0).cumsum(-1) for axis in self.filled_damage().split(list(AXES.values()), dim=-1))

    def expected_cost(self) -> torch.Tensor:
        """E[cost] over bins and layers as a fraction of dense, exact and differentiable; a jumped step costs nothing."""
        density, merge = self.probabilities()
        cells = torch.einsum("tlm,md,tld->tl", merge, self.costs, density)
        return (self.run_probability()[:, None] * cells).mean()

    def expected_density(self) -> torch.Tensor:
        """E[density] over the bins and layers that run, differentiable."""
        density, run = self.probabilities()[0], self.run_probability()
        mean = (density * self.densities).sum(-1).mean(-1)
        return (run * mean).sum() / run.sum()

    def gate_entropy(self) -> torch.Tensor:
        """Mean entropy of the two categoricals, 1 = uniform."""
        parts = [-(p * p.clamp_min(1e-9).log()).sum(-1).mean() / np.log(p.shape[-1]) for p in self.probabilities()]
        if self.steps:
            run = self.run_probability()[:-1]
            both = torch.stack([run, 1 - run])
            parts.append(-(both * both.clamp_min(1e-9).log()).sum(0).mean() / np.log(2))
        return sum(parts) / len(parts)

    def loss(self, target: float) -> torch.Tensor:
        excess = self.expected_cost() - target
        run = self.run_probability()
        damage = sum((run[:, None] * (p * d).sum(-1)).mean() for p, d in zip(self.probabilities(), self.rung_damage()))
        damage = damage + ((1 - run) * self.known_jump_damage()).mean() / self.num_layers
        budget = self._held(self.multiplier, excess)
        if self.most_density < 1.0:  # reached when the budget has been warmed down to a half
            bound = self.most_density + (1 - self.most_density) * max(0.0, 2 * target - 1)
            budget = budget + self._held(self.density_multiplier, self.expected_density() - bound)
        return damage + budget - self.entropy_bonus * self.gate_entropy()

    def _held(self, multiplier: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
        """The augmented Lagrangian of excess ≤ 0; its multiplier follows the violation."""
        with torch.no_grad():
            multiplier.add_(self.budget_rate * excess.detach()).clamp_(min=0)
        return multiplier * excess + self.budget_quadratic * excess.clamp_min(0) ** 2

    @torch.no_grad()
    def decode(self, target: float) -> SparsityPlan:
        """The plan of least learned damage within the budget; gates break ties.

        Not the likeliest plan: near one-hot gates say which rung, and no longer by how much. Where `most_density` binds, density
        is given the least price that meets it.
        """
        plan = knapsack.least_price(lambda price: self._decode(target, price), self._mean_density, self.most_density)
        if plan is None:
            raise ValueError(f"most_density: got {self.most_density}, but no plan of this budget is as sparse; raise one of them")
        return plan

    def _decode(self, target: float, density_price: float) -> SparsityPlan:
        tie = 1e-6
        density, merge = (
            tie * gate.double().log_softmax(-1) - damage.double() for gate, damage in zip(self.logits(), self.rung_damage())
        )
        density = density - density_price * (self.densities.double() - self.most_density)  # a jumped step is neither denser nor sparser
        values = (merge[..., :, None] + density[..., None, :]).flatten(2).cpu().numpy()
        costs = self.costs.flatten().double().cpu().numpy()
        if not self.steps:
            chosen = knapsack.choose(values.reshape(-1, len(RUNGS)), costs, target).reshape(values.shape[:2])
            return SparsityPlan(self.edges, tuple(tuple(RUNGS[i] for i in row) for row in chosen))
        run = self.run_probability().double().clamp(1e-9, 1 - 1e-9).cpu().numpy()
        jump = tie * (np.log1p(-run) - np.log(run)) - self.known_jump_damage().double().cpu().numpy()
        jump[-1] = -np.inf
        chosen = knapsack.choose_rows(values, costs, jump, target)
        runs = tuple(bool(row[0] >= 0) for row in chosen)
        for bin in reversed(range(len(runs) - 1)):  # training still passes through the bins of jumped steps, as the step before runs
            if not runs[bin]:
                chosen[bin] = chosen[bin + 1]
        return SparsityPlan(self.edges, tuple(tuple(RUNGS[i] for i in row) for row in chosen), runs)

    def _mean_density(self, plan: SparsityPlan) -> float:
        """What the plan's attention executes, over the rows that run."""
        densities = self.densities.tolist()
        rungs = [rung for row in plan.running() for rung in row]
        return sum(densities[rung.density] for rung in rungs) / len(rungs)

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        _, merge = self.probabilities()
        steps = {"expected_steps": float(self.run_probability().sum())} if self.steps else {}
        return steps | {
            "gate_entropy": float(self.gate_entropy()),
            "temperature": float(self.tau),
            "expected_cost": float(self.expected_cost()),
            "expected_density": float(self.expected_density()),
            "expected_merged": float((merge * merge.new_tensor(MERGE_LADDER)).sum(-1).mean()),
            "budget_multiplier": float(self.multiplier),
        }
