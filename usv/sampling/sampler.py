"""The sampler of a few-step student, as a diffusers scheduler.

    x0 = x_t − sigma · student(x_t, t)        x_next = (1 − sigma_next) · x0 + sigma_next · fresh noise        last: x0

Fresh noise of step k is the start noise with its elements in another, fixed order: nearly independent of what x0 was made
from, the same for every method, batching and device, and no generator has to reach the scheduler. The timesteps belong to the
student: they are those it was trained and validated on.

Where the sample is packed tokens of which some are given (LTX's conditions), a token of a share f of the step's noise level goes to f ·
sigma_next, so that what is clean stays clean; fresh noise is made of the tokens that began as noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from usv import flow


def renoise(x0: torch.Tensor, start: torch.Tensor, sigma: torch.Tensor, step: int) -> torch.Tensor:
    """x0 taken to noise level sigma (B,) with the noise of step `step` ≥ 1, made of the start noise (B, …)."""
    per_clip = start[0].numel()
    order = torch.randperm(per_clip, generator=torch.Generator().manual_seed(step)).to(start.device)
    fresh = start.flatten(1)[:, order].view_as(start)
    return flow.interpolate(x0, fresh, sigma)


def renoise_tokens(x0: torch.Tensor, start: torch.Tensor, sigma: torch.Tensor, step: int, noise: torch.Tensor) -> torch.Tensor:
    """`renoise` of packed tokens (B, N, C) to a level each, sigma (B, N, 1). noise: (N,) bool, which tokens of `start` are noise alone."""
    pure = start[:, noise].flatten(1)
    order = torch.randperm(pure.shape[1], generator=torch.Generator().manual_seed(step))
    order = order[torch.arange(x0[0].numel()) % len(order)].to(start.device)
    return (1 - sigma) * x0 + sigma * pure[:, order].view_as(x0)


def with_shift(scheduler, shift: float):
    """The scheduler with this flow shift; itself where it has it, or has no shift of its own."""
    for key in ("flow_shift", "shift"):  # UniPC and DPM++; Euler and Heun
        if key in scheduler.config and scheduler.config[key] != shift:
            return type(scheduler).from_config(scheduler.config, **{key: shift})
    return scheduler


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler of a few-step student for any diffusers video pipeline.

    Args:
        student_timesteps: descending, the first 1000 (pure noise).

    Raises ValueError for timesteps that do not begin at 1000 or do not descend above 0.
    """

    order = 1

    @register_to_config
    def __init__(self, student_timesteps: Sequence[float] = (1000.0,), num_train_timesteps: int = 1000):
        steps = [float(t) for t in student_timesteps]
        if not steps or steps[0] != 1000.0 or any(a <= b for a, b in zip(steps, [*steps[1:], 0.0])):
            raise ValueError(f"student_timesteps: got {steps}, accepted: 1000 first, then descending values above 0")
        self.timesteps = torch.tensor(steps)
        self.sigmas = torch.cat([self.timesteps / 1000, torch.zeros(1)])
        self._position, self._start = 0, None
        self._levels: torch.Tensor | None = None

    def asked(self, timestep: torch.Tensor) -> None:
        """Notes the timesteps that the student was asked with, (B,) or one a token (B, N) or (B, N, 1)."""
        self._levels = timestep if timestep.ndim > 1 else None

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, sigmas=None, timesteps=None, mu=None) -> None:
        """ValueError for another number of steps than the student's. sigmas, timesteps, mu: what pipelines compute for schedulers that have
        no timesteps of their own; only how many counts."""
        steps = list(self.config.student_timesteps)
        given = next((len(x) for x in (sigmas, timesteps) if x is not None), num_inference_steps)
        if given != len(steps):
            raise ValueError(
                f"num_inference_steps: got {given}, accepted: {len(steps)}; this student was trained for the timesteps {steps}"
            )
        self.timesteps = torch.tensor(steps, device=device)
        self._position, self._start = 0, None

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._position = begin_index

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A video (B, …) at the noise level of timesteps (B,): where video to video begins."""
        sigma = (timesteps.float() / 1000).to(original_samples.device).expand(len(original_samples))
        return flow.interpolate(original_samples, noise, sigma).to(original_samples.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        return sample

    def step(self, model_output, timestep, sample, return_dict: bool = True, per_token_timesteps: torch.Tensor | None = None, **_):
        """One step from `sample` (B, …) at the next of the timesteps; `model_output` is the student's velocity, negative where a
        pipeline gives per_token_timesteps (B, N), as for diffusers' flow schedulers."""
        now = float(torch.as_tensor(timestep).max())
        share = _share(sample, now, self._levels if per_token_timesteps is None else per_token_timesteps)
        if self._start is None:  # the first step, of the ladder or of what video to video leaves of it
            self._start = sample
            self._noise = None if share is None else share[0, :, 0] == 1
            self._position = int((self.timesteps.cpu() - now).abs().argmin())
        sigma, following = self.sigmas[self._position], float(self.sigmas[self._position + 1])
        self._position += 1
        level = float(sigma)
        if per_token_timesteps is not None:
            model_output, level = -model_output, level if share is None else level * share
        x = sample.float() - level * model_output.float()
        if following > 0 and share is None:
            x = renoise(x, self._start.float(), torch.full((len(x),), following, device=x.device), self._position)
        elif following > 0:
            x = renoise_tokens(x, self._start.float(), following * share, self._position, self._noise)
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


def _share(sample: torch.Tensor, now: float, levels: torch.Tensor | None) -> torch.Tensor | None:
    """(B, N, 1), the noise level of each packed token of a sample (B, N, C) as a share of the step's timestep `now`; None where all have it."""
    if levels is None or sample.ndim != 3 or levels.shape[1] != sample.shape[1]:
        return None
    share = levels[: len(sample)].float().reshape(-1, sample.shape[1], 1) / now
    share = torch.where(share > 0.99, 1.0, share)  # bf16 rounds a timestep by 0.004 of it
    return None if bool((share == 1).all()) else share
