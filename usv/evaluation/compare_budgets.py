"""A dial at every budget, beside uniform plans, the hand rule and students of one budget, on the same held-out clips and noise.

    python -m usv.compare_budgets --ckpt data/students/usv_dial --beside data/students/usv_mini --out data/results/dial_wan_mini.json

error: ‖student − guided teacher‖² / ‖guided teacher‖² of the velocity, weighted by how far the sampler goes there, as in the loss. At each
budget the dial's weights run the plan decoded from its damages, the uniform plan and the hand rule of that cost; a student beside it runs
its own weights and plan, and its cost is one of the budgets if the dial reaches it. ratio: a row's error over that of the dial's plan at
the same budget, with a 95% interval that resamples clips.
"""

from __future__ import annotations

import sys

import numpy as np

from usv.evaluation.clips import held_out
from usv.evaluation.of_student import keep, opened, settings_of, words
from usv.evaluation.oracle import Judge
from usv.evaluation.oracle_inputs import Errors, errors_of
from usv.models.forward import SparseTransformer
from usv.policy.baselines import HandRulePolicy
from usv.policy.dial import dial_of
from usv.policy.fixed import uniform_plan
from usv.sampling.budget import plan_at
from usv.sampling.checkpoint import CheckpointError, Student, load_student, named
from usv.sparse.cost import ModelShape, plan_cost, rung_costs
from usv.sparse.grid import tile_layout
from usv.sparse.plan import SparsityPlan

DIAL = "dial"
BUDGETS = (0.15, 0.2, 0.28, 0.4, 0.6)


def check_beside(dial: Student, name: str, student: Student) -> None:
    """CheckpointError for a student that cannot be asked at the same points."""
    if student.sampling.get("student_timesteps"):
        raise CheckpointError(f"--beside {name}: got a student of few steps, accepted: one of velocity distillation; this one says where flows end")
    if not np.allclose(student.plan.edges, dial.plan.edges):
        raise CheckpointError(f"--beside {name}: got {len(student.plan.edges)} bins of timesteps, accepted: the {len(dial.plan.edges)} of --ckpt")


def plans_at(dial: Student, budget: float, costs) -> dict[str, SparsityPlan]:
    """The dial's plan and its rivals' of one budget; the hand rule only where it is as cheap."""
    edges, layers = dial.plan.edges, dial.plan.num_layers
    found = {DIAL: plan_at(dial, dial.plan, budget), "uniform": uniform_plan(edges, layers, costs, budget)}
    try:
        found["hand_rule"] = HandRulePolicy(edges, layers, costs).decode(budget)
    except ValueError:
        pass
    return found


def plan_errors(errors: Errors, plan: SparsityPlan, clips: int) -> np.ndarray:
    """(clips,) weighted squared error of a plan, summed over its bins."""
    return np.sum([errors(bin, row, slice(0, clips)) for bin, row in enumerate(plan.rungs)], 0)


def ratio(error: np.ndarray, base: np.ndarray, draws: int = 4000) -> dict:
    """Of sums over clips, and its interval over resamples of clips."""
    chosen = np.random.default_rng(0).integers(len(error), size=(draws, len(error)))
    low, high = np.quantile(error[chosen].sum(1) / base[chosen].sum(1), [0.025, 0.975])
    return {"ratio": round(float(error.sum() / base.sum()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def compare(dial: Student, beside: dict[str, Student], judge: Judge, budgets, shape: ModelShape, layout) -> list[dict]:
    """A row for each budget and plan. BudgetError where a budget is out of the dial's reach; costs of students beside it that are, are left out."""
    clips, scale = len(judge.points[0][0]), sum(float(point[-1]) for point in judge.points)
    cost_of = lambda plan: plan_cost(plan, shape, layout)  # noqa: E731
    costs, (least, most) = rung_costs(shape, layout), dial_of(dial.policy, dial.plan.edges).reach()
    own = {name: cost_of(student.plan) for name, student in beside.items()}
    asked = sorted({*budgets, *(cost for cost in own.values() if least <= cost <= most)})
    judge.model, theirs = dial.model, {}
    rows = []
    for budget in asked:
        found = {name: (plan, plan_errors(errors_of(judge), plan, clips)) for name, plan in plans_at(dial, budget, costs).items()}
        theirs[budget] = found[DIAL][1]
        rows += [row(name, budget, plan, error, theirs[budget], scale, cost_of(plan), plan.density(layout.num_blocks)) for name, (plan, error) in found.items()]
    for name, student in beside.items():
        judge.model = student.model
        error = plan_errors(errors_of(judge), student.plan, clips)
        rows.append(row(name, own[name], student.plan, error, theirs.get(own[name]), scale, own[name], student.plan.density(layout.num_blocks)))
    return rows


def row(name: str, budget: float, plan: SparsityPlan, error: np.ndarray, base: np.ndarray | None, scale: float, cost: float, density: float) -> dict:
    """base: errors of the dial's plan at this budget, None where there is none. scale: mean weighted square of what is wanted, over bins."""
    against = {} if base is None or name == DIAL else ratio(error, base)
    return {
        "plan": name, "budget": round(budget, 5), "cost": round(cost, 5), "density": round(density, 5), "merged": round(plan.merged(), 5),
        "error": round(float(error.mean() / scale), 6), **against,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [f"{'budget':>8}  {'plan':16}{'cost':>8}{'density':>9}{'merged':>8}{'error':>9}{'over the dial, 95%':>26}"]
    for r in rows:
        against = f"{r['ratio']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]" if "ratio" in r else ""
        lines.append(f"{r['budget']:8.3f}  {r['plan']:16}{r['cost']:8.3f}{r['density']:9.3f}{r['merged']:8.0%}{r['error']:9.4f}{against:>26}")
    return "\n".join(lines)


def main() -> None:
    parser = words(__doc__, ckpt="folder of a student that carries damages")
    parser.add_argument("--beside", action="append", default=[], help="[name=]folder of a student at its own budget; repeat for several")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--clips", type=int, default=8)
    args = parser.parse_args()
    try:
        pipe, dial = opened(args)
        beside = {name: load_student(path, pipe.transformer) for name, path in named(args.beside).items()}
        for name, student in beside.items():
            check_beside(dial, name, student)
        for budget in args.budgets:  # before anything is computed
            plan_at(dial, dial.plan, budget)
        settings = settings_of(args.model, dial)
        (batch,), empty = held_out(args.data, args.clips, args.model, f"--clips: got {args.clips}, accepted: at most")
        teacher = SparseTransformer(pipe.transformer, dial.model.tile).eval().requires_grad_(False)
        judge = Judge(dial.model, teacher, batch, empty, settings, dial.plan.edges, 1000)
        layout = tile_layout(dial.model.grid_of(batch["latents"].shape), dial.model.tile)
        rows = compare(dial, beside, judge, args.budgets, ModelShape.of(dial.model.config, settings.max_sequence_length), layout)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(table(rows))
    keep(args.out, "compare_budgets", {"clips": args.clips, "rows": rows})


if __name__ == "__main__":
    main()
