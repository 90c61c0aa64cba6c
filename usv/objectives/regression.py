"""What objectives by regression share: the student's velocity is brought to one that is wanted, at points of noised clips."""

from __future__ import annotations

import torch

from usv.objectives.protocol import Clips, Forwards, Needs, Networks, Point, Velocity


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B,) mean squared error of each sample."""
    return (velocity.float() - target.float()).square().flatten(1).mean(1)


class Regression:
    """An objective whose loss is a weighted distance of velocities; a subclass says which velocity is wanted.

    Args:
        settings: `ObjectiveConfig`. flow_shift: of the noise levels.
    """

    few_steps = True
    needs = Needs()
    warm_up = 0

    def __init__(self, settings, flow_shift: float):
        self.settings, self.flow_shift = settings, flow_shift

    def point(self, networks: Networks, start: Point, generator: torch.Generator) -> Point:
        return start

    def target(self, networks: Networks, point: Point, decisions, generator: torch.Generator) -> torch.Tensor:
        raise NotImplementedError

    def weight(self, sigma: torch.Tensor) -> torch.Tensor | float:
        return 1.0

    def loss(self, networks: Networks, clips: Clips, point: Point, velocity, wanted, generator) -> tuple[torch.Tensor, dict[str, float]]:
        return (self.weight(point.sigma) * velocity_loss(velocity, wanted)).mean(), {}

    def update(self, networks: Networks, clips: Clips, generator: torch.Generator) -> dict[str, float]:
        return {}

    def reference(self, teacher: Velocity, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forwards(self) -> Forwards:
        return Forwards(teacher=1)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        if state:
            raise ValueError(f"an objective that learns nothing was given {', '.join(state)}")
