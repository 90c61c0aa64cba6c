"""What train.py's page leaves out: building, schedules, checkpoints, validation. On the roof: only train.py imports it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator

from usv import distill, flow
from usv.checkpoint import CheckpointError, Student, atomic_folder, load_student, save_file_atomic, save_student, settle
from usv.config import SettingError, TrainConfig
from usv.cost import ModelShape, plan_cost, rung_costs
from usv.cpu import fast_dtype
from usv.data import ShardDataset
from usv.generate import generate, load_pipeline
from usv.grid import Tile, tile_layout
from usv.matching import Critic
from usv.models.wan import SparseWan
from usv.pipeline import disable, enable
from usv.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, SparsityPlan, bin_of, timestep_bins
from usv.policy import Decisions
from usv.policy.fixed import EntropyPolicy, StaticPolicy
from usv.policy.gumbel import GumbelPolicy
from usv.video import contact_sheet, write_mp4


def precision(config: TrainConfig) -> str:
    """accelerate's name of the precision."""
    if config.runtime.precision == "auto":
        bf16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else fast_dtype() == torch.bfloat16
        return "bf16" if bf16 else "no"
    return {"fp32": "no", "bf16": "bf16"}[config.runtime.precision]


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
    """Target cost of a step: 1 at first, then geometrically down to the budget (density warm-down)."""
    begin, end = config.policy.warm_down
    progress = (step / config.optim.steps - begin) / max(end - begin, 1e-9)
    return config.policy.budget ** min(max(progress, 0.0), 1.0)


def temperature_at(step: int, config: TrainConfig) -> float:
    """Temperature of the Gumbel policy, geometrically from tau_start to tau_end at freeze_at."""
    progress = min(step / (config.optim.steps * config.policy.freeze_at), 1.0)
    return config.policy.tau_start * (config.policy.tau_end / config.policy.tau_start) ** progress


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

    def brief(self) -> dict[str, str]:
        v = self.values
        return {
            "loss": f"{v['loss/velocity']:.4f}", "density": f"{v['sparsity/density']:.2f}", "merged": f"{v['sparsity/merged']:.2f}",
            "cost": f"{v['sparsity/cost']:.2f}/{v['sparsity/target_cost']:.2f}",
        }  # fmt: skip


class Run:
    """Everything one training run holds. Built by `build`; the step itself is in train.py."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.folder = Path(config.output_dir)
        self.step, self.plan, self.running, self.critic = 0, None, None, None

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

    def decide(self, bin: int, target: float, tau: float, generator: torch.Generator) -> Decisions:
        """The policy's decision, or the frozen plan's after `freeze_at`."""
        if self.plan is None and self.step >= self.config.policy.freeze_at * self.config.optim.steps:
            self.plan = self.policy.decode(self.config.policy.budget)
        if self.plan is not None:
            return Decisions(bin, self.plan.rungs[bin])
        if isinstance(self.policy, GumbelPolicy):
            self.policy.tau = tau
        return self.policy.decide(bin, generator)

    def current_plan(self) -> SparsityPlan:
        """The frozen plan, or what the policy would decode to at the final budget."""
        return self.plan or self.policy.decode(self.config.policy.budget)

    def rungs_at(self, timestep: float, generator: torch.Generator):
        """What the student runs at a timestep of a rollout: the plan once it is fixed, else the policy's sample."""
        bin = bin_of(timestep, self.edges)
        return self.plan.rungs[bin] if self.plan is not None else self.policy.decide(bin, generator).rungs

    def policy_loss(self, target: float) -> torch.Tensor | None:
        return None if self.plan is not None else self.policy.loss(target)

    def observe(self, decisions, probes, stats, loss: float) -> None:
        self.running = loss if self.running is None else 0.95 * self.running + 0.05 * loss
        if self.plan is None:
            damages = {layer: float(p.mix.grad) / max(self.running, 1e-12) for layer, p in probes.items()}
            self.policy.observe(decisions, damages, {layer: float(s.entropy) for layer, s in stats.items()})

    def optimizer_step(self, policy_loss: torch.Tensor | None) -> None:
        warm = min(1.0, (self.step + 1) / max(1, self.config.optim.warmup))
        decay = 0.5 * (1 + math.cos(math.pi * self.step / self.config.optim.steps))
        self.optimizer.param_groups[0]["lr"] = self.config.optim.lr * warm * (0.05 + 0.95 * decay)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rate = 1 - min(self.config.optim.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.bare().parameters()], rate)

    def bare(self) -> SparseWan:
        return self.accelerator.unwrap_model(self.student)

    def student_with_average(self) -> Student:
        """The averaged student as it is saved and validated: its own copy of the weights."""
        model = SparseWan(type(self.bare().transformer).from_config(self.bare().config), self.bare().tile)
        model.load_state_dict(self.bare().state_dict())
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), self.ema):
                parameter.copy_(average)
        m = self.config.model
        sampling = {
            "height": m.height, "width": m.width, "num_frames": m.num_frames, "num_inference_steps": m.num_inference_steps,
            "max_sequence_length": m.max_sequence_length, "flow_shift": m.flow_shift, "guidance_folded_in": m.guidance_scale,
        }  # fmt: skip
        if steps := list(self.config.distill.student_timesteps):
            sampling |= {"student_timesteps": steps, "num_inference_steps": len(steps)}
        training = {"steps": self.step, "policy": self.config.policy.name, "seed": self.config.seed, "commit": commit()}
        model = model.to(self.device).eval().requires_grad_(False)
        return Student(model, self.current_plan(), sampling, training)

    def fail(self, what: str) -> None:
        """Stop on a non-finite step. The last checkpoint stands; a report says what was seen."""
        last = "The last good checkpoint is in" if (self.folder / "state").exists() else "No checkpoint was written yet to"
        report = {"what": what, "step": self.step, "config": asdict(self.config)}
        path = self.folder / "failure.json"
        path.write_text(json.dumps(report, indent=1))
        raise FloatingPointError(
            f"{what}. {last} {self.folder}/state, the report in {path}. Lower optim.lr or "
            "optim.grad_clip and run again with runtime.resume=auto"
        )


def build(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Pipeline, teacher, student, policy, data, optimiser. All that can be wrong with the settings shows here."""
    if accelerator.num_processes > 1:
        raise SettingError(
            f"num_processes: got {accelerator.num_processes}, accepted: 1; data and noise are not yet split over processes"
        )
    run = Run(config, accelerator)
    prepare_folder(run.folder)
    m = config.model
    run.pipe = load_pipeline(m.path, device=str(run.device))
    transformer = run.pipe.transformer
    tile = Tile(*m.tile)
    run.teacher = SparseWan(transformer, tile).eval().requires_grad_(False)
    copy = type(transformer).from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    torch.manual_seed(config.seed)
    student = SparseWan(copy, tile)
    if config.runtime.gradient_checkpointing:
        copy.enable_gradient_checkpointing()
    run.num_layers = student.num_layers
    latent_shape = _latent_shape(run.pipe, m)
    layout = tile_layout(student.grid_of(latent_shape), tile)
    shape = ModelShape.of(transformer.config, m.max_sequence_length)
    costs = rung_costs(shape, layout)
    run.costs, run.shape, run.layout = dict(zip(RUNGS, costs)), shape, layout
    if min(costs) > config.policy.budget:
        raise SettingError(
            f"policy.budget: got {config.policy.budget}, but the sparsest rung still costs {min(costs):.3f} of a dense forward at "
            f"this size; accepted: {min(costs):.3f} to 1"
        )
    run.edges = timestep_bins(config.policy.bins, m.flow_shift)
    run.policy = make_policy(config, run.edges, run.num_layers, costs)
    groups = [{"params": list(student.parameters()), "lr": config.optim.lr, "weight_decay": config.optim.weight_decay}]
    if isinstance(run.policy, torch.nn.Module):
        groups.append({"params": list(run.policy.parameters()), "lr": config.policy.lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=tuple(config.optim.betas))
    run.student, run.optimizer = accelerator.prepare(student, optimizer)
    run.ema = [p.detach().clone() for p in run.bare().parameters()]
    data = dict(latent_shape=latent_shape, model=m.path)
    run.data = ShardDataset(config.data.path, config.optim.batch_size, config.seed, drop_text=config.data.drop_text, **data)
    run.validation = ShardDataset(config.data.path, config.data.validation_clips, split="val", drop_text=0.0, shuffle=False, repeat=False, **data)  # fmt: skip
    run.empty = run.data.empty.to(run.device)
    warm_start(run, config)
    return run


def warm_start(run: Run, config: TrainConfig) -> None:
    """Weights, and with policy=inherit the plan, of the student that distill.init names; the critic where there is one."""
    d = config.distill
    if d.init is not None:
        start = load_student(d.init, run.pipe.transformer)
        run.bare().load_state_dict(start.model.state_dict())
        run.ema = [p.detach().clone() for p in run.bare().parameters()]
        if config.policy.name == "inherit":
            run.plan = start.plan
            run.edges = start.plan.edges
    if d.distribution:
        model = SparseWan(type(run.pipe.transformer).from_config(run.pipe.transformer.config), run.teacher.tile)
        model.load_state_dict(run.teacher.state_dict())
        run.critic = Critic(model.to(run.device), d.critic_lr, config.model.flow_shift)


def make_policy(config: TrainConfig, edges, num_layers: int, costs):
    """The policy that the settings name."""
    p = config.policy
    if p.name in ("static", "inherit"):  # inherit: run.plan is fixed before the first step
        return StaticPolicy(edges, num_layers, costs)
    if p.name == "entropy":
        return EntropyPolicy(edges, num_layers, costs, p.gamma)
    return GumbelPolicy(edges, num_layers, costs, p.probes, p.tau_start, p.entropy_bonus)


def prepare_folder(folder: Path) -> None:
    """Make the output folder and prove that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise SettingError(f"output_dir={folder}: cannot be written ({error.strerror}); give a folder you may write to") from None


def _latent_shape(pipe, m) -> tuple[int, ...]:
    space, time_ = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    patch = pipe.transformer.config.patch_size
    for name, value, step in (("height", m.height, space * patch[1]), ("width", m.width, space * patch[2])):
        if value % step:
            raise SettingError(f"model.{name}: got {value}, accepted: multiples of {step}, e.g. {max(step, round(value / step) * step)}")
    if (m.num_frames - 1) % time_:
        nearest = (m.num_frames - 1) // time_ * time_ + 1
        raise SettingError(f"model.num_frames: got {m.num_frames}, accepted: multiples of {time_} plus 1, e.g. {nearest}")
    return (pipe.transformer.config.in_channels, (m.num_frames - 1) // time_ + 1, m.height // space, m.width // space)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(run: Run) -> Path:
    """Write student and trainer state; what stood before stands until both are complete."""
    save_student(run.folder / "student", run.student_with_average())
    policy = run.policy.state_dict()
    state = {
        "step": run.step, "running": run.running, "student": run.bare().state_dict(), "ema": run.ema,
        "optimizer": run.optimizer.state_dict(), "policy": policy, "data": run.data.state_dict(),
        "plan": None if run.plan is None else run.plan.to_dict(), "steps": run.config.optim.steps,
        "critic": None if run.critic is None else run.critic.state_dict(),
    }  # fmt: skip

    def write(folder: Path) -> None:
        save_file_atomic(folder / "trainer.pt", state)

    atomic_folder(run.folder / "state", write)
    return run.folder / "student"


def resume(run: Run) -> None:
    """Go on from the folder's state when resume=auto finds one, or from the folder that resume names."""
    wish = run.config.runtime.resume
    if wish == "never":
        return
    folder = run.folder / "state" if wish == "auto" else Path(wish)
    settle(folder)
    file = folder / "trainer.pt"
    if not file.exists():
        if wish != "auto":
            raise CheckpointError(f"runtime.resume={wish}: no trainer.pt there; accepted: auto, never, or a run's state folder")
        return
    try:
        state = torch.load(file, weights_only=True, map_location=run.device)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{file}: damaged ({type(error).__name__}); delete {folder} to start again") from None
    if state["steps"] != run.config.optim.steps:
        raise CheckpointError(
            f"{folder}: belongs to a run of {state['steps']} steps, this one has {run.config.optim.steps}, and schedules would "
            "differ; use the same optim.steps, another output_dir, or runtime.resume=never"
        )
    try:
        run.bare().load_state_dict(state["student"])
        run.policy.load_state_dict(state["policy"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.critic is not None:
            run.critic.load_state_dict(state["critic"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: of another model or policy ({str(error).splitlines()[0]}); use another output_dir") from None
    run.data.load_state_dict(state["data"])
    run.ema, run.step, run.running = state["ema"], state["step"], state["running"]
    run.plan = None if state["plan"] is None else SparsityPlan.from_dict(state["plan"])


# ---- logging and validation ------------------------------------------------------------------------------------------


def log_step(run: Run, record: Record, tracker) -> None:
    """Scalars every `logger.every` steps."""
    if run.step % run.config.logger.every and run.step != 1:
        return
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else _resident_gib()
    policy = {f"gates/{k}": v for k, v in run.policy.summary().items()} if run.plan is None else {}
    tracker.scalars(run.step, {**record.values, **policy, "system/memory_gib": memory})


def _resident_gib() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return float("nan")


def _reference(run: Run, x_t: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """What a held-out velocity is measured against: the teacher's, or for consistency the way to the end of the teacher's flow."""
    m, d = run.config.model, run.config.distill
    velocity = distill.guided_velocity(run.teacher, x_t, 1000 * sigma, text, run.empty, m.guidance_scale)
    if d.name == "velocity":
        return velocity
    x, now, count = x_t, sigma, max(1, round(float(flow.unshift_sigma(sigma, m.flow_shift).mean()) * d.solver_steps))
    u = flow.unshift_sigma(sigma, m.flow_shift)
    for left in range(count, 0, -1):
        following = flow.shift_sigma(u * (left - 1) / count, m.flow_shift)
        x, now = distill.solver_step(x, velocity, now, following), following
        if left > 1:
            velocity = distill.guided_velocity(run.teacher, x, 1000 * now, text, run.empty, m.guidance_scale)
    return (x_t - x) / flow.expand(sigma, x_t)


@torch.no_grad()
def velocity_error(run: Run, student: Student) -> dict[str, float]:
    """Held-out ‖student − wanted‖² / ‖wanted‖² under the plan, by timestep bin and on average; wanted: see `_reference`.

    Clips, noise and timesteps are the same for every call, method and run.
    """
    if not hasattr(run, "references"):
        run.references = []
        batch = next(iter(run.validation))
        x0, text = batch["latents"].to(run.device), batch["text"].to(run.device)
        for index in range(len(run.edges)):
            generator = torch.Generator().manual_seed(index)
            u = (index + (torch.arange(len(x0)) + 0.5) / len(x0)) / len(run.edges)
            sigma = flow.shift_sigma(u, run.config.model.flow_shift).to(run.device)
            x_t = flow.interpolate(x0, torch.randn(x0.shape, generator=generator).to(run.device), sigma)
            wanted = _reference(run, x_t, sigma, text)
            run.references.append((x_t, 1000 * sigma, text, wanted))
    errors = {}
    for index, (x_t, timestep, text, wanted) in enumerate(run.references):
        velocity, _ = student.model(x_t, timestep, text, student.plan.rungs[index])
        errors[f"validation_by_noise/bin_{index}"] = float((velocity - wanted).square().mean() / wanted.square().mean())
    return {"validation/velocity_error": sum(errors.values()) / len(errors), **errors}


def validate(run: Run, tracker) -> dict[str, float]:
    """Held-out error of the averaged student under the plan it would be saved with; pictures and, at the end, videos."""
    student = run.student_with_average()
    values = velocity_error(run, student)
    values["validation/plan_cost"] = plan_cost(student.plan, run.shape, run.layout)
    values["validation/plan_density"] = student.plan.density(run.layout.num_blocks)
    values["validation/plan_merged"] = student.plan.merged()
    tracker.scalars(run.step, values)
    table = [[DENSITY_LADDER[r.density] for r in row] for row in student.plan.rungs]
    tracker.heatmap(run.step, "sparsity/density_map", list(zip(*table)), "layer", "timestep bin")
    table = [[MERGE_LADDER[r.merge] for r in row] for row in student.plan.rungs]
    tracker.heatmap(run.step, "sparsity/merged_map", list(zip(*table)), "layer", "timestep bin")
    if run.config.logger.videos and run.step == run.config.optim.steps:
        side_by_side(run, student, tracker)
    return values


def side_by_side(run: Run, student: Student, tracker, count: int = 2) -> None:
    """Validation videos teacher | student for the same prompts, seeds and timesteps as inference uses."""
    batch = next(iter(run.validation))
    prompts, seeds = batch["captions"][:count], list(range(count))
    dense = generate(run.pipe, run.config.model, prompts, seeds).videos
    enable(run.pipe, student)
    try:
        sparse = generate(run.pipe, run.config.model, prompts, seeds, num_inference_steps=student.sampling["num_inference_steps"]).videos
    finally:
        disable(run.pipe)
    for i, prompt in enumerate(prompts):
        path = run.folder / "validation" / f"step{run.step:06d}_{i}.mp4"
        write_mp4(path, torch.cat([dense[i], sparse[i]], dim=-1), scale=2)
        tracker.video(run.step, f"validation/video_{i}", path, f"teacher | student: {prompt}")
    rows = [(f"{who}: {p}", v[i]) for i, p in enumerate(prompts) for who, v in (("teacher", dense), ("student", sparse))]
    contact_sheet(run.folder / "validation" / f"step{run.step:06d}.png", rows)
