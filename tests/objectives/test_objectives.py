"""usv/objectives: a file, a config and a test for each; settings that cannot be used are refused, those that are not read too."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from usv.config import ModelConfig, ObjectiveConfig, PolicyConfig, RuntimeConfig, SettingError, TrainConfig
from usv.objectives import OBJECTIVES, REGRESSIONS, check_objective, make_objective, of_older
from usv.objectives.protocol import Forwards, Needs

ROOT = Path(__file__).resolve().parents[2]
STEPS = [1000.0, 600.0]


def test_each_has_a_file_a_config_and_a_test():
    files = {p.stem for p in (ROOT / "usv" / "objectives").glob("*.py")} - {"__init__", "protocol", "regression", "rollout"}
    configs = {p.stem: yaml.safe_load(p.read_text())["name"] for p in (ROOT / "conf" / "objective").glob("*.yaml")}
    tests = {p.stem.removeprefix("test_") for p in Path(__file__).parent.glob("test_*.py")}
    assert files == set(configs) == set(configs.values()) == set(OBJECTIVES) and set(OBJECTIVES) <= tests


def test_loop_and_training_name_none():
    for path in (ROOT / "train.py", *(ROOT / "usv" / "training").glob("*.py")):
        assert "objective.name" not in path.read_text(), path


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"name": "distil"}, "name: got distil, accepted: velocity | consistency | trajectory | distribution"),
        ({"base": "distribution"}, "base: got distribution, accepted: velocity | consistency | trajectory"),
        ({"name": "trajectory"}, "student_timesteps: got [], accepted: timesteps, with objective=trajectory"),
        ({"name": "distribution"}, "student_timesteps: got [], accepted: timesteps"),
        ({"name": "consistency", "student_timesteps": [900.0]}, "student_timesteps: got [900.0], accepted: 1000 first"),
        ({"name": "consistency", "solver_steps": 0}, "solver_steps: got 0, accepted: at least 1"),
        ({"name": "consistency", "reuse": 2}, "reuse: got 2, accepted: 1 with objective=consistency, which does not read it"),
        ({"name": "consistency", "guide": "teacher"}, "guide: got teacher, accepted: None with objective=consistency"),
        ({"matching_weight": 0.5}, "matching_weight: got 0.5, accepted: 1.0 with objective=velocity"),
        ({"name": "trajectory", "student_timesteps": STEPS, "reuse": 0}, "reuse: got 0, accepted: at least 1"),
        ({"name": "distribution", "student_timesteps": STEPS, "matching_weight": 0.0}, "matching_weight: got 0.0, accepted: above 0, but"),
        ({"name": "distribution", "student_timesteps": STEPS, "base_weight": -1.0}, "base_weight: got -1.0, accepted: at least 0"),
        ({"name": "distribution", "student_timesteps": STEPS, "base_weight": 0.0}, "base_weight: got 0.0, accepted: above 0, but for policy=inherit"),
        ({"name": "distribution", "student_timesteps": STEPS, "critic_lr": 0.0}, "critic_lr: got 0.0, accepted: above 0"),
        ({"name": "distribution", "student_timesteps": STEPS, "critic_updates": 0}, "critic_updates: got 0, accepted: at least 1"),
        ({"name": "distribution", "student_timesteps": STEPS, "critic_warmup": -1}, "critic_warmup: got -1, accepted: 0 or more"),
        ({"name": "distribution", "student_timesteps": STEPS, "adversarial": "wgan"}, "adversarial: got wgan, accepted: non_saturating | hinge"),
        ({"name": "distribution", "student_timesteps": STEPS, "adversarial_weight": -0.1}, "adversarial_weight: got -0.1, accepted: 0 (off) or more"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(settings, refusal):
    with pytest.raises(SettingError) as caught:
        check_objective(TrainConfig(objective=ObjectiveConfig(**settings)))
    assert str(caught.value).startswith(f"objective.{refusal}")


def test_combinations():
    o = ObjectiveConfig("distribution", base="trajectory", guide="teacher", reuse=2, student_timesteps=STEPS, adversarial_weight=0.1)
    check_objective(TrainConfig(objective=o))
    check_objective(TrainConfig(objective=replace(o, base_weight=0.0), policy=PolicyConfig("inherit")))
    check_objective(TrainConfig(objective=replace(o, matching_weight=0.0)))
    for more, refusal in (
        ({"runtime": RuntimeConfig("ddp", sequence_parallel=2)}, "objective.adversarial_weight: got 0.1, accepted: 0 with runtime.sequence_parallel"),
        ({"model": ModelConfig(experts=2, expert="high")}, "objective.name: got distribution, accepted: velocity, for one of two experts"),
        ({"policy": PolicyConfig(steps=True)}, "objective.name: got distribution, accepted: consistency with policy.steps"),
    ):
        with pytest.raises(SettingError) as caught:
            check_objective(TrainConfig(objective=o, **more))
        assert str(caught.value).startswith(refusal)


def test_what_is_read_is_a_setting():
    names = {field.name for field in fields(ObjectiveConfig)}
    assert all(set(kind.reads) <= names for kind in OBJECTIVES.values())
    assert set().union(*(kind.reads for kind in OBJECTIVES.values())) == names - {"name", "init"}


def test_needs_and_costs():
    make = lambda name, **more: make_objective(ObjectiveConfig(name, student_timesteps=STEPS, **more), 3.0)  # noqa: E731
    assert make("velocity").needs == make("consistency").needs == make("trajectory").needs == Needs()
    assert make("trajectory", init="x").needs == Needs(guide=True) and make("trajectory", init="x", guide="teacher").needs == Needs()
    assert make("distribution", base="trajectory", init="x").needs == Needs(guide=True, critic=True)
    assert [make(name).few_steps for name in OBJECTIVES] == [False, True, True, True]
    assert [make(name).warm_up for name in (*REGRESSIONS, "distribution")] == [0, 0, 0, ObjectiveConfig().critic_warmup]
    assert make("velocity").forwards() == Forwards(teacher=1) and make("consistency").forwards() == Forwards(teacher=1, student=1)
    assert make("trajectory", solver_steps=15, reuse=4).forwards() == Forwards(guide=2, student=0.125)
    # teacher: its step and the judging; a rollout makes 1.5 calls, of which the student's own last has a gradient; the critic judges, and learns
    assert make("distribution", critic_updates=2).forwards() == Forwards(teacher=2, student=1 + 0.5 + 3, rollouts=1, critic=(3, 2))


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_learns_nothing_saves_nothing(name):
    objective = make_objective(ObjectiveConfig(name, student_timesteps=STEPS), 3.0)
    assert objective.state_dict() == {} and objective.load_state_dict({}) is None
    with pytest.raises(ValueError, match="learns nothing was given critic"):
        objective.load_state_dict({"critic": {}})


def test_states_from_before_the_name_are_read():
    old = {"policy.bins": 4, "distill.name": "consistency", "distill.critic_updates": 1, "distill.critic_lr": 3e-4, "distill.reuse": 1}
    new = {"policy.bins": 4, "objective.name": "consistency", "objective.reuse": 1}
    assert of_older({**old, "distill.distribution": 0.0}) == new, "no critic read the others"
    matched = {"objective.name": "distribution", "objective.base": "consistency", "objective.matching_weight": 0.5}
    assert of_older({**old, "distill.distribution": 0.5}) == {**new, **matched, "objective.critic_updates": 1, "objective.critic_lr": 3e-4}
    assert of_older(new) == new
