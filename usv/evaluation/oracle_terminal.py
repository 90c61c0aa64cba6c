"""What a rung does at the end of a rollout, not only at its step: which steps may be sparse?

    python -m usv.damages --ckpt data/students/usv_mini --steps 16 --out data/results/terminal_wan_mini.json

Rollouts are paired: one dense, and one that is dense but for a single cell (timestep bin, layer, rung), from the same noise, with the same
sampler and the same fresh noise of every step.

    terminal  =  ‖end − end of the dense rollout‖² / ‖end of the dense rollout‖²
    local     =  Σ over the bin's steps of slope · ‖velocity − dense velocity‖² at the dense rollout's own states / Σ slope · ‖dense velocity‖²

local is what training sees; terminal is what later steps make of it, who repair or amplify. Whole rows (all layers of one bin at one rung)
are measured at every bin: the curve that answers the question. Of single cells a random subsample, where --cells asks for one; the others have
their local damage times what the measured ones of their bin have on average (ratio of sums).

Then the plans of least terminal and of least local damage, the student's own and the uniform one run at one cost from noise that none of
them was chosen on, compared by their ends' distance from the dense rollout's, paired by clip.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from usv import flow
from usv.evaluation.clips import held_out
from usv.evaluation.of_student import keep, opened, words
from usv.evaluation.report.plots import curves
from usv.files import write_text
from usv.policy import AXES
from usv.policy.damage import FIRST, STEPS, WIDTH
from usv.policy.fixed import uniform_plan
from usv.policy.knapsack import plan_of
from usv.sampling.sampler import renoise
from usv.sparse.cost import ModelShape, plan_cost, rung_costs
from usv.sparse.grid import tile_layout
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, SparsityPlan, bin_of

Row = tuple[Rung, ...] | None
Call = Callable[[torch.Tensor, float, Row], torch.Tensor]  # (x (B, …), timestep, rungs) -> velocity


def rung_of(slot: int) -> Rung:
    """The rung that a column of the damage table stands for, the other axis dense."""
    return Rung(slot, 0) if slot < AXES["density"] else Rung(0, slot - AXES["density"])


class Rollouts:
    """Rollouts of one batch of noise (B, …) that share everything but their rungs; the dense one is kept.

    timesteps: descending. few_steps: each step is re-noised (a few-step student), else Euler along the flow. shift: of the noise levels.
    """

    def __init__(self, call: Call, noise: torch.Tensor, timesteps: Sequence[float], edges: Sequence[float], few_steps: bool, shift: float):
        self.call, self.noise, self.edges, self.few_steps = call, noise, tuple(edges), few_steps
        self.timesteps = [float(t) for t in timesteps]
        self.sigmas = [t / 1000 for t in self.timesteps] + [0.0]
        self.bins = [bin_of(t, self.edges) for t in self.timesteps]
        # near pure noise the slope of a shifted schedule is large, as is the step that the sampler takes there
        self.slopes = [float(flow.slope(torch.tensor([s]), shift)) for s in self.sigmas[:-1]]
        self.states, self.velocities = [noise], []
        for index in range(len(self.timesteps)):
            velocity = call(self.states[-1], self.timesteps[index], None)
            self.velocities.append(velocity)
            self.states.append(self._advance(self.states[-1], velocity, index))
        self.unit = sum(w * v.square().mean().item() for w, v in zip(self.slopes, self.velocities))

    @property
    def end(self) -> torch.Tensor:
        return self.states[-1]

    def _advance(self, x: torch.Tensor, velocity: torch.Tensor, index: int) -> torch.Tensor:
        here, following = self.sigmas[index], self.sigmas[index + 1]
        if not self.few_steps:
            return x + (following - here) * velocity
        x0 = x - here * velocity
        return renoise(x0, self.noise, torch.full((len(x),), following), index + 1) if following else x0

    def run(self, row_of: Callable[[int], Row]) -> torch.Tensor:
        """(B,) squared distance of the end from the dense end, over the latter's square. row_of: bin -> its rungs, None dense."""
        x = None
        for index, bin in enumerate(self.bins):
            row = row_of(bin)
            if x is None and row is None:
                continue  # as the dense rollout up to here
            x = self.states[index] if x is None else x
            x = self._advance(x, self.call(x, self.timesteps[index], row), index)
        if x is None:
            return torch.zeros(len(self.noise))
        square = lambda y: y.flatten(1).square().sum(1)  # noqa: E731
        return square(x - self.end) / square(self.end)

    def local(self, bin: int, row: Row) -> float:
        """Rise of the weighted squared velocity error at the dense rollout's states."""
        total = 0.0
        for index in (i for i, b in enumerate(self.bins) if b == bin):
            velocity = self.call(self.states[index], self.timesteps[index], row)
            total += self.slopes[index] * (velocity - self.velocities[index]).square().mean().item()
        return total / self.unit

    def terminal(self, bin: int, row: Row) -> float:
        return float(self.run(lambda b: row if b == bin else None).mean())


def alone(layers: int, layer: int, rung: Rung) -> Row:
    return tuple(rung if i == layer else Rung() for i in range(layers))


def measure(rollouts: Rollouts, layers: int, cells: int | None, seed: int = 0) -> dict[str, np.ndarray]:
    """(bins, layers, WIDTH) local damages, all measured; terminal ones of `cells` random slots (None: of all), the rest rescaled; measured: which."""
    bins = len(rollouts.edges)
    slots = [(b, i, s) for b in range(bins) for i in range(layers) for s in STEPS]
    chosen = np.random.default_rng(seed).permutation(len(slots))[: len(slots) if cells is None else cells]
    local, terminal, measured = np.zeros((bins, layers, WIDTH)), np.zeros((bins, layers, WIDTH)), np.zeros((bins, layers, WIDTH), dtype=bool)
    for b, i, s in tqdm(slots, unit="cell"):
        local[b, i, s] = rollouts.local(b, alone(layers, i, rung_of(s)))
    for index in tqdm(chosen, unit="rollout"):
        b, i, s = slots[index]
        terminal[b, i, s], measured[b, i, s] = rollouts.terminal(b, alone(layers, i, rung_of(s))), True
    for b in range(bins):
        known = measured[b]
        ratio = terminal[b][known].sum() / max(local[b][known].sum(), 1e-30) if known.any() else terminal.sum() / max(local[measured].sum(), 1e-30)
        terminal[b] = np.where(known, terminal[b], ratio * local[b])
    return {"local": local, "terminal": terminal, "measured": measured}


def curve(rollouts: Rollouts, layers: int, rungs: Sequence[Rung]) -> list[dict]:
    """Whole rows: for every bin and rung what all layers at that rung do, at the step and at the end; `dense_but`: sparse everywhere but there."""
    rows = []
    for rung in rungs:
        row = (rung,) * layers
        everywhere = float(rollouts.run(lambda _, row=row: row).mean())
        for bin, edge in enumerate(rollouts.edges):
            dense_there = float(rollouts.run(lambda b, row=row, bin=bin: None if b == bin else row).mean())
            rows.append({
                "edge": round(edge, 1), "density": DENSITY_LADDER[rung.density], "merged": MERGE_LADDER[rung.merge], "local": rollouts.local(bin, row),
                "terminal": rollouts.terminal(bin, row), "everywhere": everywhere, "dense_there": dense_there,
            })  # fmt: skip
    return rows


def joint(damage: np.ndarray, merge_layers: int | None = None) -> np.ndarray:
    """(bins, layers, WIDTH) of single rungs -> (bins, layers, rungs), both axes added; never below the sparser rung before it on its ladder."""
    parts = []
    for first, length in zip(FIRST, AXES.values()):
        parts.append(np.maximum.accumulate(np.maximum(damage[..., first : first + length], 0), -1))
    both = (parts[1][..., :, None] + parts[0][..., None, :]).reshape(*damage.shape[:2], len(RUNGS))
    if merge_layers is not None:
        both[:, merge_layers:, [rung.merge > 0 for rung in RUNGS]] = np.inf
    return both


def compare(calls: Sequence[Call], noise: torch.Tensor, plan: SparsityPlan, timesteps, few_steps: bool, shift: float, costs, cost_of,
            budget: float | None = None, cells: int | None = None, merge_layers: int | None = None) -> dict:  # fmt: skip
    """The report.

    calls, noise: the network under the texts of either half of noise (2 B, …); damages are told from the first half, plans compared on
    the second. cost_of: plan -> its cost.
    """
    layers, (seen, unseen) = plan.num_layers, noise.chunk(2)
    rollouts = Rollouts(calls[0], seen, timesteps, plan.edges, few_steps, shift)
    steps = curve(rollouts, layers, [Rung(2, 0), Rung(4, 0), Rung(0, 2), Rung(4, 2)])
    damage = measure(rollouts, layers, cells)
    budget = cost_of(plan) if budget is None else budget
    plans = {"uniform": uniform_plan(plan.edges, layers, costs, budget)} | {
        name: plan_of(plan.edges, joint(damage[name], merge_layers), np.asarray(costs), budget) for name in ("local", "terminal")
    }
    if cost_of(plan) <= budget + 1e-6:
        plans["own"] = plan
    rollouts = Rollouts(calls[1], unseen, timesteps, plan.edges, few_steps, shift)
    ends = {name: rollouts.run(lambda b, p=p: p.rungs[b]) for name, p in plans.items()}
    rows = {
        name: {"end_error": float(ends[name].mean()), "cost": round(cost_of(p), 5), "plan": p.to_dict()["rungs"]} for name, p in plans.items()
    }
    known = damage["measured"] & (damage["local"] > 0) & (damage["terminal"] > 0)
    gain = np.log(damage["terminal"][known] / damage["local"][known])
    correlation = float(np.corrcoef(np.log(damage["terminal"][known]), np.log(damage["local"][known]))[0, 1]) if known.sum() > 2 else None
    return {
        "edges": list(plan.edges), "timesteps": rollouts.timesteps, "budget": budget, "steps": steps, "rows": rows,
        "terminal_against_local": paired(ends["local"], ends["terminal"]), "log_correlation": correlation,
        "log_amplification_std": float(gain.std()) if gain.size else None,
        "damage": {name: values.astype(float).round(9).tolist() for name, values in damage.items()},
    }  # fmt: skip


def paired(local: torch.Tensor, terminal: torch.Tensor, draws: int = 4000) -> dict:
    """Mean of log(local plan's end error / terminal plan's) over clips, as a ratio above 1 where terminal is better, with its 95% interval."""
    logs = (local.clamp_min(1e-12) / terminal.clamp_min(1e-12)).log().double().numpy()
    means = np.random.default_rng(0).choice(logs, (draws, len(logs))).mean(1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return {"ratio": float(np.exp(logs.mean())), "interval": [float(low), float(high)], "clips": len(logs)}


def plot(report: dict) -> str:
    """An SVG: terminal and local damage of whole rows by timestep, one rung each, both relative to their largest."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in report["steps"]:
        if row["merged"] == 0:
            for kind in ("local", "terminal"):
                series.setdefault(f"{kind}, density 1/{round(1 / row['density'])}", []).append((row["edge"], row[kind]))
    return curves(series, "Damage of a sparse timestep bin", "upper timestep of the bin", "damage", log=True)


def sampling_steps(student, steps: int | None) -> tuple[list[float], bool]:
    """Timesteps of the student's sampler, descending, and whether it is one of few steps; steps: of a solver, in its place."""
    own = student.sampling.get("student_timesteps")
    if own:
        return list(own), True
    count = steps or student.sampling["num_inference_steps"]
    u = torch.linspace(1, 0, count + 1, dtype=torch.float64)[:-1]
    return (1000 * flow.shift_sigma(u, student.sampling["flow_shift"])).tolist(), False


def main() -> None:
    parser = words(__doc__, data="shards; captions of their split val are used", out="JSON to write, and a picture of the same name in SVG")
    parser.add_argument("--steps", type=int, help="of the solver, for a student of velocity distillation; default: its own")
    parser.add_argument("--clips", type=int, default=4, help="the damages are told from, and as many the plans are compared on")
    parser.add_argument("--cells", type=int, help="terminal damages measured; default: all")
    parser.add_argument("--budget", type=float, help="of the plans compared; default: the student's own")
    parser.add_argument("--merge-layers", type=int, help="so many first layers may merge")
    args = parser.parse_args()
    try:
        pipe, student = opened(args)
        (batch,), _ = held_out(args.data, 2 * args.clips, args.model, f"--clips: got {args.clips}, accepted: at most half of")
        noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
        calls = [lambda x, t, row, text=text: student.model(x, torch.full((len(x),), t), text, row)[0] for text in batch["text"].chunk(2)]
        shape, layout = ModelShape.of(student.model.config, student.sampling["max_sequence_length"]), tile_layout(student.model.grid_of(noise.shape), student.model.tile)
        timesteps, few = sampling_steps(student, args.steps)
        with torch.no_grad():
            report = compare(
                calls, noise, student.plan, timesteps, few, student.sampling.get("flow_shift", 1.0), rung_costs(shape, layout),
                lambda p: plan_cost(p, shape, layout), args.budget, args.cells, args.merge_layers,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(table(report))
    keep(args.out, "damages", report)
    if args.out is not None:
        write_text(args.out.with_suffix(".svg"), plot(report))


def table(report: dict) -> str:
    lines = [f"{'sparse in one bin':>20}{'local':>12}{'terminal':>12}{'dense only there':>18}   (at that rung everywhere)"]
    for row in report["steps"]:
        lines.append(
            f"≤ {row['edge']:5.0f}  1/{round(1 / row['density'])} {row['merged']:.0%}".rjust(20)
            + f"{row['local']:12.5f}{row['terminal']:12.5f}{row['dense_there']:18.5f}   {row['everywhere']:.5f}"
        )
    lines += [f"{name:10} end error {row['end_error']:.5f} at cost {row['cost']:.4f}" for name, row in report["rows"].items()]
    p = report["terminal_against_local"]
    lines.append(f"local plan's end error / terminal plan's: {p['ratio']:.3f} [{p['interval'][0]:.3f}, {p['interval'][1]:.3f}] over {p['clips']} clips")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
