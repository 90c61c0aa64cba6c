"""Velocity distillation: the student gives the teacher's guided velocity in one forward, and is sampled as the teacher is.

    L = mean dσ/du · ‖ student(x_t, t, text) − v_T ‖²,     v_T = uncond + w · (cond − uncond)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from usv import flow
from usv.objectives.protocol import Networks, Point, Velocity
from usv.objectives.regression import Regression


@torch.no_grad()
def guided_velocity(teacher, x_t, timestep, text, empty, guidance_scale: float, conditions: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The teacher's guided velocity, both branches in one batch.

    Args:
        teacher: (latents, timestep, text, **conditions) -> (velocity, stats), dense.
        x_t: (B, C, T, H, W). timestep: (B,). text: (B, L, D). empty: (L, D), the embedding of the empty prompt.
        guidance_scale: w; 1 runs the conditional branch only.
        conditions: what else both branches are given, (B, …) by name.
    """
    conditions = conditions or {}
    if guidance_scale == 1.0:
        return teacher(x_t, timestep, text, **conditions)[0]
    both = torch.cat([text, empty.to(text).expand_as(text)])
    twice = {name: torch.cat([value, value]) for name, value in conditions.items()}
    cond, uncond = teacher(x_t.repeat(2, 1, 1, 1, 1), timestep.repeat(2), both, **twice)[0].chunk(2)
    return uncond + guidance_scale * (cond - uncond)


class VelocityObjective(Regression):
    """Errors move a sample by the length of the sampler's step, which weights them."""

    few_steps = False
    reads = ("student_timesteps",)

    def target(self, networks: Networks, point: Point, decisions, generator: torch.Generator) -> torch.Tensor:
        return networks.taught(point.prompt)(point.x, 1000 * point.sigma)

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return flow.slope(sigma, self.flow_shift)

    def reference(self, teacher: Velocity, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return teacher(x, 1000 * sigma)
