"""Few-step students: steps decided by the policy, consistency and distribution matching, trajectories of a guide, adapters."""

import json

import pytest
import torch
from runs import interrupt, program, same
from safetensors.torch import load_file

from usv.config import ObjectiveConfig, SettingError
from usv.objectives.protocol import Point
from usv.sampling.checkpoint import read_config
from usv.sparse.plan import Rung, SparsityPlan
from usv.training.build import inherit_steps


@pytest.mark.parametrize(("every", "jumps"), [(1, 4), (2, 2)])
def test_steps_are_decided_with_the_rungs(make, watched, tmp_path, every, jumps):
    """policy.steps: jumps are measured, the plan says which steps run, the student samples with those, the budget is all steps'."""
    config = make(tmp_path / "run")
    config.policy.steps, config.policy.bins, config.policy.budget, config.objective.name = True, 3, 0.4, "consistency"
    config.policy.jump_every = every
    seen = []
    watched(config, at={4: lambda run: seen.append(run.policy.jump_seen.clone())})
    assert float(seen[0].sum()) == jumps and float(seen[0][-1]) == 0  # a jump every so many steps; pure noise is never jumped
    record = read_config(tmp_path / "run" / "student")
    plan = SparsityPlan.from_dict(record["plan"])
    assert len(plan.steps) == 3 and plan.steps[-1]
    assert record["sampling"]["student_timesteps"] == plan.student_timesteps()
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    cost = [line["validation/sampling_cost"] for line in last if "validation/sampling_cost" in line][-1]
    assert cost <= 0.4 + 1e-6
    asked = {key for line in last if "validation/sampling_cost" in line for key in line if key.startswith("validation_by_noise")}
    assert {f"validation_by_noise/t_{t:.0f}" for t in plan.student_timesteps()} <= asked, "once decided, where it is sampled"


def test_a_probe_that_is_not_finite_is_not_remembered(make, watched, tmp_path, monkeypatch):
    config = make(tmp_path / "run", steps=3)
    config.policy.steps, config.policy.bins, config.objective.name, seen = True, 3, "consistency", []
    monkeypatch.setattr(program.rollout, "jump_damage", lambda *a: (float("nan"), 1.0))
    watched(config, at={1: lambda run: seen.append((float(run.policy.jump_seen.sum()), run.policy.jump_damage.isfinite().all()))})
    assert seen == [(0.0, True)]


def test_a_forwards_target_is_of_those_that_run(make, watched, tmp_path):
    """What the bar and the log show beside a forward's cost: where steps are decided the budget is shared by those that run."""
    config, seen = make(tmp_path / "steps"), []
    config.policy.steps, config.policy.bins, config.policy.budget, config.objective.name = True, 3, 0.2, "consistency"
    watched(config, at={8: lambda run: seen.append((sum(run.plan.steps), run.forward_target(0.2)))})
    running, target = seen[0]
    assert target == min(1.0, 0.2 * 3 / running)
    inherited = make(tmp_path / "part", policy="inherit", steps=1)
    inherited.policy.axes, inherited.objective.name, inherited.objective.init = [], "trajectory", str(tmp_path / "steps" / "student")
    inherited.objective.guide, inherited.policy.budget = "teacher", 0.2
    watched(inherited, at={1: lambda run: seen.append(run.forward_target(0.2))})
    assert seen[1] == 1.0, "dense, whatever the budget"


@pytest.mark.parametrize(("bins", "solver_steps"), [(3, 20), (6, 2)])
def test_every_bin_that_the_solver_reaches_has_its_row(make, watched, tmp_path, monkeypatch, bins, solver_steps):
    """The student's answer below is asked under the row of the bin it lies in, however few steps the solver has."""
    config = make(tmp_path / "run", steps=2 * bins)
    config.policy.steps, config.policy.bins, config.objective.name, config.objective.solver_steps = True, bins, "consistency", solver_steps
    config.policy.jump_every, original, reached = 99, program.Run.sparse_by_bin, set()

    def spy(run, prompt, rows):
        call = original(run, prompt, rows)

        def checked(x, t):
            here = {program.bin_of(float(each), run.edges) for each in t}
            reached.add(max(rows) - min(here))
            assert here <= {*rows}
            return call(x, t)

        return checked

    monkeypatch.setattr(program.Run, "sparse_by_bin", spy)
    watched(config)
    assert max(reached) == -(-bins // solver_steps)


def test_a_part_of_an_inherited_plan(make, watched, tmp_path):
    """policy.axes with policy=inherit: one axis of another run's plan, the other dense; none: a dense student."""
    first = make(tmp_path / "first", policy="static", steps=2)
    first.policy.budget, first.policy.warm_down = 0.3, [0.0, 0.1]
    watched(first)
    rungs = lambda name: json.loads((tmp_path / name / "student" / "config.json").read_text())["plan"]["rungs"]  # noqa: E731
    assert any(d and m for row in rungs("first") for d, m in row)
    for name, axes in (("attention", ["density"]), ("merge", ["merge"]), ("dense", [])):
        config = make(tmp_path / name, policy="inherit", steps=1)
        config.policy.axes, config.objective.init = axes, str(tmp_path / "first" / "student")
        watched(config)
        wanted = [[[d * ("density" in axes), m * ("merge" in axes)] for d, m in row] for row in rungs("first")]
        assert rungs(name) == wanted


def test_inherited_steps_are_those_that_are_trained():
    plan = SparsityPlan((400.0, 700.0, 1000.0), ((Rung(),),) * 3, (True, False, True))
    settings = ObjectiveConfig(name="trajectory", student_timesteps=[1000.0, 750.0])
    inherit_steps(settings, True, plan)
    assert settings.student_timesteps == [1000.0, 400.0]
    with pytest.raises(SettingError, match="the plan of objective.init decides"):
        inherit_steps(ObjectiveConfig(name="velocity"), False, plan)
    inherit_steps(settings, True, SparsityPlan(plan.edges, plan.rungs))
    assert settings.student_timesteps == [1000.0, 400.0], "a plan that leaves steps alone leaves them alone"


def test_few_steps_from_a_velocity_student(make, watched, tmp_path):
    """objective=distribution on the plan of another run: the plan is inherited, the critic learns, resume is exact."""
    first = make(tmp_path / "first", steps=2)
    watched(first)

    def few(folder):
        config = make(folder, policy="inherit", steps=3)
        d = config.objective
        d.name, d.init, d.student_timesteps, d.matching_weight = "distribution", str(tmp_path / "first" / "student"), [1000.0, 600.0], 0.5
        d.critic_updates, d.critic_warmup, d.adversarial_weight = 2, 1, 0.1
        return config

    watched(few(tmp_path / "whole"))
    plan = lambda name: json.loads((tmp_path / name / "student" / "config.json").read_text())  # noqa: E731
    assert plan("whole")["plan"] == plan("first")["plan"]
    assert plan("whole")["sampling"]["student_timesteps"] == [1000.0, 600.0]
    values = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any({"loss/critic", "loss/head", "loss/adversarial", "loss/distribution"} <= row.keys() for row in values) and any("validation/velocity_error" in row for row in values)
    watched(few(tmp_path / "parts"), at={2: interrupt})
    as_it_was_written_before(tmp_path / "parts" / "state" / "trainer.pt")
    watched(few(tmp_path / "parts"))
    a, b = (load_file(tmp_path / n / "student" / "student.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def as_it_was_written_before(file):
    """A state with the names it had when the objective was called distill, and its critic where that lay."""
    state = torch.load(file, weights_only=True)
    state["critic"] = state.pop("objective")["critic"]
    here, there = "objective.", "distill."
    kept = {n: v for n, v in state["settings"].items() if n.removeprefix(here) in ("init", "student_timesteps", "critic_lr", "critic_updates") or here not in n}
    state["settings"] = {n.replace(here, there): v for n, v in kept.items()} | {"distill.name": "consistency", "distill.distribution": 0.5}
    torch.save(state, file)
    file.with_name("checksum").unlink(missing_ok=True)  # there were none


def test_few_steps_along_the_guides_trajectory(make, watched, tmp_path):
    """The student of objective.init guides: asked at the levels of its flow, and left as it was; without it the teacher does."""
    first = make(tmp_path / "first", steps=2)
    watched(first)
    kept = load_file(tmp_path / "first" / "student" / "student.safetensors")

    def few(folder, init, **settings):
        config = make(folder, policy="inherit" if init else "static", **settings)
        d = config.objective
        d.name, d.init, d.student_timesteps, d.solver_steps = "trajectory", init, [1000.0, 600.0], 3
        config.logger.validate_every = 2
        return config

    init, guides = str(tmp_path / "first" / "student"), []
    seen, weights, _ = watched(few(tmp_path / "whole", init, steps=3), at={3: lambda run: guides.append(run.guide.model.state_dict())})
    assert sorted(seen) == [1, 2, 3]
    assert all(torch.equal(guides[0][k], v) for k, v in kept.items())
    assert any(not torch.equal(weights[k], v) for k, v in kept.items() if k in weights)
    watched(make(tmp_path / "second", steps=1))
    other = few(tmp_path / "other", init, steps=1)
    other.objective.guide = str(tmp_path / "second" / "student")
    watched(other, at={1: lambda run: guides.append(run.guide.model.state_dict())})
    assert all(torch.equal(guides[1][k], v) for k, v in load_file(tmp_path / "second" / "student" / "student.safetensors").items())
    other = few(tmp_path / "by_teacher", init, steps=1)
    other.objective.guide = "teacher"
    watched(other, at={1: lambda run: guides.append(run.guide)})
    assert guides[2] is None
    taught, _, _ = watched(few(tmp_path / "taught", None, steps=2))
    assert sorted(taught) == [1, 2]
    values = [json.loads(line) for line in (tmp_path / "taught" / "metrics.jsonl").read_text().splitlines()]
    asked = {key for row in values for key in row if key.startswith("validation_by_noise/")}
    assert asked == {"validation_by_noise/t_1000", "validation_by_noise/t_600"}  # where the student will be sampled, nowhere else


def test_a_guide_of_few_steps_is_asked_once_at_its_own_timesteps(make, watched, tmp_path):
    """Adapting a few-step student: what is wanted is its own answer where the new one's rollout stands, in training and held out."""
    begun = make(tmp_path / "begun", policy="static", steps=1)
    begun.objective.name, begun.objective.student_timesteps, begun.objective.solver_steps = "consistency", [1000.0, 600.0], 2
    watched(begun)

    def adapt(folder, timesteps, guide=None):
        config = make(folder, policy="inherit", steps=2)
        d = config.objective
        d.name, d.init, d.guide, d.student_timesteps, d.solver_steps = "trajectory", str(tmp_path / "begun" / "student"), guide, timesteps, 7
        config.optim.lr, config.logger.validate_every = 0.0, 2
        return config

    def as_the_guide_says(run):
        batch = next(iter(run.validation))
        noise, prompt = torch.randn(batch["latents"].shape), run.prompt(batch)
        point = run.objective.make(run, Point(noise, torch.ones(len(noise)), prompt, noise, 1.0), torch.Generator().manual_seed(1))
        row = run.guide.plan.at(1000 * point.level)
        assert point.level in (1.0, 0.6) and torch.allclose(point.wanted, run.guide.model(point.x, 1000 * point.sigma, prompt.text, row)[0], atol=1e-5)

    watched(adapt(tmp_path / "adapted", [1000.0, 600.0]), at={2: as_the_guide_says})
    rows = [json.loads(line) for line in (tmp_path / "adapted" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["validation/velocity_error"] for row in rows if "validation/velocity_error" in row]
    assert held_out and held_out[-1] < 1e-8, "weights that did not move, under the same plan: no error against the guide"
    with pytest.raises(SettingError, match=r"student_timesteps: got \[1000.0, 500.0\], accepted: some of \[1000.0, 600.0\], since objective.guide"):
        watched(adapt(tmp_path / "refused", [1000.0, 500.0]))


def test_a_few_step_student_of_adapters_starts_from_one(make, watched, tmp_path):
    """objective.init with lora.rank: adapters go on from adapters; whole weights are refused."""

    def adapted(folder, init=None, seed=3, lr=1e-3):
        config = make(folder, policy="inherit" if init else "gumbel", steps=3)
        config.lora.rank, config.seed, config.optim.lr, d = 4, seed, lr, config.objective
        if init:
            d.name, d.base, d.init, d.student_timesteps, d.solver_steps = "distribution", "trajectory", str(init), [1000.0, 600.0], 3
            d.matching_weight, d.critic_updates, d.critic_warmup, d.adversarial_weight = 0.5, 1, 1, 0.1
        return config

    watched(adapted(tmp_path / "first"))
    first = load_file(tmp_path / "first" / "student" / "student.safetensors")
    _, still, _ = watched(adapted(tmp_path / "still", tmp_path / "first" / "student", seed=4, lr=0.0))
    assert same(still, first), "it starts where the first ended"
    _, weights, record = watched(adapted(tmp_path / "few", tmp_path / "first" / "student", seed=4))
    assert weights.keys() == first.keys() and not same(weights, first) and not any("critic" in n for n in weights)
    assert record["sampling"]["student_timesteps"] == [1000.0, 600.0]
    other = adapted(tmp_path / "other", tmp_path / "first" / "student")
    other.lora.alpha *= 2
    with pytest.raises(ValueError, match="objective.init: got adapters of"):
        watched(other)
    watched(make(tmp_path / "whole", steps=2))
    with pytest.raises(ValueError, match="a student of adapters"):
        watched(adapted(tmp_path / "refused", tmp_path / "whole" / "student"))
