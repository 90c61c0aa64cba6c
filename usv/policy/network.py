"""The damage network: one small ensemble that says what any rung does, also in slots that were never probed.

    (timestep, layer, axis and rung, coarse entropy[, text, latents])  --MLP × members-->  softplus  × the table's prior  =  damage of one step

It is fitted to the probes that run anyway, all of which are kept (the last `capacity`, older ones at less weight), a few minibatches
after each forward. Members differ in their start, in a fixed random function added to each (so that they disagree where nothing was
seen) and in which probes they see how often; their spread is the network's uncertainty. Positions pool over timesteps and layers: a
probe teaches its neighbours, which a table cannot. Source: deep ensembles (arXiv 1612.01474) with randomised priors (1806.03335).

Everything it draws comes from a generator that its state holds, so that a resumed run goes on exactly, and ranks decide alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from usv.policy.damage import STEPS, WIDTH

MEMBERS, HIDDEN, EMBEDDING = 6, 32, 4
CHUNK = 1024  # slots told at once: the members' activations then stay in a core's cache
PLACES = 6  # features of a position in [0, 1]


def place(x: torch.Tensor) -> torch.Tensor:
    """(…,) in [0, 1] -> (…, PLACES) smooth features."""
    turns = math.pi * x
    return torch.stack([2 * x - 1, (2 * x - 1) ** 2, turns.sin(), turns.cos(), (2 * turns).sin(), (2 * turns).cos()], -1)


class DamageNetwork(nn.Module):
    """An ensemble over slots.

    Args:
        bins, num_layers: of the plan's table. content: numbers that describe an input, 0: it sees none.
        capacity: probes kept. half_life: of a probe's weight, in probes. updates: minibatches after each forward.
    """

    def __init__(self, bins: int, num_layers: int, content: int = 0, capacity: int = 4096, half_life: float = 1024.0, updates: int = 4, seed: int = 0):
        super().__init__()
        self.bins, self.num_layers, self.content = bins, num_layers, content
        self.capacity, self.half_life, self.updates = capacity, half_life, updates
        self.generator = torch.Generator().manual_seed(seed)
        width = 2 * PLACES + EMBEDDING + len(STEPS) + 1 + content
        normal = lambda *shape: torch.randn(*shape, generator=self.generator)  # noqa: E731
        self.embedding = nn.Parameter(0.3 * normal(num_layers, EMBEDDING))
        for name, (fan_in, fan_out) in {"first": (width, HIDDEN), "second": (HIDDEN, HIDDEN), "last": (HIDDEN, 1)}.items():
            self.register_parameter(name, nn.Parameter(normal(MEMBERS, fan_in, fan_out) / math.sqrt(fan_in)))
            self.register_parameter(name + "_bias", nn.Parameter(torch.zeros(MEMBERS, 1, fan_out)))
        self.register_buffer("prior_first", normal(MEMBERS, width, HIDDEN) / math.sqrt(width))
        self.register_buffer("prior_last", normal(MEMBERS, HIDDEN, 1) / math.sqrt(HIDDEN))
        self.register_buffer("scale", torch.ones(bins, num_layers, WIDTH))  # what the table's factors make of each slot
        self.register_buffer("entropy", torch.full((bins, num_layers), 0.5))
        self.register_buffer("probes", torch.zeros(0, 3, dtype=torch.int64))  # bin, layer, slot
        self.register_buffer("values", torch.zeros(0))
        self.register_buffer("inputs", torch.zeros(0, content))
        self.register_buffer("counts", torch.zeros(0, MEMBERS))  # how often a member sees a probe
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=1e-3)

    def features(self, probes: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        """(N, 3) of bin, layer, slot and (N, content) -> (N, width)."""
        bin, layer, slot = probes.unbind(-1)
        kind = torch.zeros(len(probes), WIDTH).scatter_(1, slot[:, None], 1.0)[:, list(STEPS)]
        time, depth = (bin + 0.5) / self.bins, (layer + 0.5) / self.num_layers
        return torch.cat([place(time), place(depth), self.embedding[layer], kind, 2 * self.entropy[bin, layer, None] - 1, content], -1)

    def forward(self, probes: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        """(MEMBERS, N) damage of a step by every member, in the caller's unit."""
        x = self.features(probes, content).expand(MEMBERS, -1, -1)  # a product that broadcasts costs five times one of equal batches
        prior = x.bmm(self.prior_first).tanh_().bmm(self.prior_last)
        x = nn.functional.silu(torch.baddbmm(self.first_bias, x, self.first))
        x = nn.functional.silu(torch.baddbmm(self.second_bias, x, self.second))
        out = (torch.baddbmm(self.last_bias, x, self.last) + prior)[..., 0]
        return nn.functional.softplus(out) / math.log(2) * self.scale[tuple(probes.T)]

    @torch.no_grad()
    def observe(self, bin: int, layer: int, slot: int, value: float, content: torch.Tensor | None = None) -> None:
        """Keep a probe."""
        row = torch.tensor([[bin, layer, slot]])
        seen = torch.zeros(1, self.content) if content is None else content.float().view(1, -1)
        counts = torch.poisson(torch.ones(1, MEMBERS), generator=self.generator)
        parts = {"probes": row, "values": torch.tensor([float(value)]), "inputs": seen, "counts": counts}
        for name, part in parts.items():
            setattr(self, name, torch.cat([getattr(self, name), part])[-self.capacity :])

    @torch.enable_grad()
    def fit(self, noise_variance: torch.Tensor, prior: torch.Tensor, batch: int = 128) -> None:
        """A few minibatches.

        noise_variance: (WIDTH,) of a probe of each kind, in units of which it is missed. prior: (bins, layers, WIDTH) of the table, which
        the output multiplies: the network says only what factors of kind, layer and timestep do not.
        """
        if not self.ready:
            return
        self.scale.copy_(prior)
        age = torch.arange(len(self.values) - 1, -1, -1)
        weight = self.counts.T * 0.5 ** (age / self.half_life)
        sigma = noise_variance.float().clamp_min(1e-24).sqrt()[self.probes[:, 2]]
        with torch.autocast("cpu", enabled=False):
            for _ in range(self.updates):
                index = torch.randint(len(self.values), (min(batch, len(self.values)),), generator=self.generator)
                found = self(self.probes[index], self.inputs[index])
                residual = (found - self.values[index]) / sigma[index]
                loss = nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=2.5)
                loss = (loss * weight[:, index]).sum() / weight[:, index].sum().clamp_min(1e-12)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()

    @property
    def ready(self) -> bool:
        """Whether it has seen enough to say anything."""
        return len(self.values) >= 8

    def typical_input(self) -> torch.Tensor | None:
        """(content,) mean of the inputs seen, where it looks at any."""
        return self.inputs.mean(0) if self.content and len(self.inputs) else None

    @torch.no_grad()
    def predict(self, content: torch.Tensor | None = None, bins: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(bins, layers, WIDTH) mean and variance over members, fp64, for one input (content,) and these bins, all by default."""
        bins = range(self.bins) if bins is None else bins
        grid = torch.cartesian_prod(torch.tensor(list(bins)), torch.arange(self.num_layers), torch.tensor(STEPS))
        seen = torch.zeros(self.content) if content is None else content.float()
        with torch.autocast("cpu", enabled=False):
            found = torch.cat([self(part, seen.expand(len(part), -1)) for part in grid.split(CHUNK)], 1).double()
        shape = (len(bins), self.num_layers, len(STEPS))
        mean, variance = (torch.zeros(*shape[:2], WIDTH, dtype=torch.float64) for _ in range(2))
        mean[..., list(STEPS)], variance[..., list(STEPS)] = found.mean(0).view(shape), found.var(0).view(shape)
        return mean, variance

    def state(self) -> dict:
        """Everything, the optimiser's moments and the generator included."""
        return {"network": self.state_dict(), "optimizer": copy.deepcopy(self.optimizer.state_dict()), "generator": self.generator.get_state()}

    def load_state(self, state: dict) -> None:
        for name in ("probes", "values", "inputs", "counts"):
            setattr(self, name, torch.empty_like(state["network"][name]))
        self.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
