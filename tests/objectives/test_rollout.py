"""usv/objectives/rollout.py: which calls a rollout makes, where gradient passes, what its samples are measured by."""

import pytest
import torch

from usv import flow
from usv.objectives.rollout import jump_damage, random_rollout, rollout, teacher_residual

STEPS = [1000.0, 800.0, 400.0]


def test_rollouts_are_subsets_cut_early():
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(random_rollout(STEPS, generator)) for _ in range(200)}
    assert seen == {(1000.0,), (1000.0, 800.0), (1000.0, 400.0), (1000.0, 800.0, 400.0)}


def test_gradient_passes_through_the_last_call_only():
    weights = [torch.ones((), requires_grad=True) for _ in STEPS]
    calls = iter(weights)
    x0 = rollout(lambda x, t: next(calls) * x, torch.randn(2, 4, 3, 4, 4), STEPS)
    x0.square().sum().backward()
    assert weights[0].grad is None and weights[1].grad is None and float(weights[2].grad.abs()) > 0


def test_damage_of_a_jump_is_the_difference_of_two_rollouts():
    """What the other steps do is the same in both; a third rollout, dense, is what both damages are relative to."""
    edges, steps = (300.0, 600.0, 1000.0), (True, False, True)
    asked = []

    def student(name):
        def call(x, t):
            asked.append((name, float(t[0])))
            return torch.zeros_like(x)

        return call

    def judge(x0):
        names, ladder = zip(*asked)
        asked.clear()
        error = {(1000.0, 300.0): 2.0, (1000.0,): 3.0, (1000.0, 600.0, 300.0): 1.0}[ladder]
        return {"sparse": 1.0, "dense": 0.8}[names[0]] * error

    noise = torch.randn(1, 2, 3, 4, 4)
    found = lambda bin: jump_damage(student("sparse"), student("dense"), judge, noise, edges, steps, bin)  # noqa: E731
    assert found(0) == pytest.approx(((3.0 - 2.0) / 1.6, 0.25))
    assert found(1) == pytest.approx(((2.0 - 1.0) / 0.8, 0.25))


def test_residual_is_nothing_on_the_teacher_and_grows_away_from_it():
    clip = torch.randn(1, 2, 3, 4, 4)
    teacher = lambda x_t, t, text: ((x_t - clip) / flow.expand(t / 1000, x_t), {})  # noqa: E731
    judge = lambda x0: teacher_residual(x0, torch.zeros(1, 1, 1), torch.zeros(1, 1), teacher, 1.0, torch.Generator().manual_seed(0))  # noqa: E731
    assert judge(clip) < 1e-8 and judge(clip + 0.1) == pytest.approx(0.01, rel=1e-3)
