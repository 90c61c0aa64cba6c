"""Flow matching in Wan's convention.

    sigma in [0, 1], 1 = noise;   timestep = 1000 · sigma;   x_t = (1 − sigma) · x0 + sigma · noise;   velocity = noise − x0
"""

from __future__ import annotations

import torch


def expand(sigma: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, …, 1) with as many dimensions as `like`."""
    return sigma.view(-1, *[1] * (like.dim() - 1))


def shift_sigma(u: torch.Tensor, shift: float) -> torch.Tensor:
    """Uniform u in [0, 1] -> sigma, moved towards noise by `shift` (1 = unchanged), as Wan's flow_shift."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def interpolate(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_t for x0, noise (B, …) and sigma (B,)."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity that a network predicts."""
    return noise - x0


def x0_from_velocity(x_t: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The clean sample implied by a velocity at (x_t, sigma)."""
    return x_t - expand(sigma, x_t) * v


def stratified_uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` uniforms, one in each of `count` equal strata, shuffled: every batch covers all noise levels."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return u[torch.randperm(count, generator=generator)]
