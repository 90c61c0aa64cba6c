"""Policies: how sparse each layer runs at each timestep, behind one protocol.

    static   one rung everywhere                                   nothing is learned
    entropy  layers with concentrated attention run sparser        the paper's, from measured entropies
    gumbel   categorical over the ladders per (timestep, layer)    learned with the student

A policy decides *how much*; which blocks is decided by scores inside the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, Rung, SparsityPlan

AXES = {"density": len(DENSITY_LADDER), "merge": len(MERGE_LADDER)}


def allowed(rung: Rung, axes) -> bool:
    """Whether a policy that decides these axes may choose the rung."""
    return all(axis in axes or getattr(rung, axis) == 0 for axis in AXES)


@dataclass(frozen=True)
class ProbeRequest:
    """In `layer`, also run `other`, one step away on `axis` from the decided rung."""

    layer: int
    axis: str
    other: Rung


@dataclass(frozen=True)
class Decisions:
    """What one training forward runs: a rung for every layer, and the probes whose derivatives the policy asks for.

    content: (B, CONTENT) of the inputs that it was told from (`usv.policy.content`), where they were looked at.
    """

    bin: int
    rungs: tuple[Rung, ...]
    probes: tuple[ProbeRequest, ...] = ()
    content: torch.Tensor | None = None


class SparsityPolicy(Protocol):
    """What the trainer needs of a policy."""

    def set_budget(self, target: float) -> None:
        """Mean cost of a forward, as a fraction of the dense one, that decisions are to have from now on."""

    def decide(self, bin: int, generator: torch.Generator, content: torch.Tensor | None = None) -> Decisions:
        """Rungs for a forward in one timestep bin. content: (B, CONTENT) of its inputs, for a policy that looks at them."""

    def observe(self, decisions: Decisions, damages: Mapping[int, float], entropies: Mapping[int, float]) -> None:
        """Results of that forward: d loss / d mix of each probed layer, coarse entropy of each sparse layer."""

    def decode(self, target: float) -> SparsityPlan:
        """The exact plan whose mean cost (fraction of the dense one's) does not exceed `target`."""

    def summary(self) -> dict[str, float]:
        """Scalars for the log."""
