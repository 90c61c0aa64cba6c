"""The plan of a student for a budget or a speed-up: `usv.policy.dial` with what the student and this machine are."""

from __future__ import annotations

from pathlib import Path

from usv.policy.dial import BudgetError, plan_for
from usv.sampling.checkpoint import Student
from usv.sparse.measured import MeasuredCosts, device_name, read_costs
from usv.sparse.plan import SparsityPlan


def measured_for(path: str | Path, student: Student) -> MeasuredCosts:
    """A file of costs, refused unless it was measured on this device for this student's model, size and tile. CostsError."""
    s, tile = student.sampling, student.model.tile
    wanted = {
        "device": device_name(), "num_layers": student.model.num_layers, "transformer": shape_of(student.model),
        "tile": [tile.t, tile.h, tile.w], "cell": list(tile.cell), **{key: s[key] for key in ("height", "width", "num_frames") if s.get(key) is not None},
    }  # fmt: skip
    return read_costs(path, wanted)


def shape_of(model) -> dict:
    """Numbers of a network's config by which a file of costs knows it."""
    return {key: _plain(model.config[key]) for key in model.family.shape_keys if key in model.config}


def _plain(value):
    return list(value) if isinstance(value, (tuple, list)) else value


def plan_at(student: Student, budget=None, speedup=None, costs: str | Path | None = None) -> SparsityPlan:
    """The student's plan for a budget or a speed-up; its own where none is asked for. BudgetError, CostsError."""
    if budget is None and speedup is None:
        if costs is not None:
            raise BudgetError("costs: got a file without budget or speedup, accepted: with one of them")
        return student.plan
    measured = None if costs is None else measured_for(costs, student)
    return plan_for(student.policy, student.plan.edges, budget, speedup, measured)
