"""`forward`: one forward of the transformer, dense against students and uniform plans, by bin of timesteps."""

from __future__ import annotations

from collections.abc import Sequence

from usv.bench.measure import clocked, environment, interleaved, now, overhead, quantiles
from usv.bench.sides import Inputs, Side, executed


def measure(sides: Sequence[Side], inputs: Inputs, repeats: int, warmup: int = 2) -> dict:
    """One row a side: seconds per forward (quantiles; mean over bins, which are equally likely), by bin, and parts."""
    functions = {
        (side.name, bin): (lambda side=side, bin=bin: inputs.run(side, bin))
        for side in sides
        for bin in range(len(side.rows))
    }
    samples = interleaved(functions, repeats, warmup)
    rows = {}
    for side in sides:
        bins = [samples[side.name, bin] for bin in range(len(side.rows))]
        rows[side.name] = {
            "batch_size": len(inputs.latents),
            "seconds": quantiles([sum(column) / len(column) for column in zip(*bins)]),
            "by_timestep": [{"timestep": t, **quantiles(values)} for t, values in zip(side.timesteps(), bins)],
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
            for bin in range(len(side.rows)):
                inputs.run(side, bin)
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
    return "\n".join(lines)
