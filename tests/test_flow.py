"""usv/flow.py: Wan's convention, against its definition and against diffusers' own scheduler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from usv import flow


def test_ends_and_velocity():
    """x_t runs from data to noise on a straight line whose derivative in sigma is the velocity."""
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 2, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(3, dtype=torch.float64)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(3, dtype=torch.float64)), noise)
    sigma, step = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-3
    slope = (flow.interpolate(x0, noise, sigma + step) - flow.interpolate(x0, noise, sigma - step)) / (2 * step)
    torch.testing.assert_close(slope, flow.velocity(x0, noise), rtol=0, atol=1e-11)
    x_t = flow.interpolate(x0, noise, sigma)
    torch.testing.assert_close(flow.x0_from_velocity(x_t, flow.velocity(x0, noise), sigma), x0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_shift_is_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    u = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(flow.shift_sigma(u, shift), scheduler.sigmas[:1000], rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * flow.shift_sigma(u, shift), scheduler.timesteps, rtol=0, atol=1e-3)


def test_few_step_ladder():
    """Shift 8 gives the timesteps that sparse distillation uses: 1000, 757, 522 at u = 1, 0.28, 0.12."""
    got = 1000 * flow.shift_sigma(torch.tensor([1.0, 0.2803, 0.1201]), 8.0)
    assert got.round().tolist() == [1000.0, 757.0, 522.0]


def test_strata_hold_one_each():
    g = torch.Generator().manual_seed(3)
    draws = [flow.stratified_uniform(7, g) for _ in range(50)]
    for u in draws:
        assert sorted((u * 7).long().tolist()) == list(range(7))
    orders = {tuple((u * 7).long().tolist()) for u in draws}
    assert len(orders) > 25  # shuffled: 50 draws of 5040 orders hardly ever repeat


def test_expand():
    assert flow.expand(torch.ones(3), torch.zeros(3, 16, 5, 8, 8)).shape == (3, 1, 1, 1, 1)


def test_slope_is_the_derivative_of_the_shift_and_one_on_average():
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    sigma = flow.shift_sigma(u, 3.0)
    slope = flow.slope(sigma, 3.0)
    torch.testing.assert_close(slope[1:-1], (sigma[2:] - sigma[:-2]) / (u[2:] - u[:-2]), rtol=1e-4, atol=0)
    assert abs(float(torch.trapezoid(slope, u)) - 1) < 1e-5
