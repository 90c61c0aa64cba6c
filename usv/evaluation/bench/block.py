"""`wan-1.3b`: Wan2.1-T2V-1.3B at its own shape, dense against plans; one full-width block on a CPU, all 30 layers on a GPU.

Weights are random: only times are looked at. Both sides run `usv.models.forward`, dense through diffusers' own block.

    ideal = Σ over attention, projections, cross-attention, FFN of  seconds of the part in the dense run / FLOPs ratio of the part
    fraction of ideal = ideal / seconds of the sparse block

so that a slow dense attention flatters nobody. The tile divides the grid without rest (3×5×4 = 60 tokens at 21×30×52): no
partial tiles to pad, and 30% or 50% of a tile are whole tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel

from usv.cpu import fast_dtype
from usv.evaluation.bench.measure import clocked, environment, overhead, quantiles
from usv.evaluation.bench.sides import TIMESTEP, Inputs, Side, layout_of, uniform_sides
from usv.models.forward import SparseTransformer
from usv.sparse.cost import ModelShape, block_flops, rung_flops
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, layer_plan, merged_tokens

GRID = (21, 30, 52)  # 81 frames of 480×832 after the codec and 1×2×2 patches
PLANS = ("0.20", "0.05", "0.05+0.30", "0.05+0.50")
LAYERS, TEXT_LENGTH = 30, 512
COMPONENTS = ("attention", "projections", "cross_attention", "ffn")
DENSE_FORWARDS, SPARSE_FORWARDS = 100, 3  # 50 steps with guidance; three steps with guidance folded in


def bench(grid: Sequence[int], plans: Sequence[str], minutes: float, repeats: int, layers: int | None) -> dict:
    """At most `repeats` rounds of dense and every plan; no round is begun that would end after `minutes`."""
    started = time.monotonic()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", fast_dtype())
    report = {"environment": environment(), "dtype": str(dtype).removeprefix("torch."), "grid": list(grid)}
    model = random_model(layers or (LAYERS if cuda else 1), exact_tile(grid), device, dtype)
    sides, inputs = make_sides(model, grid, plans)
    warm_up(model, grid, plans, inputs)
    runs: dict[str, list[dict]] = {side.name: [] for side in sides}
    last = 0.0
    for repeat in range(repeats):
        begun = time.monotonic()
        if repeat and begun - started + 1.03 * last > 60 * minutes:
            break
        for side in sides:
            runs[side.name].append(once(side, inputs))
        last = time.monotonic() - begun
    rows = {side.name: row(side, inputs, runs[side.name]) for side in sides}
    compare(rows, sides, inputs)
    tile, shape = model.tile, ModelShape.of(model.config, TEXT_LENGTH)
    report |= {
        "layers": model.num_layers,
        "tokens": layout_of(model, inputs).grid.num_tokens,
        "tile": [tile.t, tile.h, tile.w],
    }
    report |= {"shape": vars(shape), "seconds_in_all": time.monotonic() - started, "sides": rows}
    return report


def random_model(layers: int, tile: Tile, device: str, dtype: torch.dtype) -> SparseTransformer:
    """Wan2.1-T2V-1.3B's transformer with `layers` layers, weights as torch draws them."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=8960, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6,
            rope_max_seq_len=1024,
        )  # fmt: skip
        model = SparseTransformer(transformer, tile)
    return model.to(dtype).eval().requires_grad_(False)


def exact_tile(grid: Sequence[int], least: int = 48, most: int = 64) -> Tile:
    """The most cube-like tile of `least` to `most` tokens that divides the grid without rest, of equals the larger.

    ValueError where there is none.
    """
    divisors = [[d for d in range(1, min(side, most) + 1) if side % d == 0] for side in grid]
    tiles = [(t, h, w) for t in divisors[0] for h in divisors[1] for w in divisors[2] if least <= t * h * w <= most]
    if not tiles:
        raise ValueError(
            f"grid: got {tuple(grid)}, which no tile of {least} to {most} tokens divides; accepted: e.g. {GRID} or (6, 10, 8)"
        )
    return Tile(*min(tiles, key=lambda tile: (max(tile) / min(tile), -tile[0] * tile[1] * tile[2])))


def make_sides(model: SparseTransformer, grid: Sequence[int], plans: Sequence[str]) -> tuple[list[Side], Inputs]:
    """Dense and the plans, "density" or "density+merged", on latents of the grid."""
    t, h, w = grid
    inputs = Inputs.random((16, t, 2 * h, 2 * w), 1, TEXT_LENGTH, 4096, next(model.parameters()))
    sides = [Side("dense", model, (TIMESTEP,), (None,))]
    for plan in plans:
        try:
            density, merged = (float(part) for part in (plan.split("+") if "+" in plan else (plan, "0")))
        except ValueError:
            raise ValueError(
                f"plan: got {plan!r}, accepted: density or density+merged, e.g. 0.05 or 0.05+0.30"
            ) from None
        sides += uniform_sides(model, layout_of(model, inputs), (density,), (merged,))
    return sides, inputs


def warm_up(model: SparseTransformer, grid: Sequence[int], plans: Sequence[str], inputs: Inputs) -> None:
    """Every side on one layer of tiles, and on a CPU the memory of the FFN, which is kept once its pages were touched."""
    if inputs.latents.device.type == "cpu":
        torch.ones(3, grid[0] * grid[1] * grid[2], model.config.ffn_dim, dtype=inputs.latents.dtype)
    sides, small = make_sides(model, (model.tile.t, *grid[1:]), plans)
    for side in sides:
        small.run(side)


def once(side: Side, inputs: Inputs) -> dict:
    """Seconds of all blocks and of their parts in one forward; the executed density."""
    with clocked(side.model) as clock:
        stats = inputs.run(side)
    density = sum(float(s.density) for s in stats.values()) / len(stats) if stats else 1.0
    return {"seconds": dict(clock.seconds), "density": density}


def row(side: Side, inputs: Inputs, runs: list[dict]) -> dict:
    """Quantiles of the blocks' time, medians of the parts, executed density and merging, FLOPs."""
    layout = layout_of(side.model, inputs)
    rung = Rung() if side.rows[0] is None else side.rows[0][0]
    names = sorted({name for run in runs for name in run["seconds"]} - {"block"})
    blocks = [run["seconds"]["block"] for run in runs]
    parts = {name: quantiles([run["seconds"].get(name, 0.0) for run in runs])["p50"] for name in names}
    return {
        "block_seconds": quantiles(blocks),
        "samples": blocks,
        "parts_seconds": {**parts, "rest": quantiles(blocks)["p50"] - sum(parts.values())},
        "density": runs[0]["density"],
        "merged": sum(merged_tokens(layer_plan(rung, layout.num_blocks), layout)) / layout.grid.num_tokens,
        "flops": rung_flops(ModelShape.of(side.model.config, TEXT_LENGTH), layout, rung) * side.model.num_layers,
        "overhead": quantiles([overhead(run["seconds"], run["seconds"]["block"]) for run in runs])["p50"],
    }


def compare(rows: dict[str, dict], sides: Sequence[Side], inputs: Inputs) -> None:
    """Adds to every plan its ratios to dense, the ideal, and what they imply for denoising."""
    dense = rows["dense"]
    model = sides[0].model
    shape, tokens = ModelShape.of(model.config, TEXT_LENGTH), layout_of(model, inputs).grid.num_tokens
    full = block_flops(shape, tokens)
    for name, r in rows.items():
        left = block_flops(shape, tokens * (1 - r["merged"]), r["density"])
        r["component_flops_ratio"] = {part: full[part] / left[part] for part in COMPONENTS}
        r["flops_ratio"] = sum(full.values()) / sum(left.values())
        r["speedup"] = dense["block_seconds"]["p50"] / r["block_seconds"]["p50"]
        r["ideal_seconds"] = sum(dense["parts_seconds"][part] / r["component_flops_ratio"][part] for part in COMPONENTS)
        r["fraction_of_ideal"] = r["ideal_seconds"] / r["block_seconds"]["p50"]
        if name != "dense":
            r["implied_denoising_speedup"] = r["speedup"] * DENSE_FORWARDS / SPARSE_FORWARDS


def table(report: dict) -> str:
    """The comparison, then the seconds of every part."""
    what = f"{report['layers']} block{'s' * (report['layers'] > 1)} of Wan2.1-T2V-1.3B, {report['tokens']} tokens, {report['dtype']}"
    lines = [
        f"{what}, tile {'×'.join(map(str, report['tile']))}, {report['environment']['device']}, {report['environment']['threads']} threads",
        f"{'':26}{'seconds':>9}{'speed-up':>10}{'FLOPs':>8}{'of ideal':>10}{'overhead':>10}{'density':>9}{'merged':>8}"
        f"   denoising, {DENSE_FORWARDS} forwards -> {SPARSE_FORWARDS}",
    ]
    for name, r in report["sides"].items():
        implied = f"{r['implied_denoising_speedup']:.0f}×" if "implied_denoising_speedup" in r else ""
        lines.append(
            f"{name:26}{r['block_seconds']['p50']:9.3f}{r['speedup']:9.2f}×{r['flops_ratio']:7.2f}×{r['fraction_of_ideal']:10.0%}"
            f"{r['overhead']:10.1%}{r['density']:9.4f}{r['merged']:8.1%}   {implied:>12}"
        )
    parts = sorted({part for r in report["sides"].values() for part in r["parts_seconds"]})
    lines += ["", f"{'seconds in':26}" + "".join(f"{part:>17}" for part in parts)]
    for name, r in report["sides"].items():
        lines.append(f"{name:26}" + "".join(f"{r['parts_seconds'].get(part, 0.0):17.3f}" for part in parts))
    return "\n".join(lines)
