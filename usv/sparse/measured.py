"""What a forward costs in seconds on one machine, measured by `python -m usv.bench costs`, as plans and policies read it.

    seconds of a row  =  dense  +  Σ over layers of extra[rung]  +  Σ over runs of merging layers of switch[merged fraction]

dense: of a whole forward. extra: of a layer at this rung over a dense one, so pooling, selection and the gate are in it. switch: of
matching, merging and unmerging once; consecutive layers of one merged fraction share it. Everything of a file was measured in turn in
one process on one device, for one model, size, batch and dtype; another of any of these is refused, since ratios do not carry over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from usv.cpu import processor
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, SparsityPlan

FORMAT = "usv-costs-1"


class CostsError(ValueError):
    """A file of costs that cannot be used; the message says why and what to do."""


def device_name() -> str:
    """The device that a forward runs on here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class MeasuredCosts:
    """dense: seconds of a forward of `num_layers` layers. extra: (RUNGS) seconds. switch: (MERGE_LADDER) seconds; 0 at no merging."""

    dense: float
    extra: tuple[float, ...]
    switch: tuple[float, ...]
    num_layers: int
    record: Mapping

    def rung_costs(self) -> list[float]:
        """Cost of each of `plan.RUNGS`, a layer's share of the dense forward being 1; every third merging layer pays for a switch."""
        share = self.dense / self.num_layers
        return [1 + (extra + self.switch[rung.merge] / 3) / share for rung, extra in zip(RUNGS, self.extra)]

    def row_seconds(self, row: Sequence[Rung]) -> float:
        """Of one forward under a row of rungs."""
        total, before = self.dense, 0
        for rung in row:
            total += self.extra[RUNGS.index(rung)]
            if rung.merge and rung.merge != before:
                total += self.switch[rung.merge]
            before = rung.merge
        return total

    def plan_cost(self, plan: SparsityPlan) -> float:
        """Mean seconds of the rows that run, as a fraction of the dense forward's."""
        rows = plan.running()
        return sum(map(self.row_seconds, rows)) / len(rows) / self.dense


def read_costs(path: str | Path, wanted: Mapping | None = None) -> MeasuredCosts:
    """A file of `usv.bench costs`.

    wanted: entries of its "what" that must be the same, e.g. {"device": device_name(), "num_layers": 8}.

    Raises CostsError: no such file, not of this format, a rung missing or no number, or measured for something else.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise CostsError(f"costs: got {path} ({error.strerror or error}), accepted: a file written by python -m usv.bench costs") from None
    except ValueError as error:
        raise CostsError(f"costs: {path} is not JSON ({error}); write it with python -m usv.bench costs") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CostsError(f"costs: {path} is not of the format {FORMAT!r}; write it with python -m usv.bench costs")
    what = record.get("what", {})
    if not isinstance(what, dict):
        raise CostsError(f"costs: {path} does not say what was measured; measure again with python -m usv.bench costs")
    for name, value in (wanted or {}).items():
        if what.get(name) != value:
            raise CostsError(f"costs: {path} was measured for {name} = {what.get(name)!r}, here it is {value!r}; measure again with python -m usv.bench costs")
    return costs_of(record, path)


def costs_of(record: Mapping, path: str | Path = "the record") -> MeasuredCosts:
    """The costs of a record of `usv.bench costs`. CostsError, naming `path`, where a rung is missing or no number."""
    try:
        found = {(row["density"], row["merged"]): float(row["extra_seconds"]) for row in record["rungs"]}
        switch = tuple(float(record["switch_seconds"].get(str(fraction), 0.0 if fraction == 0 else math.nan)) for fraction in MERGE_LADDER)
        dense, layers = float(record["dense_seconds"]), int(record["what"]["num_layers"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CostsError(f"costs: {path} lacks or garbles {error}; measure again with python -m usv.bench costs") from None
    keys = [(DENSITY_LADDER[rung.density], MERGE_LADDER[rung.merge]) for rung in RUNGS]
    for key in keys:
        if not math.isfinite(found.get(key, math.nan)):
            raise CostsError(f"costs: {path} has no seconds of density {key[0]:g} with {key[1]:.0%} merged; measure again with python -m usv.bench costs")
    if not (math.isfinite(dense) and dense > 0 and all(map(math.isfinite, switch))):
        raise CostsError(f"costs: {path} has no seconds of the dense forward, or of merging; measure again with python -m usv.bench costs")
    return MeasuredCosts(dense, tuple(found[key] for key in keys), switch, layers, record)
