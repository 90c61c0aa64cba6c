"""What an objective is, to the loop of train.py: where the student is asked, what it is to answer, what else is trained beside it.

    clips, noise --point--> (x_t, sigma, text) --target--> velocity wanted there --loss--> scalar,   then --update--> critic

An objective holds what only it needs (trajectories kept for reuse, a critic); networks, plan and ranks are the run's, asked
through `Networks`. It names no optimiser of the student and no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from usv import flow

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x (B, …), timestep (B,)) -> velocity (B, …)


@dataclass(frozen=True)
class Needs:
    """What `build` has to make for an objective beside student and teacher."""

    guide: bool = False  # another student, whose flow gives the trajectories
    critic: bool = False  # a network that learns the student's samples


@dataclass(frozen=True)
class Forwards:
    """What a step costs beside the student's forward and backward at its point, in forwards a clip; for `dry_run`.

    teacher, guide: guided velocities. student: forwards without gradient. rollouts: forwards with gradient, each with its
    backward. critic: (forwards, backwards).
    """

    teacher: float = 0.0
    guide: float = 0.0
    student: float = 0.0
    rollouts: float = 0.0
    critic: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Prompt:
    """What clips are asked with: text embeddings (B, L, D), and by name what else their transformer is given (`Family.inputs`), each
    (B, …): the latents of a first frame, image embeddings."""

    text: torch.Tensor
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, rows) -> Prompt:
        return Prompt(self.text[rows], {name: value[rows] for name, value in self.conditions.items()})

    def split(self, size: int) -> list[Prompt]:
        """In order, pieces of at most so many clips, as a tensor's split."""
        return [self[begin : begin + size] for begin in range(0, len(self.text), size)]


@dataclass(frozen=True)
class Clips:
    """Clean clips of a batch, latents (B, C, T, H, W), and what they are asked with."""

    latents: torch.Tensor
    prompt: Prompt

    def __getitem__(self, rows) -> Clips:
        return Clips(self.latents[rows], self.prompt[rows])


@dataclass(frozen=True)
class Point:
    """Where the student is asked in a step: x (B, …) at noise levels sigma (B,) with a prompt.

    level: the noise level whose bin decides the rungs, within the bin of all of sigma. noise: (B, …), what x was made of.
    wanted: the velocity there (B, …), where making the point gave it.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    prompt: Prompt
    noise: torch.Tensor
    level: float
    wanted: torch.Tensor | None = None


class Networks(Protocol):
    """What an objective may ask of the run."""

    edges: Sequence[float]
    device: torch.device
    share: flow.Share

    def pieces(self, clips: Clips) -> Iterator[Clips]:
        """Clips in as many equal parts as are computed one after another (`optim.accumulate`); meanwhile `share` is the part's."""

    def taught(self, prompt: Prompt) -> Velocity:
        """The dense teacher's guided velocity."""

    def guided(self, prompt: Prompt) -> Velocity:
        """The guide's velocity, under its own plan; without a guide the teacher's."""

    def rungs_at(self, timestep: float, generator: torch.Generator) -> tuple:
        """The rungs of a forward of the student at a timestep."""

    def sparse(self, prompt: Prompt, rungs_at: Callable[[float], tuple]) -> Velocity:
        """The student's velocity, under the rungs of each timestep."""

    def sparse_by_bin(self, prompt: Prompt, rows: Mapping[int, tuple]) -> Velocity:
        """As `sparse`, for noise levels of several bins in one batch; rows: the rungs of every bin there may be."""


class Objective(Protocol):
    """`generator` is the step's, seeded alike on every rank; draws are of the whole batch and sliced by `networks.share`."""

    few_steps: bool  # whether the student says where flows end, and is sampled at a few timesteps of its own
    needs: Needs
    warm_up: int  # batches on which `update` runs before the student's first step

    def point(self, networks: Networks, start: Point, generator: torch.Generator) -> Point:
        """Where to ask the student; start: noised clips of the batch."""

    def target(self, networks: Networks, point: Point, decisions, generator: torch.Generator) -> torch.Tensor:
        """The velocity that the student is to give at the point; decisions: the rungs it will run under, and their bin."""

    def loss(
        self, networks: Networks, clips: Clips, point: Point, velocity: torch.Tensor, wanted: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The scalar the student's step minimises, and numbers for the log."""

    def update(self, networks: Networks, clips: Clips, generator: torch.Generator) -> dict[str, float]:
        """Train what is trained beside the student; numbers for the log. Called after a step of the student that was made."""

    def reference(self, teacher: Velocity, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What a held-out velocity is measured against."""

    def forwards(self) -> Forwards:
        """What a step costs."""

    def state_dict(self) -> dict:
        """What is saved; {} where nothing is learned."""

    def load_state_dict(self, state: dict) -> None:
        """Inverse; KeyError, ValueError or RuntimeError for another objective's."""
