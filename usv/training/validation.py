"""What a run's student is worth so far: held-out error, videos beside the teacher's. On the roof: only train.py imports it."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from usv import flow
from usv.metrics import flicker, psnr, subject_consistency
from usv.models import lora
from usv.objectives.protocol import Prompt
from usv.objectives.regression import velocity_loss
from usv.sampling.checkpoint import Student
from usv.sampling.enable import disable, enable
from usv.sampling.generate import generate
from usv.sparse.cost import plan_cost
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER
from usv.sparse.sequence_parallel import alone
from usv.training.resume import save_best
from usv.training.run import Run
from usv.video import contact_sheet, magnified, write_mp4


@torch.no_grad()
def references(run: Run) -> list[tuple]:
    """Held-out inputs and what is wanted there: (name, x_t, timestep, prompt, wanted), one a noise level, made once.

    A few-step student is asked at its own timesteps, in every bin while its policy still learns which those are. Clips, noise and
    timesteps are the same for every call, method and run.
    """
    decided = run.plan.student_timesteps() if run.plan is not None else []
    ladder = decided if run.config.policy.steps else run.config.objective.student_timesteps
    if getattr(run, "asked_at", None) != ladder:
        run.references, run.asked_at = [], ladder
        batch = next(iter(run.validation))
        x0, prompt = batch["latents"].to(run.device), run.prompt(batch)
        places = (torch.arange(len(x0)) + 0.5) / len(x0)
        taught = run.guided if run.guide_timesteps else run.taught  # who adapts a student of few steps is held to that student
        for index in range(len(ladder or run.edges)):
            generator = torch.Generator().manual_seed(index)
            sigma = torch.full((len(x0),), ladder[index] / 1000) if ladder else run.levels(index, places)
            sigma = sigma.to(run.device)
            x_t = flow.interpolate(x0, torch.randn(x0.shape, generator=generator).to(run.device), sigma)
            with alone(getattr(run.teacher, "student", run.teacher), *([] if run.guide is None else [run.guide.model])):  # only rank 0 is here
                wanted = torch.cat([run.objective.reference(taught(asked), x, s) for x, s, asked in parts(run, x_t, sigma, prompt)])
            run.references.append((f"t_{ladder[index]:.0f}" if ladder else f"bin_{index}", x_t, 1000 * sigma, prompt, wanted))
    return run.references


def parts(run: Run, *tensors: torch.Tensor | Prompt):
    """Tensors and prompts of one length in turn in pieces of as many clips as a training step has: validation needs no more memory for its forwards."""
    return zip(*(tensor.split(run.clips_at_once) for tensor in tensors))


@torch.no_grad()
def velocity_error(run: Run, student: Student) -> dict[str, float]:
    """Held-out ‖student − wanted‖² / ‖wanted‖² under the plan, by timestep bin and on average, at `references`.

    weighted_error: both sums weighted by how far the sampler goes there, as in the loss.
    """
    errors, weighted = {}, torch.zeros(2)
    for name, x_t, timestep, prompt, wanted in references(run):
        row = student.plan.at(float(timestep[0]))
        velocity = torch.cat([student.model(x, t, asked.text, row, **asked.conditions)[0] for x, t, asked in parts(run, x_t, timestep, prompt)])
        both = torch.stack([velocity_loss(velocity, wanted), velocity_loss(wanted, torch.zeros_like(wanted))])
        errors[f"validation_by_noise/{name}"] = float(both[0].mean() / both[1].mean())
        weighted += (both * flow.slope(timestep / 1000, run.config.model.flow_shift)).mean(1).cpu()
    mean = sum(errors.values()) / len(errors)
    return {"validation/velocity_error": mean, "validation/weighted_error": float(weighted[0] / weighted[1]), **errors}


def validate(run: Run, tracker) -> dict[str, float]:
    """Held-out error of the averaged student under the plan it would be saved with; pictures and, at the end, videos."""
    if run.ranks.first:
        with run.engine.autocast():
            references(run)  # before there is another network on the device
    student = run.student_with_average()
    if student is None:
        run.ranks.wait()
        return {}
    with run.engine.autocast():
        values = velocity_error(run, student)
        for budget in run.config.policy.budgets:  # both ends of a dial
            at_end = velocity_error(run, replace(student, plan=run.policy.decode(budget)))
            values[f"validation/weighted_error_at_{budget:g}"] = at_end["validation/weighted_error"]
    plan = student.executed_plan()
    values["validation/plan_cost"] = plan_cost(plan, run.shape, run.layout)
    if steps := student.plan.steps:  # what policy.budget bounds: the whole sampling, in dense forwards at every candidate step
        values["validation/sampling_cost"] = values["validation/plan_cost"] * sum(steps) / len(steps)
    values["validation/plan_density"] = plan.density(run.layout.num_blocks)
    values["validation/plan_merged"] = plan.merged()
    tracker.scalars(run.step, values)
    table = [[DENSITY_LADDER[r.density] for r in row] for row in student.plan.rungs]
    tracker.heatmap(run.step, "sparsity/density_map", list(zip(*table)), "layer", "timestep bin")
    table = [[MERGE_LADDER[r.merge] for r in row] for row in student.plan.rungs]
    tracker.heatmap(run.step, "sparsity/merged_map", list(zip(*table)), "layer", "timestep bin")
    if run.config.runtime.keep and not run.decides_steps():  # until then other timesteps are asked
        save_best(run, student, values["validation/velocity_error"])
    videos = run.config.logger.videos and run.pipe.vae is not None and run.config.model.expert is None  # one of two makes none
    if videos and run.step == run.config.optim.steps:
        try:
            side_by_side(run, student, tracker)
        except Exception as error:  # out of memory while decoding, a file in the way: the student is saved, and a picture is no reason to end
            print(f"validation: no videos at step {run.step} ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})", file=sys.stderr)
    run.ranks.wait()
    return values


def measured(metric, *videos: torch.Tensor) -> torch.Tensor:
    """(N,) values of N clips; NaN where they are too short or small for the metric, which is no reason to end a run."""
    try:
        return metric(*videos)
    except ValueError:
        return torch.full((len(videos[0]),), float("nan"))


def side_by_side(run: Run, student: Student, tracker, count: int = 2) -> None:
    """Validation videos teacher | student for the same prompts, seeds and timesteps as inference uses."""
    batch = next(iter(run.validation))
    prompts = batch["captions"][:count]
    seeds = list(range(len(prompts)))
    embedded = {} if run.pipe.text_encoder is not None else {"embeds": batch["text"][:count], "empty": run.empty}
    if "conditions" in batch:
        embedded["conditions"] = {name: value[:count] for name, value in batch["conditions"].items()}
    with lora.base_only(run.pipe.transformer):  # its adapters are the student's, merged into it already, and no style to carry over
        dense = generate(run.pipe, run.config.model, prompts, seeds, run.clips_at_once, **embedded)
        enable(run.pipe, student)
        try:
            sparse = generate(run.pipe, run.config.model, prompts, seeds, run.clips_at_once, num_inference_steps=student.sampling["num_inference_steps"], **embedded)
        finally:
            disable(run.pipe)
    folder, rows, sides = run.folder / "validation", [], (("teacher", dense.videos), ("student", sparse.videos))
    speedup = dense.seconds["denoise"] / sparse.seconds["denoise"]
    quality = {
        "PSNR to teacher": measured(psnr, sparse.videos, dense.videos),
        "consistency": measured(subject_consistency, sparse.videos),
        "flicker": measured(flicker, sparse.videos),
    }
    for i, prompt in enumerate(prompts):
        path = folder / f"step{run.step:06d}_{i}.mp4"
        fps, scale = run.config.model.fps, magnified(dense.videos.shape[-1], 2)
        write_mp4(path, torch.cat([dense.videos[i], sparse.videos[i]], dim=-1), fps, scale)
        tracker.video(run.step, f"validation/video_{i}", path, f"teacher | student: {prompt}")
        files = [folder / f"step{run.step:06d}_{i}_{who}.mp4" for who, _ in sides]
        for file, (_, videos) in zip(files, sides):
            write_mp4(file, videos[i], fps, scale)
        rows.append([prompt, *files, round(speedup, 2), *(round(float(values[i]), 4) for values in quality.values())])
    tracker.table(run.step, "quality/videos", ["prompt", "teacher", "student", "speed-up", *quality], rows)
    contact_sheet(folder / f"step{run.step:06d}.png", [(f"{who}: {p}", v[i]) for i, p in enumerate(prompts) for who, v in sides])
