"""`costs`: seconds of every rung on this device, as `policy.cost=FILE`, `usv.enable(…, speedup=, costs=FILE)` and `usv.sparse.measured` read them.

Whole forwards are timed, all layers at one rung, all rungs in turn in every round: what pooling, selection, gates and memory cost beside
their neighbours is in it. Matching, merging and unmerging happen once in a run of merging layers; rows in which every other layer merges
tell them apart. The least of all rounds counts: whoever else computes on the machine can only add.

    extra[rung] = (T(all layers) − switch − T(dense)) / layers,   switch from rows in which every other layer merges
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from usv.config import SettingError
from usv.evaluation.bench.measure import environment, quantiles, timed
from usv.evaluation.bench.sides import TIMESTEP, Inputs, Side
from usv.models.forward import SparseTransformer
from usv.sampling.budget import shape_of
from usv.sampling.generate import now
from usv.sparse.measured import FORMAT, costs_of, device_name
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung

SWITCH_AT = 2  # rung of the density ladder at which switching is measured
CLOCKS = {"wall": now, "cpu": time.process_time}


def clock_of(name: str) -> Callable[[], float]:
    """Seconds of the wall, or of this process's work, which others on the machine do not lengthen. SettingError."""
    if name == "cpu" and (torch.cuda.is_available() or torch.get_num_threads() > 1):
        raise SettingError(f"--clock: got cpu on {device_name()}, accepted: wall; cpu with --threads 1 where there is no GPU")
    return CLOCKS[name]


def rows_of(layers: int) -> dict[tuple, tuple[Rung, ...]]:
    """What is timed: ("all", rung) and ("other", merge) -> the rungs of every layer."""
    rows = {("all", rung): (rung,) * layers for rung in RUNGS}
    for merge in range(1, len(MERGE_LADDER)):
        merging = Rung(SWITCH_AT, merge)
        rows["other", merge] = tuple(merging if i % 2 == 0 else Rung() for i in range(layers))
    return rows


def bench(model: SparseTransformer, inputs: Inputs, size: Sequence[int], seconds: float = 90.0, most: int = 30, clock: str = "wall", plans: int = 0) -> dict:
    """The file's record: rounds of all rows until `seconds` are over, `most` at most, after one that is not counted.

    size: (height, width, num_frames) of the videos. clock: of `CLOCKS`, what is measured; `seconds` are always those of the wall. plans: so
    many random ones run in the same rounds, against which the record is held (`checked`).
    """
    watch = clock_of(clock)
    layers, begun = model.num_layers, time.perf_counter()
    rows, drawn = rows_of(layers), random_rows(layers, plans)
    rows |= {("plan", number): row for number, row in enumerate(drawn)}
    sides = {key: Side(str(key), model, (TIMESTEP,), (row,)) for key, row in rows.items()}
    samples: dict[tuple, list[float]] = {key: [] for key in rows}
    lasted, rounds = 0.0, 0
    while rounds <= most and (rounds < 2 or time.perf_counter() - begun + lasted < seconds):
        start = time.perf_counter()
        for key, side in sides.items():
            taken = timed(lambda side=side: inputs.run(side), watch)
            if rounds:
                samples[key].append(taken)
        lasted, rounds = time.perf_counter() - start, rounds + 1
    least = {key: min(values) for key, values in samples.items()}
    extra, switch = solve(least, layers)
    what = {
        "device": device_name(), "dtype": str(inputs.latents.dtype).removeprefix("torch."), "num_layers": layers, "transformer": shape_of(model),
        "tile": [model.tile.t, model.tile.h, model.tile.w], "cell": list(model.tile.cell), "height": size[0], "width": size[1], "num_frames": size[2],
        "batch_size": len(inputs.latents), "text_length": inputs.text.shape[1],
    }  # fmt: skip
    record = {
        "format": FORMAT, "what": what, "clock": clock, "rounds": rounds - 1, "measured_in_seconds": round(time.perf_counter() - begun, 1),
        "dense_seconds": min(samples["all", Rung()]), "dense_quantiles": quantiles(samples["all", Rung()]),
        "rungs": [
            {
                "density": DENSITY_LADDER[r.density], "merged": MERGE_LADDER[r.merge], "extra_seconds": extra[r],
                "forward_seconds": min(samples["all", r]), "quantiles": quantiles(samples["all", r]),
            }
            for r in RUNGS
        ],
        "switch_seconds": {str(MERGE_LADDER[merge]): value for merge, value in switch.items()},
        "environment": environment(),
    }  # fmt: skip
    if plans:
        record["check"] = checked(record, drawn, [least["plan", number] for number in range(plans)])
    return record


def solve(least: dict[tuple, float], layers: int) -> tuple[dict[Rung, float], dict[int, float]]:
    """Seconds that a layer at each rung takes over a dense one, and of one switch at each merge rung, from seconds of `rows_of`."""
    dense, switch = least["all", Rung()], {}
    runs = (layers + 1) // 2  # rows of every other layer have so many of one layer each
    for merge in range(1, len(MERGE_LADDER)):
        everywhere, other = least["all", Rung(SWITCH_AT, merge)] - dense, least["other", merge] - dense
        # everywhere = layers · extra + switch, other = runs · (extra + switch)
        switch[merge] = max(0.0, (layers * other / runs - everywhere) / (layers - 1)) if layers > 1 else 0.0
    extra = {rung: (least["all", rung] - switch.get(rung.merge, 0.0) - dense) / layers for rung in RUNGS}
    extra[Rung()] = 0.0
    return extra, switch


def random_rows(layers: int, count: int, seed: int = 0) -> list[tuple[Rung, ...]]:
    """Rows of rungs drawn evenly, layer by layer: more switches than any plan that is learned."""
    draw = random.Random(seed)
    return [tuple(draw.choice(RUNGS) for _ in range(layers)) for _ in range(count)]


def checked(record: dict, rows: Sequence[Sequence[Rung]], least: Sequence[float]) -> dict:
    """Predicted against measured seconds of rows, as shares of the dense forward's.

    least: seconds of each row, of the same rounds as the record's. Returns {"rows": [{"predicted", "measured", "error"}], "worst", "median"},
    errors relative to what was measured.
    """
    costs, found = costs_of(record), []
    for row, seconds in zip(rows, least, strict=True):
        predicted, share = costs.row_seconds(row) / costs.dense, seconds / costs.dense
        found.append({"predicted": predicted, "measured": share, "error": predicted / share - 1})
    errors = [abs(one["error"]) for one in found]
    return {"rows": found, "worst": max(errors), "median": statistics.median(errors)}


def table(report: dict) -> str:
    """Ratios of whole forwards to the dense one."""
    dense, what = report["dense_seconds"], report["what"]
    lines = [
        f"{what['device']}, {what['dtype']}: dense forward {dense:.4f} s, {report['rounds']} rounds in {report['measured_in_seconds']:.0f} s",
        f"{'share of dense seconds':26}" + "".join(f"{f'1/{round(1 / d)}' if d < 1 else '1':>8}" for d in DENSITY_LADDER) + f"{'switch':>10}",
    ]
    for merged in MERGE_LADDER:
        found = [row["forward_seconds"] / dense for row in report["rungs"] if row["merged"] == merged]
        switch = report["switch_seconds"].get(str(merged))
        lines.append(f"{f'{merged:.0%} merged':26}" + "".join(f"{share:8.3f}" for share in found) + ("" if switch is None else f"{switch / dense:10.4f}"))
    if held := report.get("check"):
        lines.append(f"{len(held['rows'])} random plans: predicted seconds are off by {held['median']:.1%} (median), {held['worst']:.1%} (worst)")
    return "\n".join(lines)
