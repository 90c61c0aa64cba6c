"""usv/objectives/trajectory.py: ends of flows that are known, and batches that are used again."""

import torch

from usv import flow
from usv.objectives.trajectory import Replay, flow_end


def test_end_of_a_straight_flow_is_exact_from_anywhere():
    x0, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    sigma = torch.tensor([1.0, 1.0])
    for level in (sigma, 0.4 * sigma):
        end = flow_end(lambda x, t: noise - x0, flow.interpolate(x0, noise, level), level, 3.0, 5)
        torch.testing.assert_close(end, x0, rtol=0, atol=1e-5)


def test_end_of_a_curved_flow_is_of_second_order_and_takes_its_share_of_steps():
    """dx/dσ = x: x(0) = x(1)/e. Twice the steps, a quarter of the error; a shorter way takes fewer calls."""
    x, calls = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), []
    ask = lambda x, t: (calls.append(float(t)), x)[1].double()  # noqa: E731
    errors = []
    for steps in (16, 32):
        end = flow_end(lambda x, t: x, x, torch.ones(1, dtype=torch.float64), 1.0, steps)
        errors.append(abs(float(end) - torch.e**-1))
    assert 3.4 < errors[0] / errors[1] < 4.6
    flow_end(ask, x, torch.full((1,), 0.5, dtype=torch.float64), 1.0, 8)
    assert len(calls) == 4 and calls[0] == 500


def test_replay_makes_one_batch_in_reuse_and_forgets_the_oldest():
    made, generator = [], torch.Generator().manual_seed(0)
    replay = Replay(4, size=8)
    drawn = [replay.draw(lambda: made.append(len(made)) or made[-1], generator) for _ in range(400)]
    assert 80 < len(made) < 125  # 2 to begin with and a quarter of the rest: 101.5 ± 8.6
    assert sorted(set(drawn)) == made and len(replay.kept) == 8 and replay.kept == made[-8:]
    assert all(max(drawn[:i]) - drawn[i] < 8 for i in range(1, 400))
    fresh = Replay(1)
    assert [fresh.draw(lambda: "new", generator) for _ in range(3)] == ["new"] * 3 and not fresh.kept
