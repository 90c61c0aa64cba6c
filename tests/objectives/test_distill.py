"""usv/objectives/distill.py: losses that vanish where they must and whose targets can be worked out by hand."""

import torch

from usv import flow
from usv.objectives import distill, matching


def test_consistency_of_a_straight_flow_is_the_teacher():
    """Where the flow is straight (one clip per noise), the end seen from anywhere is x0 and the target is noise − x0."""
    x0, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    sigma, following = torch.tensor([1.0, 0.6]), torch.tensor([0.8, 0.0])
    velocity = flow.velocity(x0, noise)
    target = distill.consistency_velocity(lambda x, t: velocity, velocity, flow.interpolate(x0, noise, sigma), sigma, following)
    torch.testing.assert_close(target, velocity, rtol=0, atol=1e-5)


def test_consistency_trusts_the_student_behind_the_step_only():
    """One teacher step, then the student's word; and at the end of the flow the student is not asked for the target."""
    x_t, wanted, said = torch.randn(3, 1, 2, 1, 4, 4)
    sigma, following = torch.tensor([0.9]), torch.tensor([0.5])
    target = distill.consistency_velocity(lambda x, t: said, wanted, x_t, sigma, following)
    torch.testing.assert_close(target, (0.4 * wanted + 0.5 * said) / 0.9)
    target = distill.consistency_velocity(lambda x, t: said, wanted, x_t, sigma, torch.zeros(1))
    torch.testing.assert_close(target, wanted)


def test_end_of_a_straight_flow_is_exact_from_anywhere():
    x0, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    sigma = torch.tensor([1.0, 1.0])
    for level in (sigma, 0.4 * sigma):
        end = distill.flow_end(lambda x, t: noise - x0, flow.interpolate(x0, noise, level), level, 3.0, 5)
        torch.testing.assert_close(end, x0, rtol=0, atol=1e-5)


def test_end_of_a_curved_flow_is_of_second_order_and_takes_its_share_of_steps():
    """dx/dσ = x: x(0) = x(1)/e. Twice the steps, a quarter of the error; a shorter way takes fewer calls."""
    x, calls = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), []
    ask = lambda x, t: (calls.append(float(t)), x)[1].double()  # noqa: E731
    errors = []
    for steps in (16, 32):
        end = distill.flow_end(lambda x, t: x, x, torch.ones(1, dtype=torch.float64), 1.0, steps)
        errors.append(abs(float(end) - torch.e**-1))
    assert 3.4 < errors[0] / errors[1] < 4.6
    distill.flow_end(ask, x, torch.full((1,), 0.5, dtype=torch.float64), 1.0, 8)
    assert len(calls) == 4 and calls[0] == 500


def test_gradient_of_distribution_matching_is_the_scaled_difference():
    x0 = torch.randn(2, 3, 4, requires_grad=True)
    teacher, critic = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    distill.distribution_matching_loss(x0, teacher, critic).sum().backward()
    scale = (x0 - teacher).abs().flatten(1).mean(1).view(2, 1, 1)
    torch.testing.assert_close(x0.grad, ((critic - teacher) / scale / 12).detach())


def test_replay_makes_one_batch_in_reuse_and_forgets_the_oldest():
    made, generator = [], torch.Generator().manual_seed(0)
    replay = matching.Replay(4, size=8)
    drawn = [replay.draw(lambda: made.append(len(made)) or made[-1], generator) for _ in range(400)]
    assert 80 < len(made) < 125  # 2 to begin with and a quarter of the rest: 101.5 ± 8.6
    assert sorted(set(drawn)) == made and len(replay.kept) == 8 and replay.kept == made[-8:]
    assert all(max(drawn[:i]) - drawn[i] < 8 for i in range(1, 400))
    fresh = matching.Replay(1)
    assert [fresh.draw(lambda: "new", generator) for _ in range(3)] == ["new"] * 3 and not fresh.kept
