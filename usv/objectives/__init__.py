"""What the student is trained towards: `objective=velocity | consistency | trajectory | distribution`, one file each.

    velocity      the teacher's guided velocity                  sampled in the teacher's steps
    consistency   where the teacher's flow ends                  few steps, from noised clips
    trajectory    where a guide's flow ends                      few steps, from what its own rollouts meet
    distribution  samples that teacher and critic tell apart no more, beside one of the others; few steps
"""

from __future__ import annotations

from dataclasses import fields

from usv.config import ObjectiveConfig, SettingError, TrainConfig
from usv.objectives.consistency import ConsistencyObjective
from usv.objectives.distribution import ADVERSARIAL, DistributionObjective
from usv.objectives.protocol import Objective
from usv.objectives.trajectory import TrajectoryObjective
from usv.objectives.velocity import VelocityObjective

REGRESSIONS = {"velocity": VelocityObjective, "consistency": ConsistencyObjective, "trajectory": TrajectoryObjective}
OBJECTIVES = {**REGRESSIONS, "distribution": DistributionObjective}


def make_objective(settings: ObjectiveConfig, flow_shift: float) -> Objective:
    """The objective that checked settings name."""
    if settings.name in REGRESSIONS:
        return REGRESSIONS[settings.name](settings, flow_shift)
    return DistributionObjective(settings, flow_shift, REGRESSIONS[settings.base](settings, flow_shift))


def check_objective(config: TrainConfig) -> None:
    """SettingError for values of `objective.*` that cannot be used, and for those that this objective would not read."""
    o, steps = config.objective, config.policy.steps
    _refuse("objective.name", o.name, o.name in OBJECTIVES, " | ".join(OBJECTIVES))
    _refuse("objective.base", o.base, o.base in REGRESSIONS, " | ".join(REGRESSIONS))
    kinds = [OBJECTIVES[o.name], *([REGRESSIONS[o.base]] if o.name == "distribution" else [])]
    learns_steps = [name for name, kind in OBJECTIVES.items() if getattr(kind, "learns_steps", False)]
    rules = [
        ("name", config.model.expert is None or not kinds[0].few_steps, "velocity, for one of two experts"),
        ("name", not steps or o.name in learns_steps, f"{' | '.join(learns_steps)} with policy.steps; objective=distribution goes on from its student, with policy=inherit"),
        ("solver_steps", o.solver_steps >= 1, "at least 1"),
        ("reuse", o.reuse >= 1, "at least 1"),
        ("student_timesteps", _ladder(o.student_timesteps), "1000 first, then descending above 0, or none"),
        ("student_timesteps", bool(o.student_timesteps) or not any(getattr(kind, "needs_timesteps", False) for kind in kinds), f"timesteps, with objective={o.name}"),
        ("base_weight", o.base_weight >= 0, "at least 0"),
        ("base_weight", o.base_weight > 0 or config.policy.name in ("inherit", "static"), "above 0, but for policy=inherit | static: the policy learns from the regression"),
        ("matching_weight", o.matching_weight >= 0, "at least 0"),
        ("matching_weight", o.matching_weight > 0 or o.adversarial_weight > 0, "above 0, but beside objective.adversarial_weight"),
        ("critic_lr", o.critic_lr > 0, "above 0"),
        ("critic_updates", o.critic_updates >= 1, "at least 1"),
        ("critic_warmup", o.critic_warmup >= 0, "0 or more"),
        ("adversarial", o.adversarial in ADVERSARIAL, " | ".join(ADVERSARIAL)),
        ("adversarial_weight", o.adversarial_weight >= 0, "0 (off) or more"),
        ("adversarial_weight", not o.adversarial_weight or config.runtime.sequence_parallel == 1, "0 with runtime.sequence_parallel: the head sees a part of a clip's tokens there"),
    ]  # fmt: skip
    for name, fine, accepted in rules:
        _refuse(f"objective.{name}", getattr(o, name), fine, accepted)
    read = {"name", "init", *(name for kind in kinds for name in kind.reads)}
    standard = ObjectiveConfig()
    for field in fields(o):
        got, usual = getattr(o, field.name), getattr(standard, field.name)
        _refuse(f"objective.{field.name}", got, field.name in read or got == usual, f"{usual} with objective={o.name}, which does not read it")


def of_older(settings: dict) -> dict:
    """Settings of a state that was written when the objective was called distill, by today's names."""
    new = {name.replace("distill.", "objective."): value for name, value in settings.items()}
    if weight := new.pop("objective.distribution", 0):
        new |= {"objective.name": "distribution", "objective.base": new["objective.name"], "objective.matching_weight": weight}
    elif "distill.name" in settings:  # then no critic read them
        new = {name: value for name, value in new.items() if not name.startswith("objective.critic_")}
    return new


def _refuse(name: str, got, fine: bool, accepted: str) -> None:
    if not fine:
        raise SettingError(f"{name}: got {got}, accepted: {accepted}")


def _ladder(steps: list[float]) -> bool:
    return not steps or (steps[0] == 1000 and all(a > b for a, b in zip(steps, [*steps[1:], 0])))
