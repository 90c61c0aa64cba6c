"""usv/objectives/consistency.py: targets that can be worked out by hand."""

import torch

from usv import flow
from usv.objectives.consistency import consistency_velocity


def test_consistency_of_a_straight_flow_is_the_teacher():
    """Where the flow is straight (one clip per noise), the end seen from anywhere is x0 and the target is noise − x0."""
    x0, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    sigma, following = torch.tensor([1.0, 0.6]), torch.tensor([0.8, 0.0])
    velocity = flow.velocity(x0, noise)
    target = consistency_velocity(lambda x, t: velocity, velocity, flow.interpolate(x0, noise, sigma), sigma, following)
    torch.testing.assert_close(target, velocity, rtol=0, atol=1e-5)


def test_consistency_trusts_the_student_behind_the_step_only():
    """One teacher step, then the student's word; and at the end of the flow the student is not asked for the target."""
    x_t, wanted, said = torch.randn(3, 1, 2, 1, 4, 4)
    sigma, following = torch.tensor([0.9]), torch.tensor([0.5])
    target = consistency_velocity(lambda x, t: said, wanted, x_t, sigma, following)
    torch.testing.assert_close(target, (0.4 * wanted + 0.5 * said) / 0.9)
    target = consistency_velocity(lambda x, t: said, wanted, x_t, sigma, torch.zeros(1))
    torch.testing.assert_close(target, wanted)
