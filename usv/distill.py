"""Losses of the student, as pure functions.

    velocity distillation   L = mean ‖ student(x_t, t, text) − v_T ‖²,     v_T = uncond + w · (cond − uncond)

Guidance is folded in: the student gives in one forward what the dense teacher gives in two.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def guided_velocity(teacher, x_t, timestep, text, empty, guidance_scale: float) -> torch.Tensor:
    """The teacher's guided velocity, both branches in one batch.

    Args:
        teacher: (latents, timestep, text) -> (velocity, stats), dense.
        x_t: (B, C, T, H, W). timestep: (B,). text: (B, L, D). empty: (L, D), the embedding of the empty prompt.
        guidance_scale: w; 1 runs the conditional branch only.
    """
    if guidance_scale == 1.0:
        return teacher(x_t, timestep, text)[0]
    both = torch.cat([text, empty.to(text).expand_as(text)])
    cond, uncond = teacher(x_t.repeat(2, 1, 1, 1, 1), timestep.repeat(2), both)[0].chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B,) mean squared error of each sample."""
    return (velocity.float() - target.float()).square().flatten(1).mean(1)
