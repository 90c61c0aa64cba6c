"""usv/evaluation/oracle.py: damages of one rung at a time, and the plan that the knapsack makes of them."""

import json
import sys

import numpy as np
import pytest
import tiny
import torch

from usv.config import ModelConfig
from usv.evaluation import oracle
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, load_student, save_student
from usv.sampling.generate import load_pipeline
from usv.sparse.cost import ModelShape, rung_costs
from usv.sparse.grid import Tile, tile_layout
from usv.sparse.plan import DENSITY_LADDER, RUNGS, Rung, SparsityPlan, timestep_bins

PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 2), Rung(2, 0)), (Rung(2, 0), Rung(1, 1))))


def test_the_oracle_spends_the_budget_where_damage_is():
    costs = [1.0 - 0.9 * i / (len(RUNGS) - 1) for i in range(len(RUNGS))]
    damage = np.zeros((2, 2, len(RUNGS)))
    damage[0, 1, 1:] = 5.0  # one cell does not bear anything, the others anything
    plan = oracle.oracle_plan(damage, costs, 0.4, (500.0, 1000.0))
    assert plan.rungs[0][1] == RUNGS[0] and np.mean([costs[RUNGS.index(r)] for row in plan.rungs for r in row]) <= 0.4


def test_the_oracle_keeps_to_the_bounds_of_the_policy():
    costs = [1.0 - 0.9 * i / (len(RUNGS) - 1) for i in range(len(RUNGS))]
    damage = np.random.default_rng(0).uniform(size=(2, 3, len(RUNGS)))
    damage[..., [r.density == 0 for r in RUNGS]] = -1.0  # dense attention is tempting everywhere, and most so in one cell
    damage[1, 2, [r.density == 0 for r in RUNGS]] = -9.0
    plan = oracle.oracle_plan(damage, costs, 0.9, (500.0, 1000.0), merge_layers=1, most_density=0.25)
    used = [DENSITY_LADDER[r.density] for row in plan.rungs for r in row]
    assert np.mean(used) <= 0.25 and max(used) == 1.0 == used[-1], "the mean is bounded, not every rung"
    assert all(i < 1 or r.merge == 0 for row in plan.rungs for i, r in enumerate(row))
    least = oracle.predicted(damage, plan)
    free = oracle.oracle_plan(damage, costs, 0.9, (500.0, 1000.0))
    assert oracle.predicted(damage, free) < least
    rng = np.random.default_rng(1)
    for _ in range(2000):  # no plan within the same bounds is better
        picks = rng.integers(len(RUNGS), size=(2, 3))
        rungs = [[RUNGS[i] for i in row] for row in picks]
        if np.mean([costs[i] for i in picks.flat]) <= 0.9 and np.mean([DENSITY_LADDER[r.density] for row in rungs for r in row]) <= np.mean(used):
            if all(r.merge == 0 for row in rungs for r in row[1:]):
                assert oracle.predicted(damage, SparsityPlan((500.0, 1000.0), tuple(map(tuple, rungs)))) >= least - 1e-9


@pytest.fixture
def student(tiny_wan, tmp_path):
    model = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval()
    sampling = {
        "height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT,
        "flow_shift": 3.0, "guidance_folded_in": 3.0,
    }  # fmt: skip
    save_student(tmp_path / "student", Student(model, PLAN, sampling))
    return tmp_path / "student"


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_three_plans_of_one_cost(student, tiny_wan, tiny_shards, weights):
    settings = ModelConfig(str(tiny_wan), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE))
    pipe = load_pipeline(str(tiny_wan))
    report = oracle.compare(settings, load_student(student, pipe.transformer), pipe, str(tiny_shards), weights, 1)
    rows, damage = report["rows"], np.array(report["damage"])
    assert rows["uniform"]["cost"] <= rows["learned"]["cost"] + 1e-4 and rows["oracle"]["cost"] <= rows["learned"]["cost"] + 1e-4
    assert rows["learned"]["plan"] == PLAN.to_dict()["rungs"]
    assert (damage[..., 0] == 0).all() and (damage[..., 1:] != 0).all(), "the first rung is dense, every other was executed"
    if weights == "teacher":  # its own velocity is wanted: all of the error is the plan's
        assert max(row["error"] for row in rows.values()) < 0.5 and report["damage"][0][0][0] == 0


def test_what_cannot_be_compared_is_refused(student, tiny_wan, tiny_shards):
    settings = ModelConfig(str(tiny_wan), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE))
    pipe = load_pipeline(str(tiny_wan))
    loaded = load_student(student, pipe.transformer)
    with pytest.raises(ValueError, match="at most half of the held-out clips"):
        oracle.compare(settings, loaded, pipe, str(tiny_shards), "teacher", 2)
    loaded.sampling["student_timesteps"] = [1000.0]
    with pytest.raises(ValueError, match="a student of fixed few steps"):
        oracle.compare(settings, loaded, pipe, str(tiny_shards), "teacher", 1)


def test_every_choice_of_steps_is_searched(student, tiny_wan, tiny_shards):
    """Of three candidates two run: the oracle samples both choices, and finds the one the teacher would move least."""
    settings = ModelConfig(str(tiny_wan), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE))
    pipe = load_pipeline(str(tiny_wan))
    loaded = load_student(student, pipe.transformer)
    edges = timestep_bins(3, 3.0)
    early, late = (Rung(1, 2), Rung(2, 0)), (Rung(4, 0), Rung(0, 1))
    loaded.plan = SparsityPlan(edges, (late, early, early), (True, False, True))
    loaded.sampling["student_timesteps"] = loaded.plan.student_timesteps()
    forward, ran = loaded.model.forward, []
    loaded.model.forward = lambda x, t, text, row: ran.append((round(float(t[0])), row)) or forward(x, t, text, row)
    report = oracle.compare(settings, loaded, pipe, str(tiny_shards), "student", 1)
    assert set(ran) == {(1000, early), (round(edges[0]), late), (round(edges[1]), late)}, "the second step is the plan's second wherever it lies"
    layout, shape = tile_layout(loaded.model.grid_of((16, 5, 8, 8)), loaded.model.tile), ModelShape.of(loaded.model.config, tiny.TEXT)
    costs = dict(zip(RUNGS, rung_costs(shape, layout)))
    wanted = sum(costs[rung] for rung in early + late) / 2  # two layers, two steps; in dense forwards
    assert all(row["cost"] == pytest.approx(wanted, abs=1e-5) for row in report["rows"].values())
    found = {tuple(s["steps"]): s["error"] for s in report["subsets"]}
    assert set(found) == {(1000.0, edges[0]), (1000.0, edges[1])} and len(set(found.values())) == 2
    assert tuple(report["rows"]["oracle"]["steps"]) == min(found, key=found.get)
    assert report["rows"]["learned"]["steps"] == [1000.0, edges[0]]
    with pytest.raises(ValueError, match="for a student of learned steps"):
        oracle.compare(settings, loaded, pipe, str(tiny_shards), "teacher", 1)
    loaded.plan = SparsityPlan(edges, loaded.plan.rungs, (False, False, True))
    report = oracle.compare(settings, loaded, pipe, str(tiny_shards), "student", 1)
    assert report["gain"] is None and len(report["subsets"]) == 1, "one step has one place"


def test_steps_spaced_evenly():
    edges = tuple(float(i) for i in range(1, 9))
    assert oracle.oracle_steps.even(edges, 2) == (8.0, 4.0) and oracle.oracle_steps.even(edges, 3) == (8.0, 5.0, 3.0)
    assert oracle.oracle_steps.even(edges[:6], 5) == (6.0, 5.0, 4.0, 2.0, 1.0) and oracle.oracle_steps.even(edges, 8) == edges[::-1]
    assert len(oracle.oracle_steps.subsets(edges, 3)) == 21 and all(s[0] == 8.0 for s in oracle.oracle_steps.subsets(edges, 3))


def test_damage_is_the_rise_of_the_error(student, tiny_wan, tiny_shards):
    settings = ModelConfig(str(tiny_wan), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE), guidance_scale=1.0)
    pipe = load_pipeline(str(tiny_wan))
    teacher = SparseTransformer(pipe.transformer, Tile(*tiny.TILE)).eval()
    batch = {"latents": torch.randn(2, 16, tiny.FRAMES, 8, 8), "text": torch.randn(2, tiny.TEXT, 64)}
    judge = oracle.Judge(teacher, teacher, batch, torch.zeros(tiny.TEXT, 64), settings, PLAN.edges, 0)
    assert judge.error(0, None)[0] == 0 and judge.plan_error(SparsityPlan.uniform(Rung(), PLAN.edges, 2)) == 0
    assert judge.plan_error(PLAN) > 0 and judge.error(1, PLAN.rungs[1])[1] > 0


def test_command_line(student, tiny_wan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oracle, "compare", lambda *_, **__: {"rows": {"learned": {"error": 0.1, "cost": 0.2}}, "gain": 0.97})
    words = ["oracle", "--ckpt", str(student), "--model", str(tiny_wan), "--weights", "teacher", "--out", str(tmp_path / "o.json")]
    monkeypatch.setattr(sys, "argv", words)
    oracle.main()
    assert "97% of the oracle's gain" in capsys.readouterr().out and json.loads((tmp_path / "o.json").read_text())["gain"] == 0.97
    monkeypatch.setattr(sys, "argv", ["oracle", "--ckpt", "no/such", "--model", str(tiny_wan)])
    with pytest.raises(SystemExit, match="CheckpointError: no/such"):
        oracle.main()
