"""Flow matching in Wan's convention.

    sigma in [0, 1], 1 = noise;   timestep = 1000 · sigma;   x_t = (1 − sigma) · x0 + sigma · noise;   velocity = noise − x0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def slope(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """dσ/du at sigma (B,), mean 1 over u: how far the sampler goes there, and so how much an error of velocity moves a sample."""
    u = unshift_sigma(sigma, shift)
    return shift / (1 + (shift - 1) * u) ** 2


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


def velocity_to(x_t: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The velocity that leads straight from (x_t, sigma) to x0; inverse of `x0_from_velocity`."""
    return (x_t - x0) / expand(sigma, x_t)


def bin_levels(bin, place, count: int, shift: float, begin: float = 0.0, end: float = 1.0) -> torch.Tensor:
    """Noise levels at places in [0, 1] of a timestep bin, one of `count` that divide begin to end of the sampler's uniform time.

    bin, place: a number and (B,), or the reverse.
    """
    return shift_sigma(begin + (end - begin) * (bin + place) / count, shift)


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch this process works on: run `rank` of `world` equal runs."""

    rank: int = 0
    world: int = 1

    def rows(self, batch: torch.Tensor) -> torch.Tensor:
        """(world · B, …) -> this process's (B, …)."""
        return batch.chunk(self.world)[self.rank]

    def part(self, number: int, count: int) -> Share:
        """One of `count` equal runs of this process's rows: what is drawn for it is what the whole would have been given there."""
        return Share(self.rank * count + number, self.world * count)


def normal(shape: Sequence[int], generator: torch.Generator, share: Share = Share()) -> torch.Tensor:
    """Gaussian noise of `shape` (B, …): this process's rows of the global batch's noise, which every process draws."""
    return share.rows(torch.randn(share.world * shape[0], *shape[1:], generator=generator))


def stratified_uniform(count: int, generator: torch.Generator, share: Share = Share()) -> torch.Tensor:
    """`count` uniforms; over all processes one in each of equally many strata, shuffled: every batch covers all noise levels."""
    whole = count * share.world
    u = (torch.arange(whole) + torch.rand(whole, generator=generator)) / whole
    return share.rows(u[torch.randperm(whole, generator=generator)])
