"""Rollouts of a few-step student, and how far its samples are from the teacher's.

    noise --student at a subset of its timesteps, re-noised between them--> x0 --noised again, guided teacher--> residual
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from usv import flow
from usv.objectives.velocity import guided_velocity
from usv.sampling.sampler import renoise


def random_rollout(student_timesteps: Sequence[float], generator: torch.Generator) -> list[float]:
    """A subset of the ladder that begins with its first timestep, cut at a random place: what a student must be valid for."""
    draw = torch.rand(len(student_timesteps), generator=generator)
    subset = [t for i, t in enumerate(student_timesteps) if i == 0 or draw[i] < 0.7]
    return subset[: 1 + int(torch.randint(len(subset), (1,), generator=generator))]


@torch.no_grad()
def arrive(call: Callable, noise: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
    """What the student meets (B, …) at the last of `timesteps`, having run at those before it."""
    x = noise
    for number, timestep in enumerate(timesteps[:-1]):
        t = torch.full((len(x),), float(timestep), device=x.device)
        x0 = flow.x0_from_velocity(x, call(x, t).float(), t / 1000)
        x = renoise(x0, noise, torch.full_like(t, timesteps[number + 1] / 1000), number + 1)
    return x


def rollout(call: Callable, noise: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
    """x0 (B, …) after the student's calls at `timesteps`; gradient passes through the last call only.

    call: (x, timestep (B,)) -> velocity, the student under its plan.
    """
    x = arrive(call, noise, timesteps)
    t = torch.full((len(x),), float(timesteps[-1]), device=x.device)
    return flow.x0_from_velocity(x, call(x, t).float(), t / 1000)


@torch.no_grad()
def teacher_residual(
    x0, text, empty, teacher, guidance_scale: float, generator: torch.Generator, levels: int = 4, share: flow.Share = flow.Share(),
    conditions: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """How far the guided teacher would move samples x0 (B, …): mean ‖x0 − teacher's x0‖² over noise levels 0.3 to 0.9.

    A scalar that falls as samples come closer to what the teacher makes; it needs no reference clip. share: of the batch.
    conditions: what else the teacher is given, by name.
    """
    total = 0.0
    for level in range(levels):
        sigma = torch.full((len(x0),), 0.3 + 0.6 * (level + 0.5) / levels, device=x0.device)
        noise = flow.normal(x0.shape, generator, share).to(x0.device)
        x_t = flow.interpolate(x0, noise, sigma)
        velocity = guided_velocity(teacher, x_t, 1000 * sigma, text, empty, guidance_scale, conditions)
        total += float((x0 - flow.x0_from_velocity(x_t, velocity.float(), sigma)).square().mean())
    return total / levels


@torch.no_grad()
def jump_damage(
    call: Callable, dense: Callable, judge: Callable, noise: torch.Tensor, edges: Sequence[float], steps: Sequence[bool], bin: int
) -> tuple[float, float]:
    """Rise of `judge(x0)` when the step of `bin` is jumped, and of the rungs themselves; noise and all other steps are shared.

    Both are relative to the samples of the same steps run dense.

    call, dense: the student under its rungs, and without. edges: candidate timesteps, ascending. steps: which of them run, by bin.
    """
    ladders = [[e for i, (e, run) in enumerate(zip(edges, steps)) if (run if i != bin else keep)][::-1] for keep in (True, False)]
    kept, jumped, best = (judge(rollout(*run)) for run in ((call, noise, ladders[0]), (call, noise, ladders[1]), (dense, noise, ladders[0])))
    return (jumped - kept) / max(best, 1e-12), (kept - best) / max(best, 1e-12)
