"""Train a sparse student of a video diffusion transformer, with the policy that decides how sparse.

    accelerate launch train.py                          # experiment=usv_mini: the embedded model, on any laptop
    accelerate launch train.py policy=static optim.steps=300

Each step: a batch at noise levels of one timestep bin -> the policy decides a rung for every layer, under the compute budget -> student and
guided dense teacher give velocities -> their distance -> one backward, one optimiser step, and what it says of the rungs to the policy.
What is wanted of the student is its objective's to say (usv/objectives): velocity, or for few steps consistency, trajectory, distribution.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from tqdm import tqdm

from usv import flow
from usv.config import SettingError, TrainConfig, check_overrides, check_train, config_groups, typed
from usv.cpu import keep_freed_memory, use_all_cores
from usv.models.forward import Probe
from usv.objectives import check_objective, rollout
from usv.objectives.protocol import Point, Prompt
from usv.sparse.plan import bin_of
from usv.training.build import build
from usv.training.dry_run import report
from usv.training.ranks import RankError, launched, lost_ranks, start
from usv.training.remote import masked_settings
from usv.training.resume import folder_of, next_or_save, resume, save
from usv.training.run import Run, budget_at, log_step, mean_of_parts
from usv.training.stop import Stop, stopping
from usv.training.tracking import Silent, Tracker
from usv.training.validation import validate

ROOT = Path(__file__).resolve().parent
ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def train(config: TrainConfig, stop: Stop | None = None) -> Path:
    """The whole job; returns the student's folder. stop: notes the signal that ended it early."""
    keep_freed_memory()
    accelerator, ranks = start(config)
    use_all_cores(config.runtime.threads)
    stop = stop or Stop()
    with folder_of(config, ranks):
        run = build(config, accelerator, ranks)
        resume(run)
        settings = masked_settings(asdict(config))
        tracker = Tracker(config.logger, run.folder, settings, run.folder.name, run.step) if ranks.first else Silent()
        try:
            with stopping(stop):
                return loop(run, tracker, stop)
        finally:
            tracker.close()


def loop(run: Run, tracker, stop: Stop) -> Path:
    """All steps that are left, with log, checkpoints and validation; returns the student's folder."""
    config, ranks, begun = run.config, run.ranks, run.step
    bar = tqdm(total=config.optim.steps, initial=run.step, desc=run.folder.name, dynamic_ncols=True, disable=not ranks.first)
    saved, stopped = time.monotonic(), False
    batches = iter(run.data)
    for number, batch in enumerate(islice(batches, 0 if begun else run.objective.warm_up)):  # what is trained beside the student, before its first step
        run.objective.update(run, run.clips(batch), torch.Generator().manual_seed(-1 - config.seed * 1_000_003 - number))
    while run.step < config.optim.steps and not stopped:  # a batch taken is trained on: the data's position is saved
        record = step(run, next_or_save(run, batches))
        run.step += 1
        bar.update(1)
        bar.set_postfix(record.brief())
        log_step(run, record, tracker)
        stopped, due = ranks.any(stop.asked, time.monotonic() - saved > config.runtime.checkpoint_seconds)
        validating = run.step % config.logger.validate_every == 0 or run.step == config.optim.steps
        if (due or validating) and not run.skipped_in_a_row:  # saved before it is looked at: what fails there loses nothing
            save(run)
            saved = time.monotonic()
        if validating:
            validate(run, tracker)
    bar.close()
    student = run.folder / "student"
    if any(ranks.any(run.step > begun and run.saved != run.step, not student.exists())):  # a run that was finished before stays as it was
        save(run)
    state = "stopped, resume=auto goes on" if run.step < config.optim.steps else "finished"
    if ranks.first:
        print(f"{state} at step {run.step}; student: {student}" + (f"; {run.skipped} steps skipped" if run.skipped else ""))
    return student


def step(run: Run, batch: dict):
    """One optimiser step."""
    config, objective, record = run.config, run.objective, run.record()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + run.step)
    clips = run.clips(batch)

    # 1. noise levels within one bin, so that the whole batch runs one plan of static shape; the objective may ask elsewhere
    index = run.bin_order(run.step)
    sigma = run.levels(index, flow.stratified_uniform(len(clips.latents), generator, run.share)).to(run.device)
    noise = flow.normal(clips.latents.shape, generator, run.share).to(run.device)
    middle = float(run.levels(index, torch.tensor([0.5]))[0])  # a clip may lie on the edge of its bin
    target_cost = budget_at(run.step, config)
    run.policy.set_budget(target_cost)  # the rollouts that make the point run at this step's budget, too
    with run.engine.autocast():
        point = objective.point(run, Point(flow.interpolate(clips.latents, noise, sigma), sigma, clips.prompt, noise, middle), generator)

    # 2. how sparse
    decisions = run.decide(bin_of(1000 * point.level, run.edges), target_cost, generator, point.x, point.prompt.text)
    probes = {p.layer: Probe(p.other, run.half(decisions)) for p in decisions.probes}

    # 3. what is wanted and what the student gives at the same point, through the same code; in as many parts as optim.accumulate says
    losses, seen, sizes, drawn = [], [], [], generator.get_state()
    for part, there in run.parts(clips, point):
        generator.set_state(drawn)  # what is drawn holds for all clips of the step
        with run.engine.autocast():
            wanted = objective.target(run, there, decisions, generator)
            velocity, stats = run.student(there.x, 1000 * there.sigma, there.prompt.text, decisions.rungs, probes, config.attention.impl, **there.prompt.conditions)
            loss, values = objective.loss(run, part, there, velocity, wanted, generator)
        run.engine.backward(loss)
        losses.append(loss.item())
        sizes.append(wanted.float().square().mean().item())
        seen.append((stats, values))
    stats, values = mean_of_parts(seen)

    # 4. the step; one that is not finite on any rank is skipped on all
    total, norm = run.update(losses)
    if not math.isfinite(norm):
        run.skip(f"loss {total}, gradient norm {norm} at step {run.step}, timestep bin {decisions.bin}")
        record.skip(run.skipped)
        return record
    run.observe(decisions, probes, stats, sum(sizes) / len(sizes))
    if run.decides_steps() and run.step % config.policy.jump_every == 0:  # one candidate step: rollouts with it, without and dense, judged by the teacher
        with run.engine.autocast():
            probe_step(run, noise, point.prompt, generator)

    # 5. what is trained beside the student
    values |= objective.update(run, clips, generator)
    record.fill(loss=total, norm=norm, decisions=decisions, stats=stats, target_cost=run.forward_target(target_cost))
    record.values |= values
    return record


def probe_step(run: Run, noise: torch.Tensor, prompt: Prompt, generator: torch.Generator) -> None:
    """Tell the policy what jumping one of its candidate steps does to the student's samples."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    steps, bin = run.policy.decide_steps(generator), int(torch.randint(len(run.edges) - 1, (1,), generator=generator))
    steps = tuple(runs or i == bin for i, runs in enumerate(steps))
    rows = {i: run.rungs_at(edge, generator) for i, edge in enumerate(run.edges)}
    call, dense = run.sparse(prompt, lambda t: rows[bin_of(t, run.edges)]), run.sparse(prompt, lambda t: None)
    judge = lambda x0: run.ranks.mean([rollout.teacher_residual(  # noqa: E731
        x0, prompt.text, run.empty, run.teacher, run.config.model.guidance_scale, torch.Generator().manual_seed(seed), share=run.share, conditions=prompt.conditions
    )])[0]  # the whole batch's: a mean of quotients is not the quotient of means
    damages = rollout.jump_damage(call, dense, judge, noise, run.edges, steps, bin)
    if all(map(math.isfinite, damages)):  # one that is not would stay in the running means
        run.policy.observe_jump(bin, *damages, {i: row for i, row in rows.items() if steps[i]})


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    try:
        settings = typed(config, TrainConfig)
        check_train(settings)
        check_objective(settings)
        if settings.dry_run:
            report(settings)
        else:
            stop = Stop()
            with lost_ranks(launched()):
                train(settings, stop)
            if stop.status:
                sys.exit(stop.status)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except RankError as error:
        print(f"RankError: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # leaving the ordinary way waits for the process that is gone


if __name__ == "__main__":
    try:
        check_overrides(sys.argv[1:], TrainConfig, config_groups(ROOT / "conf"))
    except SettingError as error:
        sys.exit(f"SettingError: {error}")
    main()
