"""`train`: one velocity-distillation step at the same batch, sparse student against dense student.

    teacher with guidance, no gradient -> student forward -> backward -> AdamW

Claim checked: a sparse student takes no more memory than a dense one, and less time at density ≤ 0.25. Peak memory is
measured in a fresh process a side (usv/evaluation/bench/memory.py).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from usv.config import ModelConfig
from usv.evaluation.bench.measure import environment, now, quantiles
from usv.evaluation.bench.sides import Inputs, Side, executed
from usv.models.forward import SparseTransformer
from usv.objectives.regression import velocity_loss
from usv.objectives.velocity import guided_velocity


@dataclass(frozen=True)
class Trainer:
    """A student under a side's plan with its optimiser, and the teacher it learns from."""

    side: Side
    teacher: SparseTransformer
    optimizer: torch.optim.Optimizer
    inputs: Inputs
    guidance_scale: float

    def step(self, index: int = 0) -> tuple[float, float]:
        """One step at one of the side's timesteps; seconds of the whole step and of the student's part."""
        x_t, text = self.inputs.latents, self.inputs.text
        timestep = torch.full((len(x_t),), self.side.timesteps[index], device=x_t.device)
        autocast = torch.autocast(x_t.device.type, torch.bfloat16, enabled=x_t.device.type == "cuda")  # as runtime.precision=auto
        begun = now()
        with autocast:
            wanted = guided_velocity(
                self.teacher, x_t, timestep, text, torch.zeros_like(text[0]), self.guidance_scale
            )
        taught = now()
        with autocast:
            velocity, _ = self.side.model(x_t, timestep, text, self.side.rows[index])
        velocity_loss(velocity.float(), wanted.float()).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ended = now()
        return ended - begun, ended - taught


def trainers(
    sides: Sequence[Side], teacher: SparseTransformer, inputs: Inputs, guidance_scale: float, own: SparseTransformer | None = None
) -> list[Trainer]:
    """Students on copies of the sides' weights; sides of one network share copy and optimiser. own: trained itself, no copy."""
    teacher.requires_grad_(False)
    copies: dict[int, tuple[SparseTransformer, torch.optim.Optimizer]] = {}
    for side in sides:
        if id(side.model) not in copies:
            student = (side.model if side.model is own else copy.deepcopy(side.model)).train().requires_grad_(True)
            copies[id(side.model)] = student, torch.optim.AdamW(student.parameters(), lr=1e-5)
    made = []
    for side in sides:
        student, optimizer = copies[id(side.model)]
        made.append(Trainer(replace(side, model=student), teacher, optimizer, inputs, guidance_scale))
    return made


def measure(sides: Sequence[Side], inputs: Inputs, guidance_scale: float, repeats: int) -> dict:
    """Seconds per step of every side, alternating, mean over its timesteps; and what was executed."""
    students = trainers(sides, sides[0].model, inputs, guidance_scale)
    whole, student = defaultdict(list), defaultdict(list)
    for repeat in range(-1, repeats):
        for trainer in students:
            seconds = [trainer.step(index) for index in range(len(trainer.side.rows))]
            if repeat >= 0:
                whole[trainer.side.name].append(sum(s[0] for s in seconds) / len(seconds))
                student[trainer.side.name].append(sum(s[1] for s in seconds) / len(seconds))
    return {
        side.name: {
            "batch_size": len(inputs.latents),
            "step_seconds": quantiles(whole[side.name]),
            "student_seconds": quantiles(student[side.name]),
            **executed(side, inputs),
        }
        for side in sides
    }


def bench(sides, inputs: Inputs, model: ModelConfig, peaks: Sequence[Callable[[], dict[str, int]]], repeats: int) -> dict:
    """`peaks`: what measures the memory of each side, in order."""
    dtype = "bfloat16 autocast" if torch.cuda.is_available() else "float32"
    report = {"environment": environment(), "dtype": dtype, "sides": measure(sides, inputs, model.guidance_scale, repeats)}
    rows = report["sides"]
    for side, peak in zip(sides, peaks):
        rows[side.name] |= peak()
    dense = rows[sides[0].name]
    for r in rows.values():
        r["step_speedup"] = dense["step_seconds"]["p50"] / r["step_seconds"]["p50"]
        r["student_speedup"] = dense["student_seconds"]["p50"] / r["student_seconds"]["p50"]
        r["memory_ratio"] = r["peak_bytes"] / dense["peak_bytes"]
        r["claim_holds"] = r["memory_ratio"] <= 1.0 and (r["density"] > 0.25 or r["step_speedup"] > 1.0)
    return report


def table(report: dict) -> str:
    lines = [
        f"{'':28}{'s/step':>9}{'p10':>8}{'p90':>8}{'×':>7}{'student s':>11}{'×':>7}{'peak MiB':>10}{'ratio':>7}{'density':>9}{'merged':>8}{'claim':>7}"
    ]
    for name, r in report["sides"].items():
        s = r["step_seconds"]
        lines.append(
            f"{name:28}{s['p50']:9.3f}{s['p10']:8.3f}{s['p90']:8.3f}{r['step_speedup']:6.2f}×{r['student_seconds']['p50']:11.3f}"
            f"{r['student_speedup']:6.2f}×{r['peak_bytes'] / 2**20:10.0f}{r['memory_ratio']:7.2f}{r['density']:9.3f}"
            f"{r['merged']:8.0%}{'holds' if r['claim_holds'] else 'FAILS':>7}"
        )
    return "\n".join(lines)
