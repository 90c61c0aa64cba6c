"""Train a sparse student of a video diffusion transformer, with the policy that decides how sparse.

    accelerate launch train.py                          # experiment=usv_mini: the embedded model, on any laptop
    accelerate launch train.py policy=static optim.steps=300

Each step: a batch at noise levels of one timestep bin -> the policy decides a rung for every layer -> student and guided dense teacher
give velocities -> their distance, and the policy's own loss under the compute budget -> one backward, one optimiser step.
With distill=consistency the student learns where the teacher's flow ends, for few steps; distill=few_step adds distribution matching.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from accelerate import Accelerator
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from tqdm import tqdm

from usv import distill, flow, matching
from usv.config import SettingError, TrainConfig, check_overrides, check_train, config_groups, typed
from usv.cpu import keep_freed_memory
from usv.dry_run import report
from usv.models.wan import Probe
from usv.plan import bin_of
from usv.tracking import Tracker
from usv.training import Run, budget_at, build, log_step, precision, resume, save, temperature_at, validate

ROOT = Path(__file__).resolve().parent
ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def train(config: TrainConfig) -> Path:
    """The whole job; returns the student's folder."""
    keep_freed_memory()
    accelerator = Accelerator(mixed_precision=precision(config))
    run = build(config, accelerator)
    tracker = Tracker(config.logger, run.folder, asdict(config), run.folder.name)
    resume(run)
    stop = {"asked": False}
    signal.signal(signal.SIGINT, lambda *_: stop.update(asked=True))  # Ctrl-C: finish the step, save, leave
    bar = tqdm(total=config.optim.steps, initial=run.step, desc=run.folder.name, dynamic_ncols=True)
    saved = time.monotonic()
    batches = iter(run.data)
    while run.step < config.optim.steps and not stop["asked"]:  # a batch taken is trained on: the data's position is saved
        record = step(run, next(batches), accelerator)
        run.step += 1
        bar.update(1)
        bar.set_postfix(record.brief())
        log_step(run, record, tracker)
        if run.step % config.logger.validate_every == 0 or run.step == config.optim.steps:
            validate(run, tracker)
        if time.monotonic() - saved > config.runtime.checkpoint_seconds:
            save(run)
            saved = time.monotonic()
    bar.close()
    student = save(run)
    tracker.close()
    state = "stopped, resume=auto goes on" if run.step < config.optim.steps else "finished"
    print(f"{state} at step {run.step}; student: {student}")
    return student


def step(run: Run, batch: dict, accelerator: Accelerator):
    """One optimiser step."""
    config, record = run.config, run.record()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + run.step)
    x0, text = batch["latents"].to(run.device), batch["text"].to(run.device)

    # 1. noise levels within one bin, so that the whole batch runs one plan of static shape
    u = (run.bin_order(run.step) + flow.stratified_uniform(len(x0), generator)) / len(run.edges)
    sigma = flow.shift_sigma(u, config.model.flow_shift).to(run.device)
    noise = torch.randn(x0.shape, generator=generator).to(run.device)
    x_t, timestep = flow.interpolate(x0, noise, sigma), 1000 * sigma

    # 2. how sparse
    target_cost = budget_at(run.step, config)
    decisions = run.decide(bin_of(float(timestep[0]), run.edges), target_cost, temperature_at(run.step, config), generator)
    probes = {p.layer: Probe(p.other, torch.tensor(0.5, device=run.device, requires_grad=True)) for p in decisions.probes}

    # 3. teacher and student at the same point, through the same code
    with accelerator.autocast():
        wanted = distill.guided_velocity(run.teacher, x_t, timestep, text, run.empty, config.model.guidance_scale)
        if config.distill.name == "consistency":
            following = flow.shift_sigma((u - 1 / config.distill.solver_steps).clamp_min(0), config.model.flow_shift).to(run.device)
            ask = lambda x, s: run.student(x, 1000 * s, text, decisions.rungs, None, config.attention.impl)[0]  # noqa: E731
            wanted = distill.consistency_velocity(ask, wanted, x_t, sigma, following)
        velocity, stats = run.student(x_t, timestep, text, decisions.rungs, probes, config.attention.impl)
        loss = distill.velocity_loss(velocity, wanted).mean()
        samples = None
        if config.distill.distribution:  # the student's own samples, judged by teacher and critic
            call = lambda x, t: run.student(x, t, text, run.rungs_at(float(t[0]), generator), None, config.attention.impl)[0]  # noqa: E731
            samples = matching.rollout(call, noise, matching.random_rollout(config.distill.student_timesteps, generator))
            judged = run.critic.loss(samples, text, run.empty, run.teacher, config.model.guidance_scale, generator)
            loss = loss + config.distill.distribution * judged
    policy_loss = run.policy_loss(target_cost)

    # 4. one backward for both
    accelerator.backward(loss if policy_loss is None else loss + policy_loss)
    norm = accelerator.clip_grad_norm_(run.student.parameters(), config.optim.grad_clip)
    if not math.isfinite(loss.item() + float(norm)):
        run.fail(f"loss {loss.item()}, gradient norm {float(norm)} at step {run.step}, timestep bin {decisions.bin}")
    run.observe(decisions, probes, stats, loss.item())
    run.optimizer_step(policy_loss)
    if samples is not None:
        for _ in range(config.distill.critic_updates):
            critic_loss = run.critic.update(samples.detach(), text, generator)
    record.fill(loss=loss.item(), norm=float(norm), decisions=decisions, stats=stats, target_cost=target_cost)
    if samples is not None:
        record.values |= {"loss/distribution": judged.item(), "loss/critic": critic_loss}
    return record


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    try:
        settings = typed(config, TrainConfig)
        check_train(settings)
        if settings.dry_run:
            report(settings)
        else:
            train(settings)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    try:
        check_overrides(sys.argv[1:], TrainConfig, config_groups(ROOT / "conf"))
    except SettingError as error:
        sys.exit(f"SettingError: {error}")
    main()
