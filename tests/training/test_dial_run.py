"""A run of train.py with policy.budgets: budgets drawn, rungs of each, one checkpoint that is decoded for any of them."""

import pytest
import tiny
from runs import interrupt, same

from usv.config import SettingError
from usv.objectives.trajectory import TrajectoryObjective
from usv.policy.dial import BudgetError
from usv.sampling.budget import plan_at
from usv.sampling.checkpoint import load_student
from usv.sampling.generate import load_pipeline
from usv.sparse.cost import ModelShape, plan_cost
from usv.sparse.grid import tile_layout
from usv.training.run import Run, budget_at


def dial(config):
    config.policy.budget, config.policy.budgets, config.policy.input = 0.8, [0.7, 0.95], "place"
    return config


def test_budgets_are_drawn_between_both_ends(make, tmp_path):
    """A quarter the smallest, a quarter the largest, the others between; none below what the warm-down has reached."""
    config = dial(make(tmp_path / "run", steps=4000))
    config.policy.warm_down = [0.0, 0.5]
    late = [budget_at(step, config) for step in range(2000, 4000)]
    assert all(0.7 <= b <= 0.95 for b in late)
    shares = [sum(b == pytest.approx(end) for b in late) / len(late) for end in (0.7, 0.95)]
    assert all(abs(share - 0.25) < 0.05 for share in shares)  # five standard deviations of 2,000 draws
    early = [budget_at(step, config) for step in range(0, 1000, 10)]
    assert all(b >= 0.7 ** (step / 2000) - 1e-9 for b, step in zip(early, range(0, 1000, 10)))


def test_one_checkpoint_serves_every_budget(make, watched, tmp_path, tiny_wan):
    seen = []
    run = lambda name: dial(make(tmp_path / name))  # noqa: E731
    note = {step: lambda run: seen.append((run.policy.target, run.frozen() if run.plan is not None else None)) for step in range(1, 9)}
    _, whole, _ = watched(run("whole"), at=note)
    assert len({target for target, _ in seen}) > 3 and all(plan is not None for _, plan in seen[5:])
    student = load_student(tmp_path / "whole" / "student", load_pipeline(str(tiny_wan)).transformer)
    layout = tile_layout(student.model.grid_of((16, tiny.FRAMES, 8, 8)), student.model.tile)
    shape = ModelShape.of(student.model.config, tiny.TEXT)
    for budget in (0.7, 0.8, 0.95):
        assert plan_cost(plan_at(student, student.plan, budget), shape, layout) <= budget + 1e-9
    assert plan_at(student, student.plan) is student.plan and plan_at(student, student.plan, 0.8) == student.plan, "its own budget is its own plan"
    with pytest.raises(BudgetError, match=r"budget: got 0.5, accepted: 0.7 to 0.95"):
        plan_at(student, student.plan, 0.5)
    watched(run("parts"), at={6: interrupt})
    _, parts, _ = watched(run("parts"))
    assert same(whole, parts), "resumed after the freeze it draws and decodes as it would have"


def test_a_budget_that_no_plan_meets_is_refused_before_the_first_step(make, watched, tmp_path):
    """It would end the run at its first validation, and again whenever it is resumed."""
    config = dial(make(tmp_path / "run"))
    config.policy.budgets = [0.05, 0.95]
    with pytest.raises(SettingError, match=r"policy.budgets: got 0.05, but the sparsest plan still costs 0\.\d+"):
        watched(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_rollouts_run_at_the_budget_of_their_step(make, watched, tmp_path, monkeypatch):
    config, seen = dial(make(tmp_path / "run", steps=4)), []
    o = config.objective
    o.name, o.student_timesteps, o.solver_steps = "trajectory", [1000.0, 500.0], 2
    make_start, decide = TrajectoryObjective.make, Run.decide
    monkeypatch.setattr(TrajectoryObjective, "make", lambda self, run, *rest: (seen.append(run.policy.target), make_start(self, run, *rest))[1])
    monkeypatch.setattr(Run, "decide", lambda run, bin, target, *rest: (seen.append(target), decide(run, bin, target, *rest))[1])
    watched(config)
    assert len(seen) == 8 and seen[::2] == seen[1::2] and len(set(seen)) > 1
