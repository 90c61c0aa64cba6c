"""How far is a student's plan from the best one? An oracle measures what every rung of every layer does, one at a time.

    python -m usv.oracle --ckpt data/students/usv_mini --out data/results/oracle_wan_mini.json

For each timestep bin and layer, each rung is executed with all other layers dense; its damage is the rise of the velocity error
(‖student − teacher‖² / ‖teacher‖², weighted by how far the sampler goes there, as in the loss). The multi-choice knapsack over
these damages gives the oracle's plan at the cost of the student's own. Both plans and the uniform one of that cost then run on clips
the oracle has not seen: gain = (uniform − learned) / (uniform − oracle). Damages do not add up exactly, so a gain above 1 can be.

On the student's weights the learned plan has an advantage, it was trained under it; on the teacher's (--weights teacher) nobody has.
There the teacher's own velocity is wanted, without guidance, so that every error is a rung's. --merge-layers and --most-density (of
the mean, as in the policy) hold the oracle to what the learned plan was held to; the uniform plan knows no such thing.

A student whose policy decided its steps (policy.steps) is asked for these instead: `usv.evaluation.oracle_steps`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from usv import flow
from usv.config import ModelConfig
from usv.evaluation import oracle_steps
from usv.evaluation.clips import held_out
from usv.evaluation.of_student import keep, opened, settings_of, words
from usv.models.forward import SparseTransformer
from usv.objectives.regression import velocity_loss
from usv.objectives.velocity import guided_velocity
from usv.policy.fixed import uniform_plan
from usv.policy.knapsack import choose, least_price
from usv.sampling.checkpoint import CheckpointError, Student
from usv.sparse.cost import ModelShape, plan_cost, rung_costs
from usv.sparse.grid import tile_layout
from usv.sparse.plan import DENSITY_LADDER, RUNGS, Rung, SparsityPlan, executed_densities


class Judge:
    """Held-out clips at the noise levels of one plan's bins, with the guided teacher's velocities.

    Args:
        batch: latents (B, C, T, H, W) and text (B, L, D). empty: (L, D). edges: upper timesteps of the bins.
    """

    def __init__(self, model: SparseTransformer, teacher: SparseTransformer, batch: dict, empty: torch.Tensor, settings: ModelConfig, edges, seed: int):
        self.model, self.points = model, []
        x0, text, shift = batch["latents"], batch["text"], settings.flow_shift
        for index in range(len(edges)):
            generator = torch.Generator().manual_seed(seed + index)
            sigma = flow.bin_levels(index, (torch.arange(len(x0)) + 0.5) / len(x0), len(edges), shift)
            x_t = flow.interpolate(x0, torch.randn(x0.shape, generator=generator), sigma)
            wanted = guided_velocity(teacher, x_t, 1000 * sigma, text, empty, settings.guidance_scale)
            weight = flow.slope(sigma, shift)
            scale = (weight * velocity_loss(wanted, torch.zeros_like(wanted))).mean()
            self.points.append((x_t, sigma, text, wanted, weight, scale))

    @torch.no_grad()
    def error(self, bin: int, row: tuple[Rung, ...] | None) -> tuple[float, float]:
        """Weighted squared error under a row of rungs (None: all dense), and the weighted square of what is wanted."""
        x_t, sigma, text, wanted, weight, scale = self.points[bin]
        velocity, _ = self.model(x_t, 1000 * sigma, text, row)
        return float((weight * velocity_loss(velocity, wanted)).mean()), float(scale)

    def plan_error(self, plan: SparsityPlan) -> float:
        """Relative weighted error of a whole plan."""
        errors, scales = zip(*(self.error(bin, row) for bin, row in enumerate(plan.rungs)))
        return sum(errors) / sum(scales)


def measure(judge: Judge, bins: int, layers: int) -> np.ndarray:
    """(bins, layers, rungs) rise of the squared error by each rung in one layer, all others dense."""
    damage = np.zeros((bins, layers, len(RUNGS)))
    with tqdm(total=bins * layers * (len(RUNGS) - 1), unit="rung") as bar:
        for bin in range(bins):
            dense = judge.error(bin, None)[0]
            for layer in range(layers):
                for index, rung in enumerate(RUNGS):
                    if rung == Rung():
                        continue
                    row = tuple(rung if i == layer else Rung() for i in range(layers))
                    damage[bin, layer, index] = judge.error(bin, row)[0] - dense
                    bar.update(1)
    return damage


def oracle_plan(
    damage: np.ndarray, costs, budget: float, edges, merge_layers: int | None = None, most_density: float = 1.0, densities=DENSITY_LADDER
) -> SparsityPlan:
    """The plan of least total measured damage within a mean cost.

    merge_layers: so many first layers may merge, None: all. most_density: bound on the mean of `densities`, which are those of the
    rungs of the density ladder; as the policy keeps it, by the least price on density that meets it.
    """
    bins, layers, rungs = damage.shape
    values, density = -damage.copy(), np.array([densities[rung.density] for rung in RUNGS])
    if merge_layers is not None:
        values[:, merge_layers:, [rung.merge > 0 for rung in RUNGS]] = -np.inf

    def solve(price: float) -> np.ndarray:
        # A fine grid: costs are rounded up, and the learned plan's own cost is the budget.
        return choose((values - price * density).reshape(-1, rungs), np.asarray(costs), budget, resolution=4_000)

    chosen = least_price(solve, lambda found: density[found].mean(), most_density)
    if chosen is None:
        raise ValueError(f"most_density: got {most_density}, but no plan of cost {budget:.4f} is as sparse")
    return SparsityPlan(tuple(edges), tuple(tuple(RUNGS[i] for i in row) for row in chosen.reshape(bins, layers)))


def predicted(damage: np.ndarray, plan: SparsityPlan) -> float:
    """Sum of the measured damages of a plan's rungs: what the oracle's is the least of, within its bounds."""
    return float(sum(damage[b, i, RUNGS.index(rung)] for b, row in enumerate(plan.rungs) for i, rung in enumerate(row)))


def compare(settings: ModelConfig, student: Student, pipe, shards: str, weights: str, batch_size: int, **held) -> dict:
    """The three plans at one cost, on clips that the damages were not measured on. held: bounds of `oracle_plan`."""
    if student.sampling.get("student_timesteps") and not student.plan.steps:
        raise CheckpointError(
            "--ckpt: got a student of fixed few steps, accepted: one of velocity distillation, or one that learned its steps; this one says "
            "where flows end"
        )
    teacher = SparseTransformer(pipe.transformer, student.model.tile).eval().requires_grad_(False)
    model = student.model if weights == "student" else teacher
    if weights == "teacher":
        settings = replace(settings, guidance_scale=1.0)
    plan = student.plan
    (seen, unseen), empty = held_out(shards, batch_size, settings.path, f"--batch-size: got {batch_size}, accepted: at most half of", 2)
    if plan.steps:
        if weights == "teacher" or held.get("merge_layers") is not None or held.get("most_density", 1.0) < 1:
            raise ValueError("--weights, --merge-layers, --most-density: got one of them for a student of learned steps, accepted: none; they are of rungs")
        return oracle_steps.compare(settings, student, teacher, seen, unseen, empty)
    layout = tile_layout(model.grid_of(seen["latents"].shape), model.tile)
    shape = ModelShape.of(model.config, settings.max_sequence_length)
    costs, budget = rung_costs(shape, layout), plan_cost(plan, shape, layout)
    damage = measure(Judge(model, teacher, seen, empty, settings, plan.edges, 0), len(plan.edges), plan.num_layers)
    judge = Judge(model, teacher, unseen, empty, settings, plan.edges, 1000)
    plans = {
        "learned": plan,
        "uniform": uniform_plan(plan.edges, plan.num_layers, costs, budget),
        "oracle": oracle_plan(damage, costs, budget, plan.edges, **held, densities=executed_densities(layout.num_blocks)),
    }
    rows = {
        name: {
            "error": round(judge.plan_error(p), 6), "cost": round(plan_cost(p, shape, layout), 5), "density": round(p.density(layout.num_blocks), 5),
            "predicted": round(predicted(damage, p), 6), "plan": p.to_dict()["rungs"],
        }
        for name, p in plans.items()
    }  # fmt: skip
    gain = oracle_steps.gain(rows)
    return {"weights": weights, **held, "edges": list(plan.edges), "rows": rows, "gain": gain, "damage": damage.round(7).tolist()}


def main() -> None:
    parser = words(__doc__)
    parser.add_argument("--weights", choices=("student", "teacher"), default="student")
    parser.add_argument("--batch-size", type=int, default=4, help="clips the damages are measured on, and as many they are not")
    parser.add_argument("--merge-layers", type=int, help="so many first layers may merge, as in policy.merge_layers")
    parser.add_argument("--most-density", type=float, default=1.0, help="bound on the mean density, as in policy.most_density")
    args = parser.parse_args()
    try:
        pipe, student = opened(args)
        report = compare(settings_of(args.model, student), student, pipe, args.data, args.weights, args.batch_size, merge_layers=args.merge_layers, most_density=args.most_density)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for name, row in report["rows"].items():
        print(f"{name:10} error {row['error']:.4f} at cost {row['cost']:.4f}" + (f" in steps {row['steps']}" if "steps" in row else ""))
    if report["gain"] is None:
        print("the oracle's plan gains nothing over the uniform one" + (", the only choice" if len(report.get("subsets", [])) == 1 else ""))
    else:
        print(f"the learned plan has {report['gain']:.0%} of the oracle's gain over the uniform plan, on the {args.weights}'s weights")
    keep(args.out, "oracle", report)
