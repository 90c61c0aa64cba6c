"""A run on disk: student/ to use, state/ to go on from, checkpoints/ kept, best/. On the roof: train.py and its rooms use it.

Each folder is written beside its name and renamed when complete, so a kill, an error or a full disk at any moment leaves the
one before. state/trainer.pt holds whole tensors by name: any runtime on any number of ranks goes on from it (usv/training/ranks.py).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from usv.objectives import of_older
from usv.policy.fixed import EntropyPolicy
from usv.policy.gumbel import GumbelPolicy
from usv.sampling.checkpoint import CheckpointError, atomic_folder, save_file_atomic, save_student, settle
from usv.sparse.plan import SparsityPlan


def policy_tables(policy) -> dict:
    """What a policy has learned, as it stands in a student's config.json: the probabilities of its gates, bins × layers × rungs, and
    the damage a jump of each bin's step stands for (`known_jump_damage`); entropies of bins × layers. The plan is decoded from the
    damages of rungs too, which are in the trainer's state."""
    if isinstance(policy, GumbelPolicy):
        with torch.no_grad():
            density, merge = policy.probabilities()
            steps = {"run": policy.run_probability().tolist(), "jump_damage": policy.known_jump_damage().tolist()} if policy.steps else {}
        return {"name": "gumbel", "density": density.tolist(), "merge": merge.tolist(), **steps}
    if isinstance(policy, EntropyPolicy):
        return {"name": "entropy", "entropy": policy.entropy.tolist()}
    return {"name": "static"}


def settings_of(config) -> dict:
    """What a run cannot change half way: how sparsity is decided and what the student is trained towards."""
    return {f"{part}.{name}": value for part in ("policy", "objective") for name, value in asdict(getattr(config, part)).items()}


def save(run) -> Path:
    """Write student and trainer state, from all ranks together; rank 0 writes."""
    student = run.student_with_average("cpu")
    state = {
        "expert": run.config.model.expert, "step": run.step, "running": run.running, "skipped": run.skipped, "student": run.engine.weights(trained=True),
        "ema": run.engine.weights(averaged=True, trained=True), "optimizer": run.engine.moments(),
        "policy": run.policy.state_dict(), "data": run.data.state_dict(), "best": run.best,
        "policy_optimizer": None if run.policy_optimizer is None else run.policy_optimizer.state_dict(),
        "plan": None if run.plan is None else run.plan.to_dict(), "steps": run.config.optim.steps,
        "objective": run.objective.state_dict(), "settings": settings_of(run.config),
    }  # fmt: skip
    if run.ranks.first:
        save_student(run.folder / "student", student)
        atomic_folder(run.folder / "state", lambda folder: save_file_atomic(folder / "trainer.pt", state))
        if run.config.runtime.keep:
            keep(run.folder, run.step, run.config.runtime.keep)
    run.ranks.wait()
    return run.folder / "student"


def save_best(run, student, error: float) -> None:
    """Keep the student of the lowest held-out error in best/; rank 0 only."""
    if run.best is None or error < run.best:
        run.best = error
        save_student(run.folder / "best", student)


def keep(folder: Path, step: int, count: int) -> None:
    """Keep student and state of this step in checkpoints/step-…, by hard links, and of those before the last `count`."""
    target = folder / "checkpoints" / f"step-{step:07d}"

    def write(fresh: Path) -> None:
        for name in ("student", "state"):
            shutil.copytree(folder / name, fresh / name, copy_function=_link)

    atomic_folder(target, write)
    for old in sorted((folder / "checkpoints").glob("step-*"))[:-count]:
        shutil.rmtree(old)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # files are never changed in place, only replaced
    except OSError:
        shutil.copy2(source, target)


def resume(run) -> None:
    """Go on from the folder's state when resume=auto finds one, or from the folder that resume names."""
    wish = run.config.runtime.resume
    if wish == "never":
        return
    folder = run.folder / "state" if wish == "auto" else Path(wish)
    if run.ranks.first:
        settle(folder)
    run.ranks.wait()
    file = folder / "trainer.pt"
    if not file.exists():
        if wish != "auto":
            raise CheckpointError(
                f"runtime.resume={wish}: no trainer.pt there; accepted: auto, never, or a run's state folder"
            )
        return
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{file}: damaged ({type(error).__name__}); delete {folder} to start again") from None
    if state["steps"] != run.config.optim.steps:
        raise CheckpointError(
            f"{folder}: belongs to a run of {state['steps']} steps, this one has {run.config.optim.steps}, and schedules would "
            "differ; use the same optim.steps, another output_dir, or runtime.resume=never"
        )
    mine = settings_of(run.config)
    changed = [f"{name} is {theirs} there and {mine[name]} here" for name, theirs in of_older(state.get("settings", {})).items() if name in mine and mine[name] != theirs]
    if changed:
        raise CheckpointError(f"{folder}: of a run with other settings ({'; '.join(changed)}); use the same, another output_dir, or runtime.resume=never")
    if state.get("expert") != run.config.model.expert:
        raise CheckpointError(f"{folder}: of the expert {state.get('expert')}, this run trains {run.config.model.expert}; use another output_dir")
    try:
        run.engine.load_weights(state["student"], state["ema"])
        run.engine.load_moments(state["optimizer"])
        run.policy.load_state_dict(state["policy"])
        if run.policy_optimizer is not None:
            run.policy_optimizer.load_state_dict(state["policy_optimizer"])
        critic = state.get("critic")  # where it lay before there were objectives
        run.objective.load_state_dict(state.get("objective", {} if critic is None else {"critic": critic}))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: of another model or policy ({str(error).splitlines()[0]}); use another output_dir"
        ) from None
    run.data.load_state_dict(state["data"])
    run.step, run.running, run.skipped, run.best = (state[name] for name in ("step", "running", "skipped", "best"))
    run.plan = None if state["plan"] is None else SparsityPlan.from_dict(state["plan"])
