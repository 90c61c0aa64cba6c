"""Losses of the student, as pure functions.

    velocity distillation    L = mean ‖ student(x_t, t, text) − v_T ‖²,     v_T = uncond + w · (cond − uncond)
    consistency distillation L = mean ‖ student(x_t, t) − (x_t − x0) / sigma ‖²,     x0 = sg student's x0 at x_t − (sigma − sigma′) · v_T
    trajectory distillation  L = mean ‖ student(x, t) − (x − x0) / sigma ‖²,     x0 = end of a guide's flow from x, itself from the student's rollout
    distribution matching    L = ½ mean ‖ x0 − sg(x0 − g) ‖²,     g = (critic's x0 − teacher's x0) / mean |x0 − teacher's x0|

Guidance is folded in: the student gives in one forward what the dense teacher gives in two. A student of the second loss says
at every noise level where the flow ends, so any subset of timesteps samples with it; the third says so at the inputs that the
student's own sampling meets, errors of its earlier steps included, and without the detour through its own opinion.
Velocities passed as functions are (x (B, …), timestep (B,)) -> (B, …), as a network is called; sigma = timestep / 1000.
"""

from __future__ import annotations

import torch

from usv import flow


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


def solver_step(x_t: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """One Euler step of the flow from sigma to `following`, both (B,)."""
    return x_t - flow.expand(sigma - following, x_t) * velocity


@torch.no_grad()
def flow_end(velocity, x: torch.Tensor, sigma: torch.Tensor, flow_shift: float, steps: int) -> torch.Tensor:
    """Where the flow of `velocity` that passes x (B, …) at sigma (B,) ends: second order in the step (Adams–Bashforth).

    steps: for the whole way from sigma 1; a shorter way takes its share, at least one.
    """
    u = flow.unshift_sigma(sigma, flow_shift)
    count, before, size_before, now = max(1, round(float(u.mean()) * steps)), None, None, sigma
    for left in range(count - 1, -1, -1):
        following = flow.shift_sigma(u * left / count, flow_shift)
        here, size = velocity(x, 1000 * now).float(), now - following
        slope = here if before is None else here + flow.expand(size / (2 * size_before), x) * (here - before)
        x, now, before, size_before = solver_step(x, slope, now, following), following, here, size
    return x


@torch.no_grad()
def consistency_velocity(student, wanted, x_t, sigma, following) -> torch.Tensor:
    """The velocity that leads from x_t straight to where the student, asked one solver step later, says the flow ends.

    Args:
        student: its velocity, under the plan it trains with.
        wanted: the teacher's guided velocity at (x_t, sigma); the student's is used only behind the step it takes.
        sigma, following: (B,), following < sigma; where it is 0 the step's own end is the target.
    """
    x = solver_step(x_t, wanted, sigma, following)
    at_end = flow.expand(following <= 0, x)
    x0 = torch.where(at_end, x, flow.x0_from_velocity(x, student(x, 1000 * following).float(), following))
    return flow.velocity_to(x_t, x0, sigma)


def distribution_matching_loss(x0: torch.Tensor, teacher_x0: torch.Tensor, critic_x0: torch.Tensor) -> torch.Tensor:
    """(B,) ½ ‖x0 − sg(x0 − g)‖², g = (critic_x0 − teacher_x0) / mean|x0 − teacher_x0|: its gradient in x0 is g / N.

    x0: (B, …), the student's samples, with gradient. teacher_x0, critic_x0: what guided teacher and critic make of the samples
    noised again; no gradient passes through them. Source: DMD2 (arXiv 2405.14867).
    """
    with torch.no_grad():
        scale = (x0 - teacher_x0).abs().flatten(1).mean(1).clamp_min(1e-6)
        target = x0 - (critic_x0 - teacher_x0) / flow.expand(scale, x0)
    return 0.5 * (x0.float() - target.float()).square().flatten(1).mean(1)
