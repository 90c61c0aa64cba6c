"""A student at the budget, or the speed-up, that is asked for: `usv.policy.dial` with what the student, pipeline and machine are.

    usv.enable(pipe, "outputs/dial/student", budget=0.2)                       # a share of the dense cost
    usv.set_budget(pipe, 0.3)                                                  # between calls of the pipeline
    usv.enable(pipe, "outputs/dial/student", speedup=2.5, costs="costs.json")  # for this machine: python -m usv.bench costs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from usv.patterns.processors import unwrap
from usv.policy.dial import BudgetError, plan_for
from usv.sampling import enable as pipelines
from usv.sampling.checkpoint import Student, read_config
from usv.sampling.record import CELL, plan_of
from usv.sparse.measured import MeasuredCosts, device_name, read_costs
from usv.sparse.plan import SparsityPlan


def shape_of(model) -> dict:
    """Numbers of a network's config by which a file of costs knows it."""
    return {key: _plain(model.config[key]) for key in model.family.shape_keys if key in model.config}


def _plain(value):
    return list(value) if isinstance(value, (tuple, list)) else value


def _facts(student: Student) -> dict:
    """What of a student its record says, too."""
    tile = student.model.tile
    return {
        "transformer": shape_of(student.model), "tile": [tile.t, tile.h, tile.w], "cell": list(tile.cell), "sampling": student.sampling,
        "policy": student.policy,
    }  # fmt: skip


def measured_for(path: str | Path, student: Student | Mapping, num_layers: int) -> MeasuredCosts:
    """A file of costs, refused unless it was measured on this device for this student's model, size and tile. CostsError.

    student: itself, or its record.
    """
    facts = _facts(student) if isinstance(student, Student) else student
    sampling = facts["sampling"]
    wanted = {
        "device": device_name(), "num_layers": num_layers, "transformer": dict(facts["transformer"]), "tile": facts["tile"], "cell": facts.get("cell", CELL),
        **{key: sampling[key] for key in ("height", "width", "num_frames") if sampling.get(key) is not None},
    }  # fmt: skip
    return read_costs(path, wanted)


def plan_at(student: Student | Mapping, plan: SparsityPlan, budget=None, speedup=None, costs: str | Path | None = None) -> SparsityPlan:
    """The plan of a student, or of its record, for a budget or a speed-up; `plan`, its own, where none is asked for.

    Raises BudgetError, CostsError.
    """
    if budget is None and speedup is None:
        if costs is not None:
            raise BudgetError("costs: got a file without budget or speedup, accepted: with one of them")
        return plan
    measured = None if costs is None else measured_for(costs, student, plan.num_layers)
    policy = student.policy if isinstance(student, Student) else student.get("policy", {})
    return plan_for(policy, plan.edges, budget, speedup, measured)


def enable(pipe, checkpoint=None, *args, budget=None, speedup=None, costs: str | Path | None = None, **options):
    """`usv.sampling.enable.enable`, at another budget than the student's own.

    budget: share of the dense forward's FLOPs, or with `costs` of its seconds. speedup: dense seconds over the student's, with `costs`: a
    file of `python -m usv.bench costs` from this machine. Neither: the plan that the student was saved with.

    Raises what that does, and BudgetError or CostsError before anything is changed.
    """
    if budget is None and speedup is None and costs is None:
        return pipelines.enable(pipe, checkpoint, *args, **options)
    if checkpoint is None or options.get("attention") is not None or len(args) > 1:
        raise BudgetError("budget, speedup, costs: got one without a checkpoint or beside attention=…, accepted: with a checkpoint alone, whose damages a plan is decoded from")
    given = checkpoint if isinstance(checkpoint, (tuple, list)) else [checkpoint]
    for one in given:  # whatever is wrong with the request shows before a weight is read
        record = one if isinstance(one, Student) else read_config(one)
        plan_at(record, one.plan if isinstance(one, Student) else plan_of(record, one), budget, speedup, costs)
    pipelines.enable(pipe, checkpoint, *args, **options)
    return set_budget(pipe, budget, speedup, costs)


def set_budget(pipe, budget=None, speedup=None, costs: str | Path | None = None):
    """Give the enabled student, or both, the plan of another budget from the next forward on; nothing is loaded. Returns the pipeline.

    Neither budget nor speedup: back to the plan it was saved with. Raises BudgetError where no student is enabled, or one together with a
    pattern, or the budget is out of reach; CostsError for a file of another machine or model. The pipeline then stays as it was.
    """
    state = getattr(pipe, "_usv", None)
    if not isinstance(state, pipelines.Enabled):
        raise BudgetError("set_budget: got a pipeline without a student, accepted: after usv.enable(pipe, checkpoint)")
    if state.pattern is not None:
        raise BudgetError("set_budget: got a pipeline whose student runs a pattern's blocks, accepted: one without; its densities were fixed when it was enabled")
    own = state.__dict__.setdefault("own_plans", [student.plan for student in state.students])
    plans = [plan_at(student, plan, budget, speedup, costs) for student, plan in zip(state.students, own)]
    state.students = tuple(replace(student, plan=plan) for student, plan in zip(state.students, plans))
    for place, plan in zip(state.originals, plans):
        unwrap(getattr(pipe, place))._planned.plan = plan
    return pipe
