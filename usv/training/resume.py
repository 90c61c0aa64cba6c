"""A run on disk: student/ to use, state/ to go on from, checkpoints/ kept, best/. On the roof: train.py and its rooms use it.

Each folder is written beside its name and renamed when complete, so a kill, an error or a full disk at any moment leaves the
one before; its checksum lies beside it. state/trainer.pt holds whole tensors by name: any runtime on any number of ranks goes on from it (usv/training/ranks.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from usv.bounds import leaves
from usv.config import SettingError
from usv.files import FileError, atomic_folder, checksum, claimed, reason_of, settle
from usv.objectives import of_older
from usv.policy.dial import carried
from usv.policy.fixed import EntropyPolicy
from usv.policy.gumbel import GumbelPolicy
from usv.sampling.checkpoint import CheckpointError, not_finite, read_config, save_file_atomic, save_student
from usv.sparse.plan import SparsityPlan
from usv.training.ranks import precision
from usv.training.remote import DataError

# where a run's files lie and how it is run may change at any time; what is here and not in SAID may not change half way
FREE = re.compile(
    r"experiment|output_dir|seed|dry_run.*|logger\..*|runtime\..*|model\.(path|fps|weights|experts?|architecture\..*|codec\..*)"
    r"|data\.(path|mix|validation_clips)|attention\..*|optim\.steps"
)  # seed, steps and expert have messages of their own
# may change while a run is not finished, and is said then
SAID = {f"optim.{name}" for name in ("lr", "warmup", "weight_decay", "betas", "grad_clip", "ema", "optimizer", "batch_size", "accumulate")}
SAID |= {"runtime.precision", "data.drop_text"}
OURS = {"student": {"config.json", "student.safetensors"}, "best": {"config.json", "student.safetensors"}, "state": {"trainer.pt", "checksum"}}
LEFT_BY_FILE_BROWSERS = {".DS_Store", "Thumbs.db", "desktop.ini"}
NEVER = "runtime.resume=never begins anew and replaces student/, state/ and best/"


def policy_tables(policy, settings) -> dict:
    """What a policy has learned, as it stands in a student's config.json: the probabilities of its gates, bins × layers × rungs, and
    the damage a jump of each bin's step stands for (`known_jump_damage`); entropies of bins × layers. With the damages of all rungs the
    plan of any budget between `policy.budgets` can be decoded (`usv.policy.dial`)."""
    if isinstance(policy, GumbelPolicy):
        density, merge = (p.double().round(decimals=4).tolist() for p in policy.probabilities())
        steps = {"run": policy.run_probability().tolist(), "jump_damage": policy.known_jump_damage().tolist()} if policy.steps else {}
        return {"name": "gumbel", "density": density, "merge": merge, **steps, **carried(policy, settings.budgets or [settings.budget, 1.0])}
    if isinstance(policy, EntropyPolicy):
        return {"name": "entropy", "entropy": policy.entropy.tolist()}
    return {"name": "static" if settings.name == "inherit" else settings.name}


def settings_of(config) -> dict:
    """What a run is trained under, by dotted name: what cannot change half way, and what is said when it does."""
    settled = {name: list(value) if isinstance(value, tuple) else value for name, value in leaves(config) if not FREE.fullmatch(name)}
    return settled | {"runtime.precision": "bf16" if precision(config) == "bf16" else "fp32"}


@contextmanager
def folder_of(config, ranks) -> Iterator[Path]:
    """The run's folder, held by its first rank as long as the run lasts. SettingError, FileError where another run, or something of the
    user's that a save would replace, is there."""
    folder = Path(config.output_dir)
    with ExitStack() as stack:
        if ranks.first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(claimed(folder))
            except FileError:
                raise
            except OSError as error:
                raise SettingError(f"output_dir={folder}: cannot be written ({reason_of(error)}); give a folder you may write to") from None
            check_ours(folder)
            tidy(folder)
        yield folder


def tidy(folder: Path) -> None:
    """Remove what a run that was killed while it wrote has left: half of a file or folder of ours, under its temporary name."""
    for entry in [*folder.glob(".*"), *folder.glob("checkpoints/.step-*"), *folder.glob("validation/.step*")]:
        if whole := re.fullmatch(r"\.(student|state|best|step-\d+)\.(new|old)", entry.name):
            settle(entry.with_name(whole[1]))
            shutil.rmtree(entry, ignore_errors=True)
        elif re.fullmatch(r"\.(metrics|failure|wandb_id|step\w*)\.\d+\.tmp(\.\w+)?|\.writable\.\d+\.\d+", entry.name):
            entry.unlink(missing_ok=True)


def check_ours(folder: Path) -> None:
    """SettingError where student/, best/ or state/ holds what no run has written: a save replaces the whole folder."""
    for name, files in OURS.items():
        place = folder / name
        settle(place)
        if place.exists() and not (place.is_dir() and {entry.name for entry in place.iterdir()} <= files | LEFT_BY_FILE_BROWSERS):
            raise SettingError(f"output_dir={folder}: {place} is no {name} of a run, and would be replaced by one; move it away, or give another folder")


def save(run) -> Path:
    """Write student and trainer state, from all ranks together; rank 0 writes. CheckpointError where a weight is not finite."""
    student = run.student_with_average("cpu")
    state = {
        "expert": run.config.model.expert, "step": run.step, "wanted": run.wanted, "skipped": run.skipped, "student": run.engine.weights(trained=True),
        "ema": run.engine.weights(averaged=True, trained=True), "optimizer": run.engine.moments(),
        "policy": run.policy.state_dict(), "data": run.data.state_dict(), "best": run.best,
        "plan": None if run.plan is None else run.plan.to_dict(), "steps": run.config.optim.steps,
        "objective": run.objective.state_dict(), "settings": settings_of(run.config), "seed": run.config.seed,
    }  # fmt: skip
    if run.ranks.first:
        if wrong := not_finite(state["student"]):
            raise CheckpointError(f"{run.folder}: not saved at step {run.step}, {wrong}; what stood there before still stands")
        both = [lambda: save_student(run.folder / "student", student), lambda: atomic_folder(run.folder / "state", lambda folder: write_state(folder, state))]
        for write in both if (run.folder / "state").exists() else both[::-1]:  # the first time: a student without a state would be taken for one whose state is lost
            write()
        if run.config.runtime.resume == "never" and run.best is None:  # of the run before: its error would stand against this one's
            shutil.rmtree(run.folder / "best", ignore_errors=True)
        if run.config.runtime.keep:
            keep(run.folder, run.step, run.config.runtime.keep)
    run.ranks.wait()
    run.saved = run.step
    return run.folder / "student"


def write_state(folder: Path, state: dict) -> None:
    save_file_atomic(folder / "trainer.pt", state)
    (folder / "checksum").write_text(checksum(folder / "trainer.pt"))


def save_best(run, student, error: float) -> None:
    """Keep the student of the lowest held-out error in best/, which says what that was; rank 0 only."""
    if not math.isfinite(error):
        print(f"validation: the error at step {run.step} is not finite; best/ stays as it is")
    elif run.best is None or error < run.best:
        run.best = error
        save_student(run.folder / "best", replace(student, training={**student.training, "velocity_error": error}))


def best_of(folder: Path) -> float | None:
    """The held-out error of best/, None where there is none."""
    try:
        error = read_config(folder / "best")["training"].get("velocity_error")
    except CheckpointError:
        return None
    return error if isinstance(error, float) and math.isfinite(error) else None


def keep(folder: Path, step: int, count: int) -> None:
    """Keep copies of student and state of this step in checkpoints/step-…, and of those before the last `count`.

    Copies, not links: what damages a file would damage its other names.
    """
    target = folder / "checkpoints" / f"step-{step:07d}"
    atomic_folder(target, lambda fresh: [shutil.copytree(folder / name, fresh / name) for name in ("student", "state")])
    steps = {old: int(old.name[5:]) for old in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{7,}", old.name)}
    # those that came further are of a run that this one has replaced, begun anew or from an older checkpoint
    for old in sorted(steps, key=lambda old: (steps[old] <= step, steps[old]))[:-count]:
        shutil.rmtree(old)


def next_or_save(run, batches: Iterator[dict]) -> dict:
    """The next batch. Where a rank cannot read its own, all save what they have, and the error ends the run."""
    error = batch = None
    try:
        batch = next(batches)
    except (DataError, OSError) as failed:
        error = failed
    if run.ranks.any(error is not None)[0]:
        if run.step and run.saved != run.step and not run.skipped_in_a_row:
            save(run)
        raise error or DataError("another rank cannot read its data; its own message is the reason")
    return batch


# ---- going on --------------------------------------------------------------------------------------------------------


def resume(run) -> None:
    """Go on from the folder's state when resume=auto finds one, or from the folder that resume names; all ranks alike."""
    wish = run.config.runtime.resume
    if wish != "never":
        folder = run.folder / "state" if wish == "auto" else Path(wish)
        if run.ranks.first:
            settle(folder)
        run.ranks.wait()
        if (folder / "trainer.pt").exists():
            restore(run, folder, read_state(folder))
        elif wish == "auto":
            refuse_lost(run.folder)
        else:
            raise CheckpointError(f"runtime.resume={wish}: no trainer.pt there; accepted: auto, never, or a run's state folder")
        run.saved = run.step if wish == "auto" else None
    stands = None if wish == "never" else best_of(run.folder)
    run.best = stands if stands is not None else run.best if (run.folder / "best").exists() else None
    agree(run)


def refuse_lost(folder: Path) -> None:
    """CheckpointError where a student stands without the state it was saved with: going on would begin anew over it."""
    state, student = folder / "state", folder / "student"
    if not (state.is_symlink() or state.exists() or student.exists()):
        return
    where = f"a student stands in {student}" if student.exists() else f"{state} is there"
    raise CheckpointError(
        f"{state}: no trainer.pt there or it cannot be reached, although {where}; bring it back" + others(folder)
        + f", give another output_dir (objective.init={student} begins at its weights), or {NEVER}"
    )


def others(folder: Path) -> str:
    """Whole checkpoints of a run, as words; the newest first."""
    whole = [f"runtime.resume={state}" for state in sorted((folder / "checkpoints").glob("step-*/state"), reverse=True) if damage_of(state) is None]
    return f", or go on from an older one: {' or '.join(whole[:3])}" if whole else ""


def damage_of(folder: Path) -> str | None:
    """Why a state folder's file is not what was written; None where it is. States of before there were checksums have none."""
    try:
        wanted = (folder / "checksum").read_text().strip() if (folder / "checksum").exists() else None
        found = checksum(folder / "trainer.pt")
    except OSError as error:
        return reason_of(error)
    return "its checksum is another" if wanted not in (None, found) else None


def read_state(folder: Path) -> dict:
    """What trainer.pt holds. CheckpointError for a damaged file."""
    file, wrong = folder / "trainer.pt", damage_of(folder)
    if wrong is None:
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
            wrong = odd_state(state)
        except Exception as error:  # torch raises many kinds for a damaged file
            wrong = type(error).__name__
    if wrong is not None:
        raise CheckpointError(
            f"{file}: damaged ({wrong}); delete nothing: student/ and best/ beside it are whole" + others(folder.parent)
            + f"; or another output_dir (objective.init={folder.parent / 'student'} begins at its weights), or {NEVER}"
        )
    return state


def odd_state(state) -> str | None:
    """What of a trainer's state cannot be; None where all can."""
    kinds = {"steps": int, "step": int, "student": dict, "ema": dict, "optimizer": dict, "policy": dict, "data": dict, "skipped": int}
    if not isinstance(state, dict):
        return f"a {type(state).__name__}, not a state"
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind) or isinstance(state.get(name), bool)]
    wrong += [name for name in ("best", "plan") if name not in state]
    if wrong:
        return f"no usable entry {wrong[0]!r}"
    if not 0 <= state["step"] <= state["steps"] or state["skipped"] < 0 or not isinstance(state.get("settings", {}), dict):
        return f"step {state['step']} of {state['steps']}, {state['skipped']} skipped"
    if not isinstance(state["best"], float | None):
        return "best is no number"
    wanted = state.get("wanted", [0.0, 0])  # of a state from before damages had a unit of their own: it begins anew
    if not (isinstance(wanted, list) and len(wanted) == 2 and isinstance(wanted[0], float) and isinstance(wanted[1], int) and math.isfinite(wanted[0])):
        return "wanted is no mean and count"
    tensors = [("student", state["student"]), ("ema", state["ema"])]
    if any(not isinstance(value, torch.Tensor) for _, part in tensors for value in part.values()):
        return "weights that are no tensors"
    return next((f"{name}: {found}" for name, part in tensors if (found := not_finite(part))), None)


def restore(run, folder: Path, state: dict) -> None:
    """Put a state in its place. CheckpointError, DataError where it is of another run."""
    if state["steps"] != run.config.optim.steps:
        raise CheckpointError(
            f"{folder}: belongs to a run of {state['steps']} steps, this one has {run.config.optim.steps}, and schedules would "
            "differ; use the same optim.steps, another output_dir, or runtime.resume=never"
        )
    if state.get("expert") != run.config.model.expert:
        raise CheckpointError(f"{folder}: of the expert {state.get('expert')}, this run trains {run.config.model.expert}; use another output_dir")
    again = changes(run, folder, state)
    try:
        run.engine.load_weights(state["student"], state["ema"])
        run.engine.load_moments({} if again else state["optimizer"])
        run.policy.load_state_dict(state["policy"])
        critic = state.get("critic")  # where it lay before there were objectives
        run.objective.load_state_dict(state.get("objective", {} if critic is None else {"critic": critic}))
        run.data.load_state_dict(state["data"])
        run.step, run.skipped, run.best = (state[name] for name in ("step", "skipped", "best"))
        run.wanted = list(state.get("wanted", run.wanted))
        run.best = None if run.best is None or not math.isfinite(run.best) else run.best
        run.plan = None if state["plan"] is None else SparsityPlan.from_dict(state["plan"])
        if run.plan is not None and (len(run.plan.edges) != len(run.edges) or run.plan.num_layers != run.num_layers):
            raise ValueError(f"a plan of {len(run.plan.edges)} bins and {run.plan.num_layers} layers")
    except DataError:
        raise
    except Exception as error:  # whatever a strange file causes: nothing of it is trained on
        words = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: of another model or policy ({words}); use another output_dir") from None


def changes(run, folder: Path, state: dict) -> bool:
    """Refuse settings that cannot change half way, say those that do; whether the optimiser's moments begin anew. CheckpointError."""
    mine, theirs = settings_of(run.config), of_older(state.get("settings", {}))
    changed = {name: f"{name} is {theirs[name]} there and {mine[name]} here" for name in theirs if name in mine and mine[name] != theirs[name]}
    if "seed" in state and state["seed"] != run.config.seed:
        changed["seed"] = f"seed is {state['seed']} there and {run.config.seed} here"
    if refused := [words for name, words in changed.items() if name not in SAID]:
        raise CheckpointError(f"{folder}: of a run with other settings ({'; '.join(refused)}); use the same, another output_dir, or runtime.resume=never")
    if changed and state["step"] == state["steps"]:
        raise CheckpointError(f"{folder}: of a finished run with other settings ({'; '.join(changed.values())}); use another output_dir, or runtime.resume=never")
    again = "optim.optimizer" in changed
    if changed and run.ranks.first:
        print(f"{folder}: goes on with other settings: {'; '.join(changed.values())}" + ("; the optimiser's moments begin anew" if again else ""))
    return again


def agree(run) -> None:
    """CheckpointError where the ranks do not begin alike, as they would not with an output_dir or a model folder that they do not share."""
    weights = hashlib.sha256()
    for _, p in run.engine.trained if run.config.runtime.name != "zero3" else ():  # there every rank holds another part
        weights.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    plan = None if run.plan is None else run.plan.to_dict()
    mine = {"step": run.step, "weights": weights.hexdigest()[:12], "plan": plan, "data": run.data.state_dict(), **settings_of(run.config)}
    first, *rest = [json.loads(text) for text in run.ranks.texts(json.dumps(mine))]
    for rank, theirs in enumerate(rest, 1):
        if differing := [f"{name} is {str(theirs[name])[:60]} on rank {rank} and {str(first[name])[:60]} on rank 0" for name in first if theirs.get(name) != first[name]]:
            raise CheckpointError(
                f"the ranks do not begin alike: {differing[0]}; output_dir={run.config.output_dir}, the data and the model must be the same folders for all ranks"
            )
