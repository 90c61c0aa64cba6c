"""What train.py leaves out: schedules, the run itself with its decisions and averaged student, logging. Commands import it too."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import torch

from usv import flow
from usv.config import TrainConfig
from usv.files import write_text
from usv.models import lora
from usv.models.forward import SparseTransformer
from usv.objectives import make_objective
from usv.objectives.protocol import Clips, Point, Prompt
from usv.objectives.velocity import guided_velocity
from usv.policy import Decisions
from usv.policy.content import content_of
from usv.sampling.checkpoint import Student
from usv.sparse.attention import AttentionStats
from usv.sparse.plan import MERGE_LADDER, SparsityPlan, bin_of, executed_densities
from usv.training.ranks import Ranks
from usv.training.remote import masked_settings
from usv.training.resume import policy_tables

STEERING = 0.2  # of a density that is missed, added to the mass: a batch tells it to some hundredths only


@lru_cache(maxsize=1)  # of the code that was loaded; and a git status for each checkpoint would cost more than the write
def commit() -> str:
    """The commit of the code that runs, with + when files differ from it; "unknown" outside a checkout."""
    try:
        here = Path(__file__).resolve().parent
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
        return run("rev-parse", "--short", "HEAD").strip() + ("+" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def budget_at(step: int, config: TrainConfig) -> float:
    """Target cost of a step: 1 at first, then geometrically down to the budget (density warm-down).

    With `policy.budgets` every step draws its own between them: a quarter the smallest, a quarter the largest, the others in between,
    evenly in the logarithm; the warm-down bounds them from below.
    """
    p = config.policy
    begin, end = p.warm_down
    progress = min(max((step / config.optim.steps - begin) / max(end - begin, 1e-9), 0.0), 1.0)
    if not p.budgets:
        return p.budget**progress
    least, most = p.budgets
    draw = 2 * float(torch.rand(1, generator=torch.Generator().manual_seed(config.seed * 104_729 + step))) - 0.5
    return max(least ** (1 - min(max(draw, 0.0), 1.0)) * most ** min(max(draw, 0.0), 1.0), least**progress)


@dataclass
class Record:
    """What one step did, for the bar and the log."""

    seconds: float = 0.0
    values: dict = field(default_factory=dict)
    bin: int = 0

    def __post_init__(self):
        self.begun = time.perf_counter()

    def fill(self, loss, norm, decisions: Decisions, stats, target_cost, costs, num_layers) -> None:
        rungs = decisions.rungs
        self.seconds, self.bin = time.perf_counter() - self.begun, decisions.bin
        density = [float(stats[i].density) if i in stats else 1.0 for i in range(num_layers)]
        self.values = {
            "loss/velocity": loss,
            f"loss_by_noise/bin_{decisions.bin}": loss,
            "speed/step_seconds": self.seconds,
            "optim/gradient_norm": float(norm),
            "sparsity/density": sum(density) / num_layers,
            "sparsity/merged": sum(MERGE_LADDER[r.merge] for r in rungs) / num_layers,
            "sparsity/cost": sum(costs[r] for r in rungs) / num_layers,
            "sparsity/target_cost": target_cost,
        }
        if stats:
            self.values["attention/coarse_recall"] = sum(float(s.coarse_recall) for s in stats.values()) / len(stats)
            self.values["attention/coarse_entropy"] = sum(float(s.entropy) for s in stats.values()) / len(stats)

    def skip(self, count: int) -> None:
        self.values = {"optim/skipped_steps": count}

    def brief(self) -> dict[str, str]:
        v = self.values
        if "loss/velocity" not in v:
            return {"skipped": f"{v['optim/skipped_steps']:.0f}"}
        return {
            "loss": f"{v['loss/velocity']:.4f}", "density": f"{v['sparsity/density']:.2f}", "merged": f"{v['sparsity/merged']:.2f}",
            "cost": f"{v['sparsity/cost']:.2f}/{v['sparsity/target_cost']:.2f}",
        }  # fmt: skip


class Run:
    """Everything one training run holds. Built by `build`; the step itself is in train.py."""

    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.share = ranks.share
        self.folder = Path(config.output_dir)
        self.step, self.plan, self.best, self.guide = 0, None, None, None
        self.wanted = [0.0, 0]  # mean square of what the student is to give, over so many steps: the unit of damages
        self.dialled: dict[int, SparsityPlan] = {}  # plans of a dial's budgets, once the damages are fixed
        self.skipped, self.skipped_in_a_row, self.saved = 0, 0, None  # saved: the step that stands on the disk
        self.base: dict[str, list[float]] | None = None  # `fingerprint` of the model that the student is trained from
        self.conditions: tuple[str, ...] = ()  # what the transformer is given beside the text, by name
        self.objective = make_objective(config.objective, config.model.flow_shift)

    @property
    def router(self) -> bool:
        """Whether only gates and policy learn."""
        return self.config.optim.train == "router"

    @property
    def clips_at_once(self) -> int:
        """Clips that this device holds at one time, of those of a step."""
        return self.clips_a_step // self.config.optim.accumulate

    @property
    def clips_a_step(self) -> int:
        """Clips of a step on this device."""
        return self.config.optim.batch_size // self.ranks.share.world

    def clips(self, batch: dict) -> Clips:
        """A batch of the data on this device."""
        return Clips(batch["latents"].to(self.device), self.prompt(batch))

    def prompt(self, batch: dict) -> Prompt:
        """What the clips of a batch are asked with, on this device."""
        return Prompt(batch["text"].to(self.device), {name: value.to(self.device) for name, value in batch.get("conditions", {}).items()})

    def parts(self, clips: Clips, point: Point) -> Iterator[tuple[Clips, Point]]:
        """A step's clips and its point in `optim.accumulate` equal parts."""
        for rows in self._parts():
            of = {name: getattr(point, name)[rows] for name in ("x", "sigma", "prompt", "noise")}
            wanted = None if point.wanted is None else point.wanted[rows]
            yield clips[rows], replace(point, **of, wanted=wanted)

    def pieces(self, clips: Clips) -> Iterator[Clips]:
        """A step's clips in the same parts."""
        return (clips[rows] for rows in self._parts())

    def _parts(self) -> Iterator[slice]:
        """The clips of each part of a step; while it is worked on, draws of the whole batch are sliced to it."""
        whole, count = self.share, self.config.optim.accumulate
        try:
            for number in range(count):
                self.share = whole.part(number, count)
                yield slice(number * self.clips_at_once, (number + 1) * self.clips_at_once)
        finally:
            self.share = whole

    def record(self) -> Record:
        run = self

        class _Record(Record):
            def fill(self, **values):
                super().fill(costs=run.costs, num_layers=run.num_layers, **values)

        return _Record()

    def bin_order(self, step: int) -> int:
        """The timestep bin of a step: every run of `bins` steps visits each bin once, in an order drawn from the seed."""
        count = len(self.edges)
        generator = torch.Generator().manual_seed(self.config.seed * 7919 + step // count)
        return int(torch.randperm(count, generator=generator)[step % count])

    def levels(self, bin: int, place: torch.Tensor) -> torch.Tensor:
        """Noise levels (B,) at places (B,) in [0, 1) of a timestep bin."""
        return flow.bin_levels(bin, place, len(self.edges), self.config.model.flow_shift, *self.span)

    def decide(self, bin: int, target: float, generator: torch.Generator, latents: torch.Tensor, text: torch.Tensor) -> Decisions:
        """The policy's decision for a batch at this budget, or the frozen plan's after `freeze_at`."""
        if self.plan is None and self.step >= self.config.policy.freeze_at * self.config.optim.steps:
            self.plan = self.policy.decode(self.config.policy.budget)
        self.policy.set_budget(target)
        if self.plan is not None:
            return Decisions(bin, self.frozen().rungs[bin])
        content = content_of(latents, text) if self.config.policy.input == "content" else None
        return self.policy.decide(bin, generator, content)

    def half(self, decisions: Decisions) -> torch.Tensor:
        """The mix of a probe: one half, of every clip by itself where damages are told from the input."""
        shape = () if decisions.content is None else (len(decisions.content), 1, 1)
        return torch.full(shape, 0.5, device=self.device, requires_grad=True)

    def frozen(self) -> SparsityPlan:
        """The fixed plan; of a dial that of the budget drawn last, to a thirty-second of its range."""
        if not self.config.policy.budgets:
            return self.plan
        least, most = self.config.policy.budgets
        notch = round(32 * math.log(self.policy.target / least) / max(math.log(most / least), 1e-9))
        if notch not in self.dialled:
            self.dialled[notch] = self.policy.decode(least * (most / least) ** (notch / 32))
        return self.dialled[notch]

    def current_plan(self) -> SparsityPlan:
        """The frozen plan, or what the policy would decode to at the final budget."""
        return self.plan or self.policy.decode(self.config.policy.budget)

    def rungs_at(self, timestep: float, generator: torch.Generator):
        """What the student runs at a timestep of a rollout: the plan once it is fixed, else the policy's sample."""
        bin = bin_of(timestep, self.edges)
        return self.frozen().rungs[bin] if self.plan is not None else self.policy.decide(bin, generator).rungs

    def sparse(self, prompt: Prompt, rungs_at):
        """(x, timestep (B,)) -> the student's velocity for a prompt; rungs_at: timestep -> the rungs it runs under."""
        impl = self.config.attention.impl
        return lambda x, t: self.student(x, t, prompt.text, rungs_at(float(t[0])), None, impl, **prompt.conditions)[0]

    def sparse_by_bin(self, prompt: Prompt, rows: Mapping[int, tuple]):
        """As `sparse`, for noise levels of a few bins in one batch: each clip under the row of its own; rows: of every bin there may be."""

        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            bins = [min(max(bin_of(float(timestep), self.edges), min(rows)), max(rows)) for timestep in t]
            velocity = torch.empty_like(x)
            for bin, row in rows.items():
                here = torch.tensor([i for i, b in enumerate(bins) if b == bin], device=x.device, dtype=torch.long)
                if len(here):
                    velocity[here] = self.sparse(prompt[here], lambda _: row)(x[here], t[here]).to(velocity)
                elif self.ranks.share.world > 1:  # with weights spread over ranks all must run a forward if one does
                    self.sparse(prompt[:1], lambda _: row)(x[:1], t[:1])
            return velocity

        return call

    def taught(self, prompt: Prompt):
        """(x, timestep (B,)) -> the dense teacher's guided velocity for a prompt; of a router its velocity, since guidance stays outside."""
        scale = 1.0 if self.router else self.config.model.guidance_scale
        return lambda x, t: guided_velocity(self.teacher, x, t, prompt.text, self.empty, scale, prompt.conditions)

    def guided(self, prompt: Prompt):
        """The same of the guide (`objective.guide`, else `objective.init` as it was) under its own plan; without one the teacher's."""
        if self.guide is None:
            return self.taught(prompt)
        impl = self.config.attention.impl
        return lambda x, t: self.guide.model(x, t, prompt.text, self.guide.plan.at(float(t[0])), impl=impl, **prompt.conditions)[0]

    @property
    def guide_timesteps(self) -> list[float]:
        """Of a guide of few steps; [] of others, and without one."""
        return [] if self.guide is None else self.guide.sampling.get("student_timesteps") or []

    def decides_steps(self) -> bool:
        """Whether the policy is still learning which steps run."""
        return self.plan is None and getattr(self.policy, "steps", False)

    def forward_target(self, target: float) -> float:
        """What a forward may cost on average: the target, where steps are decided shared by those that run; of a plan that was
        inherited its own cost."""
        if self.config.policy.name == "inherit":
            rungs = [rung for row in self.plan.running() for rung in row]
            return sum(self.costs[rung] for rung in rungs) / len(rungs)
        if not getattr(self.policy, "steps", False):
            return target
        running = sum(self.plan.steps) if self.plan is not None else float(self.policy.run_probability().sum())
        return min(1.0, target * len(self.edges) / running)

    def observe(self, decisions, probes, stats, wanted: float) -> None:
        """What the policy learns from: the means over ranks, so that all ranks go on deciding alike.

        wanted: mean square of what the student is to give. A damage is a rise of the loss over the mean of that so far, which hardly moves;
        the loss itself falls, and damages in units of it could not be remembered.
        """
        mean, count = self.wanted
        self.wanted = [mean + (self.ranks.mean([wanted])[0] - mean) / (count + 1), count + 1]
        if self.plan is None:
            unit = max(self.wanted[0], 1e-12)
            seen = [float(p.mix.grad.sum()) / unit for p in probes.values()] + [float(s.entropy) for s in stats.values()]
            seen = self.ranks.mean(seen)
            damages = dict(zip(probes, seen))
            if decisions.content is not None:
                damages = {layer: (len(decisions.content) * p.mix.grad.flatten().cpu() / unit).tolist() for layer, p in probes.items()}
            self.policy.observe(decisions, damages, dict(zip(stats, seen[len(probes) :])))
        elif self.config.policy.mode == "dynamic":
            self.steer(decisions, stats)

    def steer(self, decisions: Decisions, stats: Mapping[int, AttentionStats]) -> None:
        """Bring the density that an input's mass comes to nearer to the plan's. The first mass of a cell is what the plan's own number
        of blocks holds on average; the means over ranks, so that all ranks go on alike."""
        layers = [layer for layer in stats if decisions.rungs[layer].density]
        seen = self.ranks.mean([float(value) for layer in layers for value in (stats[layer].coarse_recall, stats[layer].density)])
        densities, masses = executed_densities(self.layout.num_blocks), {}
        for layer, recall, density in zip(layers, seen[::2], seen[1::2]):
            rung = decisions.rungs[layer]
            mass = rung.mass + STEERING * (densities[rung.density] - density) if rung.mass else recall
            masses[layer] = min(max(mass, 1e-3), 1.0)
        self.plan = self.plan.steered(decisions.bin, masses)

    def update(self, losses: Sequence[float]) -> tuple[float, float]:
        """Step of the student, whose gradients are there; the loss, mean over ranks, and the gradient's norm. Not finite: nothing moved.
        losses: of the parts of the step's clips."""
        mean = self.ranks.mean([sum(losses) / len(losses)])[0]
        warm = min(1.0, (self.step + 1) / max(1, self.config.optim.warmup))
        decay = 0.5 * (1 + math.cos(math.pi * self.step / self.config.optim.steps))
        norm = self.engine.step(self.config.optim.lr * warm * (0.05 + 0.95 * decay))
        if math.isfinite(norm):
            self.engine.update_average(1 - min(self.config.optim.ema, (1 + self.step) / (10 + self.step)))
            self.skipped_in_a_row = 0
        return mean, norm

    def skip(self, what: str) -> None:
        """Count a step that was not finite and left everything as it was; too many in a row end the run with a report."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.runtime.max_skipped:
            self.fail(f"{what}; {self.skipped_in_a_row} steps in a row were not finite")

    def student_with_average(self, device=None) -> Student | None:
        """The averaged student as it is saved and validated, its own copy of the weights; collective, None but on rank 0."""
        weights = self.engine.weights(averaged=True)
        if not self.ranks.first:
            return None
        setting, adapters, used = self.config.lora, None, None
        if setting.rank:
            adapters = {name: value for name, value in weights.items() if lora.is_adapter(name)}
            weights = lora.merged(weights, setting.alpha / setting.rank)
            used = {"rank": setting.rank, "alpha": setting.alpha, "targets": list(setting.targets)}
        model = SparseTransformer(type(self.engine.model.transformer).from_config(self.engine.model.config), self.engine.model.tile)
        model.load_state_dict(weights)
        if device is None:  # validated in the teacher's precision: bf16 on a GPU, but for what diffusers keeps in fp32
            kinds = {name.replace(".base_layer.", "."): p.dtype for name, p in self.pipe.transformer.named_parameters()}
            for name, p in model.transformer.named_parameters():
                p.data = p.data.to(kinds[name])
        m, plan = self.config.model, self.current_plan()
        sampling = {
            "height": m.height, "width": m.width, "num_frames": m.num_frames, "num_inference_steps": m.num_inference_steps,
            "max_sequence_length": m.max_sequence_length, "flow_shift": m.flow_shift, "guidance_scale" if self.router else "guidance_folded_in": m.guidance_scale,
        }  # fmt: skip
        if model.family.name == "wan":
            sampling["image"] = "image_latents" in self.conditions
        if m.expert is not None:
            sampling |= {"expert": m.expert, "boundary": m.boundary}
        if steps := plan.student_timesteps() or list(self.config.objective.student_timesteps):
            sampling |= {"student_timesteps": steps, "num_inference_steps": len(steps)}
        training = {"steps": self.step, "policy": self.config.policy.name, "seed": self.config.seed, "commit": commit()}
        model = model.to(device or self.device).eval().requires_grad_(False)
        return Student(model, plan, sampling, training, policy_tables(self.policy, self.config.policy), used, adapters, router=self.router, base=self.base)

    def fail(self, what: str) -> None:
        """Stop on a non-finite step. The last checkpoint stands; a report says what was seen."""
        last = "The last good checkpoint is in" if (self.folder / "state").exists() else "No checkpoint was written yet to"
        report = {"what": what, "step": self.step, "config": masked_settings(asdict(self.config))}
        path = self.folder / "failure.json"
        if self.ranks.first:
            write_text(path, json.dumps(report, indent=1))
        raise FloatingPointError(
            f"{what}. {last} {self.folder}/state, the report in {path}. Lower optim.lr or "
            "optim.grad_clip and run again with runtime.resume=auto"
        )


def mean_of_parts(seen: Sequence[tuple[dict[int, AttentionStats], dict[str, float]]]) -> tuple[dict[int, AttentionStats], dict[str, float]]:
    """Measurements by layer and numbers for the log, means over equal parts of a step's clips."""
    if len(seen) == 1:
        return seen[0]
    stats, values = zip(*seen)
    layers = {
        layer: AttentionStats(*(torch.stack([getattr(part[layer], f.name) for part in stats]).mean(0) for f in fields(AttentionStats)))
        for layer in stats[0]
    }
    return layers, {name: sum(part[name] for part in values) / len(values) for name in values[0]}


def log_step(run: Run, record: Record, tracker) -> None:
    """Scalars every `logger.every` steps."""
    if run.step % run.config.logger.every and run.step != 1 and "optim/skipped_steps" not in record.values:
        return
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else _resident_gib()
    policy = {f"gates/{k}": v for k, v in run.policy.summary().items()} if run.plan is None else {}
    tracker.scalars(run.step, {**record.values, **policy, "system/memory_gib": memory})


def _resident_gib() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return float("nan")
