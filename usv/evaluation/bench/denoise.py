"""`denoise`: whole denoising runs, the dense teacher with guidance against students, each with its own steps."""

from __future__ import annotations

from contextlib import contextmanager

from usv.config import ModelConfig
from usv.evaluation.bench.measure import clocked, environment, now, overhead, quantiles
from usv.sampling.checkpoint import Student, load_student
from usv.sampling.enable import disable, enable
from usv.sampling.generate import generate, latent_size
from usv.sparse.cost import ModelShape, dense_flops, rung_flops
from usv.sparse.grid import tile_layout
from usv.sparse.plan import Rung, layer_plan, merged_tokens

PROMPT = "a red ball, the camera pans left"  # what is denoised does not change how long it takes


def bench(pipe, model: ModelConfig, checkpoints: dict[str, str], batch_size: int, repeats: int) -> dict:
    """One row a method: seconds of denoising and of everything, forwards, seconds per forward, what was executed, overhead."""
    students = {"dense": None, **{name: load_student(path, pipe.transformer) for name, path in checkpoints.items()}}
    report = {"environment": environment(), "batch_size": batch_size, "prompt": PROMPT}
    runs: dict[str, list[dict]] = {name: [] for name in students}
    for student in students.values():
        once(pipe, model, student, batch_size, warmup=True)
    for _ in range(repeats):
        for name, student in students.items():
            runs[name].append(once(pipe, model, student, batch_size))
    rows = {name: row(runs[name]) for name in students}
    for name, student in students.items():
        if student is None:
            rows[name] |= {"steps": model.num_inference_steps, "overhead": 0.0, "shares": {}}
        else:
            rows[name] |= {"steps": student.sampling["num_inference_steps"], **shares(pipe, model, student, batch_size)}
    compare(rows)
    return {**report, "methods": rows, "interaction": interaction(rows)}


def once(pipe, model: ModelConfig, student: Student | None, batch_size: int, warmup: bool = False) -> dict:
    """One run; the dense teacher warms up on two steps."""
    steps = 2 if warmup else model.num_inference_steps
    if student is not None:
        enable(pipe, student)
        steps = student.sampling["num_inference_steps"]
    try:
        with watched(pipe, model, student) as seen:
            result = generate(pipe, model, [PROMPT] * batch_size, list(range(batch_size)), batch_size, steps)
    finally:
        if student is not None:
            disable(pipe)
    return {"denoise": result.seconds["denoise"], "total": sum(result.seconds.values()), **seen}


@contextmanager
def watched(pipe, model: ModelConfig, student: Student | None):
    """Counts and times the forwards of the pipeline's transformer, and adds up what the sparse layers executed."""
    seen = {"forwards": 0, "transformer": 0.0, "densities": [], "merged": [], "flops": 0.0}
    transformer = pipe.transformer
    config = transformer.config
    shape = ModelShape.of(config, model.max_sequence_length)
    patches = [side // patch for side, patch in zip(latent_size(pipe, model), config.patch_size)]
    tokens = patches[0] * patches[1] * patches[2]

    def before(module, args):
        seen["begun"] = now()

    def after(module, args, kwargs, output):
        seen["transformer"] += now() - seen.pop("begun")
        seen["forwards"] += 1
        if student is not None:
            executed(kwargs.get("hidden_states", args[0] if args else None), kwargs.get("timestep", args[1] if len(args) > 1 else None))

    def executed(latents, timestep):
        network = student.model
        layout = tile_layout(network.grid_of(latents.shape), network.tile, str(latents.device))
        rungs = student.plan.at(float(timestep.max())) or (Rung(),) * network.num_layers
        seen["densities"] += list(pipe._usv.record.densities)[-network.num_layers :]  # those of this forward, as they were executed
        for rung in rungs:
            seen["merged"].append(sum(merged_tokens(layer_plan(rung, layout.num_blocks), layout)) / tokens)
            seen["flops"] += rung_flops(shape, layout, rung)

    hooks = [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after, with_kwargs=True)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    if student is None:
        seen["flops"] = seen["forwards"] * dense_flops(shape, tokens)


def row(runs: list[dict]) -> dict:
    """The repetitions of one method. Times are of a whole batch, forwards and FLOPs of one run of it."""
    first = runs[0]
    return {
        "denoise_seconds": quantiles([run["denoise"] for run in runs]),
        "end_to_end_seconds": quantiles([run["total"] for run in runs]),
        "seconds_per_forward": quantiles([run["transformer"] / run["forwards"] for run in runs]),
        "forwards": first["forwards"],
        "density": _mean(first["densities"], 1.0),
        "merged": _mean(first["merged"], 0.0),
        "flops": first["flops"],
    }


def shares(pipe, model: ModelConfig, student: Student, batch_size: int) -> dict:
    """Where the transformer's time goes in one run of a student."""
    with clocked(student.model) as clock:
        run = once(pipe, model, student, batch_size)
    whole = run["transformer"]
    parts = {name: seconds / whole for name, seconds in sorted(clock.seconds.items())}
    return {"overhead": overhead(clock.seconds, whole), "shares": parts}


def compare(rows: dict[str, dict]) -> None:
    """Adds speed-ups, FLOPs ratios and the row's place in the ablation, all against "dense"."""
    dense = rows["dense"]
    for r in rows.values():
        r["denoise_speedup"] = dense["denoise_seconds"]["p50"] / r["denoise_seconds"]["p50"]
        r["end_to_end_speedup"] = dense["end_to_end_seconds"]["p50"] / r["end_to_end_seconds"]["p50"]
        r["forward_speedup"] = dense["seconds_per_forward"]["p50"] / r["seconds_per_forward"]["p50"]
        r["flops_ratio"] = dense["flops"] / r["flops"]
        r["flops_ratio_per_forward"] = r["flops_ratio"] * r["forwards"] / dense["forwards"]
        axes = {"attention": r["density"] < 1, "merge": r["merged"] > 0, "steps": r["steps"] < dense["steps"]}
        used = [axis for axis, present in axes.items() if present]
        r["axes"] = ("dense", f"{used[0]} only" if used else "", " + ".join(used), "all three")[len(used)]


def interaction(rows: dict[str, dict]) -> dict | None:
    """All three axes against the product of what each is worth alone, where the rows are there.

    What attention and merging are worth alone is the speed-up of one forward over the row with fewer steps and nothing else: so
    guidance folded in counts once, and all four rows run the same timesteps.
    """
    found = {r["axes"]: r for r in rows.values()}
    if any(axes not in found for axes in ("all three", "steps only", "attention + steps", "merge + steps")):
        return None
    steps, whole = found["steps only"], found["all three"]["denoise_speedup"]
    attention, merge = (found[f"{axis} + steps"]["forward_speedup"] / steps["forward_speedup"] for axis in ("attention", "merge"))
    product = steps["denoise_speedup"] * attention * merge
    return {"all_three": whole, "steps": steps["denoise_speedup"], "attention": attention, "merge": merge, "product": product, "ratio": whole / product}


def said(together: dict) -> str:
    """The interaction in a line."""
    return (
        "all three {all_three:.1f}×; fewer steps {steps:.1f}× times attention {attention:.2f}× times merging {merge:.2f}× is {product:.1f}×, "
        "of which it is {ratio:.2f}"
    ).format(**together)


def table(report: dict) -> str:
    """The ablation table, and the interaction if it can be told."""
    lines = [
        f"{'':24}{'axes':>18}{'denoise s':>11}{'×':>9}{'end to end ×':>14}{'forwards':>10}{'s/forward':>11}{'density':>9}"
        f"{'merged':>8}{'FLOPs ×':>10}{'overhead':>10}"
    ]
    for name, r in report["methods"].items():
        lines.append(
            f"{name:24}{r['axes']:>18}{r['denoise_seconds']['p50']:11.3f}{r['denoise_speedup']:8.2f}×"
            f"{r['end_to_end_speedup']:13.2f}×{r['forwards']:10}{r['seconds_per_forward']['p50']:11.4f}{r['density']:9.3f}"
            f"{r['merged']:8.0%}{r['flops_ratio']:9.1f}×{r['overhead']:10.1%}"
        )
    if report["interaction"]:
        lines.append(said(report["interaction"]))
    return "\n".join(lines)


def markdown(report: dict, quality: dict) -> str:
    """The table as the README shows it, times of a clip; quality: rows of `usv.evaluate` by the same names, where there are any."""
    lines = ["| row | axes | forwards | s/forward | density | merged | denoising s | denoising × | subject | motion | Fréchet |", "|---" * 11 + "|"]
    batch, qualities = report["batch_size"], (("subject_accuracy", 3), ("motion_accuracy", 3), ("frechet_distance", 0))
    for name, r in report["methods"].items():
        good = quality.get(name, {})
        values = [f"{good[key]:.{digits}f}" if good.get(key) is not None else "–" for key, digits in qualities]
        lines.append(
            f"| {name} | {r['axes']} | {r['forwards']} | {r['seconds_per_forward']['p50'] / batch:.4f} | {r['density']:.3f} | {r['merged']:.0%} "
            f"| {r['denoise_seconds']['p50'] / batch:.3f} | {r['denoise_speedup']:.1f} | {' | '.join(values)} |"
        )
    return "\n".join(lines)


def _mean(values: list[float], empty: float) -> float:
    return sum(values) / len(values) if values else empty
