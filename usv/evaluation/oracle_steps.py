"""Which of its candidate steps should a few-step student run? Exhaustive search, against what its policy learned.

Every subset with as many steps as the learned one (pure noise always runs) samples the same prompts from the same noise; judged as
the policy's own probes are, by how far the guided teacher would move the samples. The k-th step of every subset runs the plan's k-th
row: all cost the same, and the learned one is as it is in use. The best subset is chosen on one half of the clips and compared on
the other with the learned one and with the evenly spaced one: gain = (uniform − learned) / (uniform − oracle).

Only where the steps lie is judged, not how many there are. The weights were trained at the learned ones, or about them where the
policy learned on for most of the run: an advantage that the other subsets do not have.
"""

from __future__ import annotations

from itertools import combinations

import torch
from tqdm import tqdm

from usv.config import ModelConfig
from usv.models.forward import SparseTransformer
from usv.objectives import rollout
from usv.sampling.checkpoint import Student
from usv.sparse.cost import ModelShape, plan_cost
from usv.sparse.grid import tile_layout
from usv.sparse.plan import SparsityPlan


def subsets(edges, count: int) -> list[tuple[float, ...]]:
    """All descending choices of `count` of the ascending candidate timesteps, the last of which is in each."""
    return [tuple(sorted((*chosen, edges[-1]), reverse=True)) for chosen in combinations(edges[:-1], count - 1)]


def even(edges, count: int) -> tuple[float, ...]:
    """The descending choice of `count` that a sampler of as many uniform steps would make: the nearest candidates to even spacing."""
    return tuple(edges[(2 * i * len(edges) + count) // (2 * count) - 1] for i in range(count, 0, -1))


DRAWS = 3  # of noise, for each clip


class SampleJudge:
    """Samples of a student for some prompts, `DRAWS` from each, judged by its guided teacher."""

    def __init__(self, student: Student, teacher: SparseTransformer, batch: dict, empty: torch.Tensor, settings: ModelConfig, seed: int):
        self.student, self.teacher, self.empty, self.settings = student, teacher, empty, settings
        self.text, self.shape, self.seeds = batch["text"], batch["latents"].shape, range(seed, seed + DRAWS)

    @torch.no_grad()
    def residual(self, timesteps) -> float:
        """Mean squared distance (`rollout.teacher_residual`) of the samples made in these steps."""
        plan, total = SparsityPlan(tuple(sorted(timesteps)), self.student.plan.running()), 0.0
        call = lambda x, t: self.student.model(x, t, self.text, plan.at(float(t[0])))[0]  # noqa: E731
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(seed)
            samples = rollout.rollout(call, torch.randn(self.shape, generator=generator), timesteps)
            total += rollout.teacher_residual(samples, self.text, self.empty, self.teacher, self.settings.guidance_scale, generator)
        return total / DRAWS


def gain(rows: dict[str, dict]) -> float | None:
    """The share of the oracle's gain over the uniform plan that the learned one has; None where the oracle gains nothing."""
    errors = {name: row["error"] for name, row in rows.items()}
    most = errors["uniform"] - errors["oracle"]
    return round((errors["uniform"] - errors["learned"]) / most, 4) if most > 0 else None


def compare(settings: ModelConfig, student: Student, teacher: SparseTransformer, seen: dict, unseen: dict, empty: torch.Tensor) -> dict:
    """The learned, the even and the best subset; what the best was chosen by, for every subset, is in `subsets`. cost: in dense forwards.

    seen, unseen: batches of clips, of which only the texts and the shape are used.
    """
    edges, learned = student.plan.edges, tuple(student.plan.student_timesteps())
    judge = SampleJudge(student, teacher, seen, empty, settings, 0)
    found = {steps: judge.residual(steps) for steps in tqdm(subsets(edges, len(learned)), unit="subset")}
    plans = {"learned": learned, "uniform": even(edges, len(learned)), "oracle": min(found, key=found.get)}
    judge = SampleJudge(student, teacher, unseen, empty, settings, 1000)
    layout = tile_layout(student.model.grid_of(seen["latents"].shape), student.model.tile)
    shape = ModelShape.of(student.model.config, settings.max_sequence_length)
    cost = round(plan_cost(student.plan.sampled(learned), shape, layout) * len(learned), 5)
    rows = {name: {"error": round(judge.residual(steps), 6), "cost": cost, "steps": list(steps)} for name, steps in plans.items()}
    searched = [{"steps": list(steps), "error": round(error, 6)} for steps, error in found.items()]
    return {"axis": "steps", "edges": list(edges), "rows": rows, "subsets": searched, "gain": gain(rows)}
