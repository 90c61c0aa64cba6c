"""How much can a plan of its own for every input give? An oracle that knows each clip's damages, against one plan for all.

    python -m usv.oracle_inputs --ckpt data/students/usv_mini --out data/results/oracle_inputs_wan_mini.json

For every clip, bin, layer and single rung the damage is the rise of that clip's own weighted error, all other layers dense. Three choices by
the knapsack over them: one plan for all clips (of the mean damages); a plan a clip, each of the same cost; a plan a clip at one price for
all, so that easy clips pay for hard ones and only the mean cost is that of the others. They run on the same clips with other noise: a clip's
plan cannot have learned the noise it is judged on. gain = 1 − error / error of the one plan, paired by clip: the most that
`policy.input=content` could win here if it knew everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from usv.evaluation.clips import held_out
from usv.evaluation.of_student import keep, opened, settings_of, words
from usv.evaluation.oracle import Judge
from usv.evaluation.oracle_terminal import alone, joint, rung_of
from usv.models.forward import SparseTransformer
from usv.objectives.regression import velocity_loss
from usv.policy.damage import STEPS, WIDTH
from usv.policy.knapsack import plan_of
from usv.sparse.cost import ModelShape, plan_cost, rung_costs
from usv.sparse.grid import tile_layout
from usv.sparse.plan import Rung, SparsityPlan

Errors = Callable[[int, tuple[Rung, ...] | None, slice], np.ndarray]  # (bin, rungs, clips) -> weighted squared error of each of these clips


def errors_of(judge: Judge) -> Errors:
    @torch.no_grad()
    def errors(bin: int, row, clips: slice) -> np.ndarray:
        x_t, sigma, text, wanted, weight, _ = (value[clips] if value.ndim else value for value in judge.points[bin])
        velocity, _ = judge.model(x_t, 1000 * sigma, text, row)
        return (weight * velocity_loss(velocity, wanted)).double().numpy()

    return errors


def measure(errors: Errors, clips: int, bins: int, layers: int) -> np.ndarray:
    """(clips, bins, layers, WIDTH) rise of each clip's error by each single rung."""
    damage, every = np.zeros((clips, bins, layers, WIDTH)), slice(0, clips)
    for bin in tqdm(range(bins), unit="bin"):
        dense = errors(bin, None, every)
        for layer in range(layers):
            for slot in STEPS:
                damage[:, bin, layer, slot] = errors(bin, alone(layers, layer, rung_of(slot)), every) - dense
    return damage


def plans(damage: np.ndarray, edges, costs: np.ndarray, budget: float, merge_layers: int | None = None) -> dict[str, list[SparsityPlan]]:
    """A plan for every clip by each of the three choices."""
    clips, bins = damage.shape[:2]
    own = [joint(clip, merge_layers) for clip in damage]
    one = plan_of(edges, joint(damage.mean(0), merge_layers), costs, budget)
    together = plan_of(range(1, clips * bins + 1), np.concatenate(own), costs, budget)  # all clips' bins as rows of one table
    return {
        "one plan": [one] * clips,
        "own plan": [plan_of(edges, table, costs, budget) for table in own],
        "own plan, one price": [SparsityPlan(tuple(edges), together.rungs[i * bins : (i + 1) * bins]) for i in range(clips)],
    }


def compare(seen: Errors, unseen: Errors, clips: int, edges, layers: int, costs, budget: float, cost_of, merge_layers: int | None = None) -> dict:
    """seen, unseen: errors of the same clips with other noise. cost_of: plan -> its cost."""
    chosen = plans(measure(seen, clips, len(edges), layers), edges, np.asarray(costs), budget, merge_layers)
    rows = {}
    for name, each in chosen.items():
        found = [sum(float(unseen(b, plan.rungs[b], slice(i, i + 1))[0]) for b in range(len(edges))) for i, plan in enumerate(each)]
        rows[name] = {"errors": found, "cost": round(float(np.mean([cost_of(p) for p in each])), 5)}
    base = np.array(rows["one plan"]["errors"])
    rng = np.random.default_rng(0)
    for row in rows.values():
        error = np.array(row["errors"])
        draws = rng.integers(clips, size=(4000, clips))
        gains = 1 - error[draws].sum(1) / base[draws].sum(1)
        row["gain"], row["interval"] = float(1 - error.sum() / base.sum()), [float(x) for x in np.quantile(gains, [0.025, 0.975])]
    return {"edges": list(edges), "budget": budget, "clips": clips, "rows": rows}


def main() -> None:
    parser = words(__doc__)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--budget", type=float, help="default: the student's own cost")
    parser.add_argument("--merge-layers", type=int, help="so many first layers may merge")
    args = parser.parse_args()
    try:
        pipe, student = opened(args)
        plan, settings = student.plan, settings_of(args.model, student)
        (batch,), empty = held_out(args.data, args.clips, args.model, f"--clips: got {args.clips}, accepted: at most")
        teacher = SparseTransformer(pipe.transformer, student.model.tile).eval().requires_grad_(False)
        layout = tile_layout(student.model.grid_of(batch["latents"].shape), student.model.tile)
        shape = ModelShape.of(student.model.config, settings.max_sequence_length)
        seen, unseen = (errors_of(Judge(student.model, teacher, batch, empty, settings, plan.edges, seed)) for seed in (0, 1000))
        cost_of = lambda p: plan_cost(p, shape, layout)  # noqa: E731
        budget = cost_of(plan) if args.budget is None else args.budget
        report = compare(seen, unseen, args.clips, plan.edges, plan.num_layers, rung_costs(shape, layout), budget, cost_of, args.merge_layers)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for name, row in report["rows"].items():
        print(f"{name:22} gain {row['gain']:+.1%} [{row['interval'][0]:+.1%}, {row['interval'][1]:+.1%}] at mean cost {row['cost']:.4f}")
    keep(args.out, "oracle_inputs", report)


if __name__ == "__main__":
    main()
