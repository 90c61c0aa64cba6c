"""What every rung does to the loss, remembered from the probes, with its uncertainty.

A probe says what one step along one ladder did in one layer at one timestep, once, with the noise of a batch. A slot (bin, layer,
step of a ladder) is probed once in tens of forwards, or never: at real Wan's size there are 1,920. So an estimate is

    posterior of a slot = its own running mean, weighed by its count against what a `prior` says
    prior   table:    means by kind, layer and timestep, as factors     network: `usv.policy.network`, over timestep, layer and input

and its variance says how little is known: gates are as warm as the standard deviation of what they choose by (`temperature`).
Noise is pooled over all slots of a kind (its probes differ in batch and in the other layers' rungs), and what is known is forgotten at
the rate `memory`, for the student adapts. A damage's unit is the caller's; nothing here knows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from usv.policy import AXES

WIDTH = sum(AXES.values())
FIRST = (0, AXES["density"])  # the first rungs, from which damage counts
STEPS = tuple(slot for slot in range(WIDTH) if slot not in FIRST)
GUMBEL = math.sqrt(6) / math.pi  # temperature of a Gumbel distribution of standard deviation 1


@dataclass(frozen=True)
class Estimate:
    """mean, std: (bins, layers, WIDTH) of the step from rung r − 1 to r of both ladders; 0 at the first rungs."""

    mean: torch.Tensor
    std: torch.Tensor

    def rungs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Damage of every rung over the first, (bins, layers, 6) and (bins, layers, 4).

        A step towards sparser counts as no better than none: where it was seen to be, that was noise, or a student used to it.
        """
        return tuple(axis.clamp_min(0).cumsum(-1) for axis in self.mean.split(list(AXES.values()), dim=-1))

    def temperature(self) -> torch.Tensor:
        """(bins, layers): Gumbel noise of this temperature strays as far as a step's damage may be off, geometric mean over steps."""
        return GUMBEL * self.std[..., list(STEPS)].clamp_min(1e-12).log().mean(-1).exp()


class DamageTable:
    """Running means of every slot's probes, and what follows from them. Everything is fp64: ranks and resumed runs agree.

    memory: least weight of a new probe in its slot's mean.
    """

    def __init__(self, bins: int, num_layers: int, memory: float = 0.1):
        self.memory, shape = memory, (bins, num_layers, WIDTH)
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.seen = torch.zeros(shape, dtype=torch.float64)
        self.noise = torch.zeros(WIDTH, 2, dtype=torch.float64)  # of each kind: sum of squared surprises, and their count

    def observe(self, bin: int, layer: int, slot: int, value: float) -> None:
        """One probe: the loss under rung `slot` less that under the rung before it."""
        cell, seen = (bin, layer, slot), float(self.seen[bin, layer, slot])
        surprise = value - float(self.mean[cell])
        if seen:  # the expected square of a surprise is the noise's, and that of the mean it is held against
            known = min(seen, 2 / self.memory)
            self.noise[slot] = 0.99 * self.noise[slot] + self.noise.new_tensor([surprise**2 * known / (known + 1), 1.0])
        self.seen[cell] += 1
        self.mean[cell] += max(self.memory, 1 / (seen + 1)) * surprise

    def noise_variance(self) -> torch.Tensor:
        """(WIDTH,) of a single probe of each kind; where none was seen twice, of all kinds, else the square of what was seen."""
        total, count = self.noise.unbind(-1)
        typical = total.sum() / count.sum() if count.sum() else (self.mean**2 * self.seen).sum() / self.seen.sum().clamp_min(1)
        typical = typical if typical > 0 else torch.ones_like(typical)
        return (total + 2 * typical) / (count + 2)

    def weight(self) -> torch.Tensor:
        """Probes that each slot's mean is worth: its count, until the memory forgets."""
        return self.seen.clamp_max(2 / self.memory - 1)

    def kinds(self) -> torch.Tensor:
        """(WIDTH,) mean of each kind of step over timesteps and layers; one never probed counts as twice the one before it on its ladder."""
        weight = self.weight()
        count, total = weight.sum((0, 1)), (self.mean * weight).sum((0, 1))
        mean = torch.zeros_like(total)
        for slot in STEPS:
            guess = 0.0 if slot - 1 in FIRST else 2 * mean[slot - 1]
            mean[slot] = (total[slot] + guess) / (count[slot] + 1)
        return mean

    def prior(self, without_own: bool = False) -> torch.Tensor:
        """(bins, layers, WIDTH): mean of the kind × factor of the layer × factor of the timestep × factor of this step in this layer.

        Each factor is the weighted mean of what the slots it is of have over the factors before it, shrunk to 1 by two probes' weight; so
        a layer that suffers is thought to suffer from steps that were never probed in it, too. `without_own`: the last factor without the
        slot it is asked for.
        """
        weight, kinds = self.weight(), self.kinds()
        base = kinds.clamp_min(1e-3 * kinds.abs().mean()).clamp_min(1e-30).expand_as(self.mean)
        for dims in ((0, 2), (1, 2), (0,)):
            ratio = weight * self.mean / base
            total, count = ratio.sum(dims, keepdim=True), weight.sum(dims, keepdim=True)
            if without_own and dims == (0,):
                total, count = total - ratio, count - weight
            base = base * ((total + 2) / (count + 2)).clamp_min(0.05)
        return base

    def spread(self, prior: torch.Tensor) -> torch.Tensor:
        """(WIDTH,) variance of the slots of a kind about a prior, beyond their noise; at least a hundredth of the noise."""
        noise, weight = self.noise_variance(), self.weight()
        known = (weight > 0).double()
        excess = ((self.mean - prior) ** 2 - noise / weight.clamp_min(1)) * known
        count = known.sum((0, 1))
        return ((excess.sum((0, 1)) + noise) / (count + 1)).clamp_min(0.01 * noise)

    def estimate(self, prior: torch.Tensor | None = None, variance: torch.Tensor | None = None) -> Estimate:
        """prior, variance: (bins, layers, WIDTH) of another's opinion, and of its error where it knows it; None: the table's own."""
        spread = self.spread(self.prior(without_own=True) if prior is None else prior)
        prior = self.prior() if prior is None else prior
        spread = spread.expand_as(prior)
        spread = spread if variance is None else spread + variance
        noise, weight = self.noise_variance(), self.weight()
        precision = weight / noise + 1 / spread
        mean = (self.mean * weight / noise + prior / spread) / precision
        std = precision.rsqrt()
        mean[..., list(FIRST)] = 0.0
        std[..., list(FIRST)] = 0.0
        return Estimate(mean, std)

    def state_dict(self) -> dict:
        return {"mean": self.mean.clone(), "seen": self.seen.clone(), "noise": self.noise.clone()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("mean", "seen", "noise"):
            mine = getattr(self, name)
            if state[name].shape != mine.shape:
                raise ValueError(f"policy.{name}: got a shape of {tuple(state[name].shape)}, this run's is {tuple(mine.shape)}")
            mine.copy_(state[name])
