"""SparsityPlan: the integers one run executes.

For a forward at timestep t the plan gives each layer either None (dense) or a LayerPlan: attention blocks kept per row and
tokens merged per tile. Training, inference, benchmark and cost model read the same table.

Every decision is one rung of a short ladder. Rows of the table are bins of timesteps, equally likely under the sampler.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from usv.flow import bin_levels
from usv.sparse.grid import TileLayout

DENSITY_LADDER = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
MERGE_LADDER = (0.0, 1 / 4, 1 / 2, 3 / 4)


@dataclass(frozen=True)
class Rung:
    """One point of the decision space: positions on the two ladders.

    mass: above 0 the best key blocks of all query blocks and heads are kept up to this share of the coarse attention, so that the input
    says how many; the density is then what that comes to on average (`policy.mode=dynamic`). It is no part of the decision: rungs that differ
    in it only are equal.
    """

    density: int = 0
    merge: int = 0
    mass: float = field(default=0.0, compare=False)


RUNGS = tuple(Rung(d, m) for m in range(len(MERGE_LADDER)) for d in range(len(DENSITY_LADDER)))


@dataclass(frozen=True)
class LayerPlan:
    """What one layer executes: key blocks per query block, and merged fraction of each tile's tokens. mass: see `Rung`."""

    num_kept: int
    merged_fraction: float
    mass: float = 0.0

    @classmethod
    def of(cls, density: float, merged_fraction: float, num_blocks: int) -> LayerPlan:
        """From fractions, also ones between the rungs: at least `density` of the blocks are kept."""
        return cls(max(1, math.ceil(num_blocks * density - 1e-9)), merged_fraction)


def layer_plan(rung: Rung | LayerPlan, num_blocks: int) -> LayerPlan | None:
    """The integers of a rung at `num_blocks` blocks; None (dense) for the first rung. A LayerPlan is returned as it is."""
    if isinstance(rung, LayerPlan):
        return rung
    if rung == Rung():
        return None
    plan = LayerPlan.of(DENSITY_LADDER[rung.density], MERGE_LADDER[rung.merge], num_blocks)
    return replace(plan, mass=rung.mass) if rung.density else plan


def merged_tokens(plan: LayerPlan | None, layout: TileLayout) -> list[int]:
    """Tokens merged in each tile; partial tiles merge the same fraction, rounded down, as far as they have sources."""
    fraction = 0.0 if plan is None else plan.merged_fraction
    return [min(int(fraction * size), src) for size, src in zip(layout.sizes.tolist(), layout.num_src.tolist())]


def executed_densities(num_blocks: int) -> list[float]:
    """What the density ladder computes of `num_blocks` blocks, counts being rounded up."""
    return [LayerPlan.of(density, 0.0, num_blocks).num_kept / num_blocks for density in DENSITY_LADDER]


def timestep_bins(count: int, flow_shift: float, begin: float = 0.0, end: float = 1.0) -> tuple[float, ...]:
    """Upper edges of `count` bins that a sampler with this shift visits equally often, ascending, last one 1000.

    begin, end: the part of the sampler's uniform time in [0, 1] that is divided.
    """
    import torch

    bins = torch.arange(count, dtype=torch.float64)
    return tuple((1000 * bin_levels(bins, 1, count, flow_shift, begin, end)).tolist())


def bin_of(timestep: float, edges: tuple[float, ...]) -> int:
    """The bin that holds a timestep in [0, 1000]."""
    # An edge that has been through fp32 is off by up to 3e-5 and still belongs to the bin below it.
    return min(bisect_left(edges, timestep - 1e-3), len(edges) - 1)


@dataclass(frozen=True)
class SparsityPlan:
    """A table of rungs: `rungs[bin][layer]`; `edges` are the bins' upper timesteps, ascending.

    steps: for a few-step student, whether it runs at each bin's upper edge; () where steps are not the plan's to decide.
    """

    edges: tuple[float, ...]
    rungs: tuple[tuple[Rung, ...], ...]
    steps: tuple[bool, ...] = ()

    def __post_init__(self):
        ascending = all(a < b for a, b in zip((0.0, *self.edges), self.edges)) and self.edges and self.edges[-1] < 1001  # and no NaN
        if len(self.edges) != len(self.rungs) or not ascending:
            raise ValueError(
                f"rungs: got {len(self.rungs)} rows for {len(self.edges)} edges {self.edges}, expected one row for each of "
                "the ascending edges, timesteps above 0"
            )
        if self.steps and (len(self.steps) != len(self.edges) or not self.steps[-1]):
            raise ValueError(
                f"steps: got {self.steps}, expected one of each of the {len(self.edges)} bins, the last True (pure noise)"
            )
        if len({len(row) for row in self.rungs}) != 1:
            raise ValueError(
                f"rungs: got rows of {sorted({len(r) for r in self.rungs})} layers, expected equal lengths"
            )

    @property
    def num_layers(self) -> int:
        return len(self.rungs[0])

    def at(self, timestep: float) -> tuple[Rung, ...]:
        """The row of a timestep."""
        return self.rungs[bin_of(timestep, self.edges)]

    @classmethod
    def uniform(cls, rung: Rung, edges: tuple[float, ...], num_layers: int) -> SparsityPlan:
        """The same rung everywhere."""
        return cls(tuple(edges), tuple((rung,) * num_layers for _ in edges))

    def sampled(self, timesteps: Sequence[float]) -> SparsityPlan:
        """What a sampler of these timesteps runs: a row for each; none given, this plan."""
        ascending = sorted(timesteps)
        return SparsityPlan(tuple(ascending), tuple(map(self.at, ascending))) if ascending else self

    def only(self, axes: Sequence[str]) -> SparsityPlan:
        """This plan where `axes` ("density", "merge") are concerned, dense in the other."""
        kept = (*axes, "mass") if "density" in axes else axes
        rungs = tuple(tuple(Rung(**{axis: getattr(rung, axis) for axis in kept}) for rung in row) for row in self.rungs)
        return SparsityPlan(self.edges, rungs, self.steps)

    def steered(self, bin: int, masses: Mapping[int, float]) -> SparsityPlan:
        """This plan with other masses in some layers of a bin."""
        row = tuple(replace(rung, mass=masses.get(layer, rung.mass)) for layer, rung in enumerate(self.rungs[bin]))
        return replace(self, rungs=(*self.rungs[:bin], row, *self.rungs[bin + 1 :]))

    def student_timesteps(self) -> list[float]:
        """The timesteps that run, descending; [] where steps are not decided."""
        return [edge for edge, run in zip(self.edges, self.steps) if run][::-1]

    def running(self) -> tuple[tuple[Rung, ...], ...]:
        """The rows that run."""
        return tuple(row for row, run in zip(self.rungs, self.steps) if run) if self.steps else self.rungs

    def merged(self) -> float:
        """Mean fraction of tokens merged in the rows that run."""
        return _mean(MERGE_LADDER[rung.merge] for row in self.running() for rung in row)

    def density(self, num_blocks: int) -> float:
        """Mean fraction of block pairs computed, relative to the blocks that merging leaves."""
        plans = (layer_plan(rung, num_blocks) for row in self.running() for rung in row)
        return _mean(1.0 if plan is None else plan.num_kept / num_blocks for plan in plans)

    def to_dict(self) -> dict:
        rungs = [[[r.density, r.merge, *([r.mass] if r.mass else [])] for r in row] for row in self.rungs]
        return {"edges": list(self.edges), "rungs": rungs, "steps": list(self.steps)}

    @classmethod
    def from_dict(cls, data: dict) -> SparsityPlan:
        """Inverse of `to_dict`. ValueError for a rung beyond the ladders, TypeError for what is no number."""
        for row in data["rungs"]:
            for density, merge, *mass in row:
                if type(density) is not int or type(merge) is not int:
                    raise TypeError(f"rungs: got ({density!r}, {merge!r}), expected two whole numbers")
                if not all(0 <= value <= 1 for value in mass) or len(mass) > 1:
                    raise ValueError(f"rungs: got a mass of {mass}, expected one in [0, 1]")
                if not (0 <= density < len(DENSITY_LADDER) and 0 <= merge < len(MERGE_LADDER)):
                    raise ValueError(
                        f"rungs: got ({density}, {merge}), expected density in 0..{len(DENSITY_LADDER) - 1} and merge in "
                        f"0..{len(MERGE_LADDER) - 1}"
                    )
        rungs = tuple(tuple(Rung(*values) for values in row) for row in data["rungs"])
        return cls(tuple(data["edges"]), rungs, tuple(data.get("steps", ())))


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
