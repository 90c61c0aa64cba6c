"""usv/evaluation/oracle_terminal.py on a flow whose rollouts can be computed by hand: what steps do to one another."""

import numpy as np
import pytest
import torch

from usv.evaluation import oracle_terminal as terminal
from usv.policy import AXES
from usv.sparse.plan import RUNGS, Rung, SparsityPlan, timestep_bins

EDGES, LAYERS = timestep_bins(4, 1.0), 2
COSTS = [1 - 0.6 * r.density / 5 - 0.3 * r.merge / 3 for r in RUNGS]
PULL = 0.8


def call(x, timestep, row):
    """velocity = PULL · x, and each sparse layer adds its rung's number in the direction of the noise."""
    push = 0.0 if row is None else sum((i + 1) * (0.01 * r.density + 0.02 * r.merge) for i, r in enumerate(row))
    return PULL * x + push * torch.ones_like(x)


def rollouts(few_steps=False, steps=8):
    noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = [1000 * (steps - i) / steps for i in range(steps)]
    return terminal.Rollouts(call, noise, timesteps, EDGES, few_steps, 1.0)


@pytest.mark.parametrize("bin", range(4))
def test_what_an_early_push_is_at_the_end(bin):
    """Euler: a push at step k ends as Δ · push · (1 − Δ · PULL)^(steps after it); local is the same at every step."""
    r, rung, step = rollouts(), Rung(3, 1), 1 / 8
    push = 1 * (0.03 + 0.02)
    moved = sum(step * push * (1 - step * PULL) ** (7 - index) for index in range(8) if r.bins[index] == bin)
    wanted = 16 * 2 * moved**2 / r.end.flatten(1).square().sum(1)
    row = terminal.alone(LAYERS, 0, rung)
    assert torch.allclose(r.run(lambda b: row if b == bin else None), wanted, rtol=1e-4)
    velocities = sum(v.square().mean().item() for v in r.velocities)
    assert r.local(bin, row) == pytest.approx(2 * push**2 / velocities, rel=1e-4)
    assert r.run(lambda b: None).tolist() == [0, 0, 0]


def test_a_few_step_sampler_forgets():
    """A push moves x0 by sigma times itself; re-noising keeps 1 − sigma of that, and the next x0 (1 − sigma · PULL) of what is kept."""
    r = rollouts(few_steps=True, steps=4)
    assert r.bins == [3, 2, 1, 0] and r.sigmas == [1.0, 0.75, 0.5, 0.25, 0.0]
    damages = [r.terminal(bin, (Rung(2, 0),) * LAYERS) for bin in range(4)]
    kept = [0.25, 0.5 * 0.75 * 0.8, 0.75 * 0.5 * 0.6 * 0.75 * 0.8, 1.0 * 0.25 * 0.4 * 0.5 * 0.6 * 0.75 * 0.8]
    assert [d / damages[0] for d in damages] == pytest.approx([(k / kept[0]) ** 2 for k in kept], rel=1e-3)


def test_all_cells_are_measured_or_stood_for():
    r = rollouts()
    whole = terminal.measure(r, LAYERS, None)
    assert whole["measured"][..., terminal.STEPS].all() and not whole["terminal"][..., [0, AXES["density"]]].any()
    part = terminal.measure(r, LAYERS, 20)
    assert part["measured"].sum() == 20 and np.allclose(part["local"], whole["local"])
    assert np.allclose(part["terminal"], whole["terminal"], rtol=1e-3), "within a bin the ratio is one, so the rest is exact here"


def test_the_plan_of_least_terminal_damage_ends_nearest():
    """Later pushes are contracted less: the terminal plan is sparse early, the local one cannot know it."""
    noise = torch.randn(6, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    plan = SparsityPlan.uniform(Rung(2, 1), EDGES, LAYERS)
    cost = dict(zip(RUNGS, COSTS))
    cost_of = lambda p: sum(cost[r] for row in p.rungs for r in row) / len(p.rungs) / LAYERS  # noqa: E731
    report = terminal.compare((call, call), noise, plan, rollouts().timesteps, False, 1.0, COSTS, cost_of)
    errors = {name: row["end_error"] for name, row in report["rows"].items()}
    assert set(errors) == {"uniform", "local", "terminal", "own"} and errors["terminal"] <= errors["local"] * 1.001
    assert all(row["cost"] <= report["budget"] + 1e-6 for row in report["rows"].values())
    assert len(report["steps"]) == 16 and all(row["terminal"] < row["everywhere"] for row in report["steps"])
    assert report["steps"][0]["terminal"] > report["steps"][3]["terminal"], "the cleanest bin is contracted least"
    assert "<svg" in terminal.plot(report) and "end error" in terminal.table(report)
    assert terminal.paired(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0])) == {"ratio": pytest.approx(2), "interval": pytest.approx([2, 2]), "clips": 2}


def test_samplers_of_both_kinds():
    student = type("S", (), {"sampling": {"num_inference_steps": 4, "flow_shift": 3.0}})()
    steps, few = terminal.sampling_steps(student, None)
    assert not few and len(steps) == 4 and steps[0] == 1000 and steps[2] == pytest.approx(750)
    student.sampling["student_timesteps"] = [1000.0, 400.0]
    assert terminal.sampling_steps(student, 9) == ([1000.0, 400.0], True)
