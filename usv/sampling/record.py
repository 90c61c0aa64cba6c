"""What may stand in a student's config.json: every number in its range, so that a damaged or strange file ends in one line.

Nothing that is read may ask for more than its reader has: counts and lengths are bounded here, before anything is made of them.
"""

from __future__ import annotations

import json
import math
from numbers import Integral, Real
from pathlib import Path

from usv.bounds import MOST_TILE
from usv.config import SettingError
from usv.sparse.plan import SparsityPlan

MOST_BINS = 1000
CELL = [1, 2, 2]  # of students from before cells could cross frames
# of `sampling`: name -> (kind, least, most)
RANGES = {
    "height": (Integral, 1, 16384), "width": (Integral, 1, 16384), "num_frames": (Integral, 1, 100_000), "num_inference_steps": (Integral, 1, 1000),
    "max_sequence_length": (Integral, 1, 65536), "flow_shift": (Real, 1e-6, 1e6), "guidance_folded_in": (Real, -1e6, 1e6), "guidance_scale": (Real, 0, 1000), "boundary": (Real, 0, 1),
    "fps": (Integral, 1, 1000),
}  # fmt: skip


MOST = {"num_layers": 1000, "num_attention_heads": 1024, "attention_head_dim": 1024, "ffn_dim": 1 << 20, "in_channels": 4096, "text_dim": 1 << 16}


def numbers_of(file: Path) -> dict:
    """A network's config.json. SettingError where it cannot be read or its sizes are none: they are built from before weights are read."""
    try:
        numbers = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(f"{file}: not readable ({error}); give another model.path") from None
    if not isinstance(numbers, dict):
        raise SettingError(f"{file}: got a {type(numbers).__name__}, expected an object; give another model.path")
    for name, most in MOST.items():
        value = numbers.get(name, 1)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            raise SettingError(f"{file}: {name} is {str(value)[:60]}, accepted: 1 to {most}; give another model.path")
    return {name: value for name, value in numbers.items() if not name.startswith("_")}


def pipeline_index(folder: str | Path) -> dict:
    """model_index.json of a diffusers folder: its class and its parts; empty where there is none, e.g. of a hub id."""
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text())
    except (OSError, ValueError, RecursionError):
        index = None
    return index if isinstance(index, dict) else {}


def pipeline_class(folder: str | Path) -> str:
    """The name of the class that a diffusers folder says it is of; of one that says none the class that reads any."""
    name = pipeline_index(folder).get("_class_name")
    return name if isinstance(name, str) else "DiffusionPipeline"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def is_number(value, kind=Real, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value from JSON is a finite number of a kind in a range; true and false are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most


def check_record(record: dict, file) -> None:
    """CheckpointError, naming the entry, for what no student can have."""
    problems = [*_shape(record["transformer"]), *_tile(record["tile"]), *_cell(record.get("cell", CELL)), *_sampling(record["sampling"]), *_adapters(record.get("lora"))]
    problems += [f"{name}: got a {type(record[name]).__name__}, expected an object" for name in ("training", "policy") if not isinstance(record.get(name, {}), dict)]
    problems += [line for name in ("fingerprint", "base") for line in _fingerprint(name, record.get(name))]
    if problems:
        raise CheckpointError(f"{file}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else "") + "; use another checkpoint")
    plan_of(record, file)


def plan_of(record: dict, file) -> SparsityPlan:
    """The plan of a checked record. CheckpointError."""
    try:
        plan = SparsityPlan.from_dict(record["plan"])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{file}: no usable plan ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}); use another checkpoint") from None
    sampling = record["sampling"]
    end = 1000 * sampling.get("boundary", 1) if sampling.get("expert") == "low" else 1000
    if len(plan.edges) > MOST_BINS or abs(plan.edges[-1] - end) > 0.01 * end:
        raise CheckpointError(f"{file}: no usable plan (edges: got {len(plan.edges)} that end at {plan.edges[-1]:g}, expected at most {MOST_BINS} that end at {end:g}); use another checkpoint")
    return plan


def _shape(shape) -> list[str]:
    if not isinstance(shape, dict):
        return [f"transformer: got a {type(shape).__name__}, expected an object"]
    one = lambda value: value is None or isinstance(value, bool | str) or is_number(value, Real, 0, 1 << 24)  # noqa: E731
    fine = lambda value: one(value) or (isinstance(value, list) and len(value) <= 16 and all(map(one, value)))  # noqa: E731
    return [f"transformer.{name}: got {str(value)[:100]}" for name, value in shape.items() if not fine(value)]


def _tile(tile) -> list[str]:
    if isinstance(tile, list) and len(tile) == 3 and all(is_number(v, Integral, 1, MOST_TILE) for v in tile) and math.prod(tile) <= MOST_TILE:
        return []
    return [f"no usable tile: got {str(tile)[:100]}, expected three numbers from 1 on, of at most {MOST_TILE} tokens together"]


def _cell(cell) -> list[str]:
    if isinstance(cell, list) and len(cell) == 3 and all(is_number(v, Integral, 1, MOST_TILE) for v in cell):
        return []
    return [f"no usable cell: got {str(cell)[:100]}, expected three numbers from 1 on"]


def _sampling(sampling) -> list[str]:
    if not isinstance(sampling, dict):
        return [f"sampling: got a {type(sampling).__name__}, expected an object"]
    problems = [
        f"sampling.{name}: got {str(sampling[name])[:100]!r}, expected a number from {least:g} to {most:g}"
        for name, (kind, least, most) in RANGES.items()
        if sampling.get(name) is not None and not is_number(sampling[name], kind, least, most)
    ]
    if sampling.get("expert") not in (None, "high", "low"):
        problems.append(f"sampling.expert: got {str(sampling['expert'])[:100]!r}, expected high or low")
    steps = sampling.get("student_timesteps")
    if steps is not None and not (isinstance(steps, list) and len(steps) <= MOST_BINS and all(is_number(t, Real, 1e-3, 1000) for t in steps) and all(a > b for a, b in zip(steps, steps[1:]))):
        problems.append(f"sampling.student_timesteps: got {str(steps)[:100]}, expected descending numbers above 0, at most 1000")
    return problems


def _adapters(lora) -> list[str]:
    if lora is None:
        return []
    fine = isinstance(lora, dict) and is_number(lora.get("rank"), Integral, 1, 1 << 20) and is_number(lora.get("alpha"), Real, 1e-9, 1e9)
    fine = fine and isinstance(lora.get("targets"), list) and all(isinstance(name, str) for name in lora["targets"])
    return [] if fine else [f"lora: got {str(lora)[:100]}, expected rank, alpha and targets"]


def _fingerprint(name: str, prints) -> list[str]:
    if prints is None:
        return []
    fine = isinstance(prints, dict) and all(isinstance(v, list) and all(is_number(x) for x in v) for v in prints.values())
    return [] if fine else [f"{name}: expected lists of numbers by name"]
