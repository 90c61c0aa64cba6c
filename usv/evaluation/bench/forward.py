"""`forward`: one forward of the transformer, dense against students and uniform plans, by timestep."""

from __future__ import annotations

from collections.abc import Sequence

from usv.evaluation.bench.measure import clocked, environment, interleaved, now, overhead, quantiles
from usv.evaluation.bench.sides import Inputs, Side, executed


def measure(sides: Sequence[Side], inputs: Inputs, repeats: int, warmup: int = 2) -> dict:
    """One row a side: seconds per forward (quantiles of the mean over timesteps), by timestep, and shares of the parts."""
    functions = {
        (side.name, index): (lambda side=side, index=index: inputs.run(side, index))
        for side in sides
        for index in range(len(side.rows))
    }
    samples = interleaved(functions, repeats, warmup)
    rows = {}
    for side in sides:
        columns = [samples[side.name, index] for index in range(len(side.rows))]
        rows[side.name] = {
            "batch_size": len(inputs.latents),
            "seconds": quantiles([sum(column) / len(column) for column in zip(*columns)]),
            "by_timestep": [{"timestep": t, **quantiles(values)} for t, values in zip(side.timesteps, columns)],
            **executed(side, inputs),
            **shares(side, inputs, max(1, repeats // 3)),
        }
    dense = rows[sides[0].name]["seconds"]["p50"]
    for row in rows.values():
        row["speedup"] = dense / row["seconds"]["p50"]
    return rows


def shares(side: Side, inputs: Inputs, repeats: int) -> dict:
    """Where a forward's time goes: share of every part, and of policy + selection + merging together."""
    with clocked(side.model) as clock:
        begun = now()
        for _ in range(repeats):
            for index in range(len(side.rows)):
                inputs.run(side, index)
        whole = now() - begun
    parts = {name: seconds / whole for name, seconds in sorted(clock.seconds.items())}
    return {"overhead": overhead(clock.seconds, whole), "shares": parts}


def bench(sides: Sequence[Side], inputs: Inputs, repeats: int) -> dict:
    return {"environment": environment(), "sides": measure(sides, inputs, repeats)}


def table(report: dict) -> str:
    lines = [
        f"{'':28}{'s/forward':>11}{'p10':>9}{'p90':>9}{'speed-up':>10}{'density':>9}{'merged':>8}{'FLOPs':>8}{'overhead':>10}"
    ]
    for name, r in report["sides"].items():
        s = r["seconds"]
        lines.append(
            f"{name:28}{s['p50']:11.4f}{s['p10']:9.4f}{s['p90']:9.4f}{r['speedup']:9.2f}×{r['density']:9.3f}{r['merged']:8.0%}"
            f"{r['flops_ratio']:7.2f}×{r['overhead']:10.1%}"
        )
        if len(r["by_timestep"]) > 1:
            rows = [(f"  at {t['timestep']:.0f}", t) for t in r["by_timestep"]]
            lines += [f"{what:28}{t['p50']:11.4f}{t['p10']:9.4f}{t['p90']:9.4f}" for what, t in rows]
    return "\n".join(lines)
