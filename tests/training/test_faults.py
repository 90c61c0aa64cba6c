"""What goes wrong around a run: signals, two runs in one folder, damaged and lost files, other settings, pictures that fail. Nothing is
lost beyond the last step, and what cannot go on says so in a line."""

import json
import os
import random
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from runs import STEPS, interrupt, program
from strange import VALUES

from usv.config import SettingError
from usv.files import FileError, claimed
from usv.sampling.checkpoint import CheckpointError, read_config
from usv.training import validation
from usv.training.data import ShardDataset
from usv.training.feasible import check_density
from usv.training.ranks import Ranks
from usv.training.remote import DataError
from usv.training.resume import read_state, restore


def step_of(folder) -> int:
    return torch.load(Path(folder) / "state" / "trainer.pt", weights_only=True)["step"]


@pytest.fixture
def make(make):
    """As conftest's, without videos, which cost most of so short a run."""

    def quiet(*args, **runtime):
        config = make(*args, **runtime)
        config.logger.videos = False
        return config

    return quiet


@pytest.fixture
def stopped(make, watched, tmp_path):
    """A static run stopped after two of its steps: (its settings' maker, its folder, a function that goes on with it)."""
    watched(make(tmp_path / "run", "static", steps=4), {2: interrupt})
    return lambda: make(tmp_path / "run", "static", steps=4), tmp_path / "run", watched


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_that_ends_a_run_loses_nothing(make, watched, tmp_path, number, request):
    request.addfinalizer(lambda kept=signal.signal(number, signal.SIG_DFL): signal.signal(number, kept))  # under nohup it is ignored, which a run respects
    before = signal.getsignal(number)
    seen, _, record = watched(make(tmp_path / "run", "static"), {3: lambda _: signal.raise_signal(number)})
    assert sorted(seen) == [1, 2, 3] and step_of(tmp_path / "run") == record["training"]["steps"] == 3
    assert signal.getsignal(number) is before, "the caller's own handling is back"
    assert program.Stop(number).status == 128 + number and program.Stop(signal.SIGINT).status == program.Stop().status == 0


def test_a_hang_up_that_is_ignored_stays_so(make, watched, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        seen, _, _ = watched(make(tmp_path / "run", "static", steps=3), {1: lambda _: signal.raise_signal(signal.SIGHUP)})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert sorted(seen) == [1, 2, 3]


def test_one_run_a_folder(stopped):
    make, folder, watched = stopped
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with claimed(folder), pytest.raises(FileError, match=rf"another run writes there \(process {os.getpid()} on "):
        program.train(make())
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == files
    if (child := os.fork()) == 0:  # one that dies holding it
        claimed(folder).__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    assert sorted(watched(make())[0]) == [3, 4] and not (folder / ".lock").exists()


def test_a_flipped_bit_is_seen_and_whole_checkpoints_are_named(make, watched, tmp_path):
    config = make(tmp_path / "run", "static", steps=3, keep=2)
    config.runtime.checkpoint_seconds = 0.0
    watched(config, {2: interrupt})
    file, draw = tmp_path / "run" / "state" / "trainer.pt", random.Random(0)
    kept = tmp_path / "run" / "checkpoints" / "step-0000002" / "state"
    assert file.stat().st_ino != (kept / "trainer.pt").stat().st_ino, "what damages one name of a file damages the other"
    whole = file.read_bytes()
    for _ in range(24):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"checksum is another.*delete nothing.*runtime.resume={kept}"):
            read_state(file.parent)
    with pytest.raises(CheckpointError, match="damaged"):
        program.train(config)
    assert sorted(watched(make(tmp_path / "run", "static", steps=3, keep=2, resume=str(kept)))[0]) == [3]


def test_what_a_kill_leaves_is_removed_and_nothing_else(stopped):
    make, folder, watched = stopped
    (folder / "state").rename(folder / ".state.old")  # between the two renames
    for name in (".student.new", "checkpoints/.step-0000001.new"):
        (folder / name).mkdir(parents=True)
    files = [".metrics.77.tmp.jsonl", "validation/.step000002_0.77.tmp.mp4", ".writable.0.77"]
    mine = [".bashrc", ".cache.new/x", ".notes.7.tmp.txt"]
    for name in [*files, *mine]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    assert sorted(watched(make())[0]) == [3, 4]
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.is_file()) == [".bashrc", ".notes.7.tmp.txt"]
    assert (folder / ".cache.new" / "x").exists() and not (folder / ".student.new").exists() and not (folder / "checkpoints" / ".step-0000001.new").exists()


def test_a_lost_state_does_not_begin_anew_over_the_student(stopped):
    make, folder, watched = stopped
    weights = (folder / "student" / "student.safetensors").read_bytes()
    away = folder.parent / "away"
    (folder / "state").rename(away)
    for lose in (lambda: None, lambda: (folder / "state").symlink_to(away / "unmounted"), lambda: (folder / "state").unlink() or (folder / "state").mkdir()):
        lose()
        with pytest.raises(CheckpointError, match="no trainer.pt there or it cannot be reached.*runtime.resume=never begins anew"):
            program.train(make())
        assert (folder / "student" / "student.safetensors").read_bytes() == weights
    (folder / "state").rmdir()
    away.rename(folder / "state")
    assert sorted(watched(make())[0]) == [3, 4]


@pytest.mark.parametrize("name", ["student", "state"])
def test_folders_of_the_users_are_not_replaced(make, tmp_path, name):
    place = tmp_path / "home" / name
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("years")
    with pytest.raises(SettingError, match=f"{name} is no {name} of a run, and would be replaced"):
        program.train(make(tmp_path / "home", "static", steps=1))
    assert (place / "thesis.txt").read_text() == "years"


def test_data_that_ends_a_run_ends_it_saved(make, watched, tmp_path, monkeypatch):
    whole, _, _ = watched(make(tmp_path / "whole"))
    original, count = ShardDataset._batch, []

    def failing(self, epoch, position):
        count.append(self.repeat)
        if sum(count) == 4:
            raise DataError("train-00001.tar is damaged")
        return original(self, epoch, position)

    with monkeypatch.context() as patch:
        patch.setattr(ShardDataset, "_batch", failing)
        with pytest.raises(DataError, match="is damaged"):
            watched(make(tmp_path / "run"))
    assert step_of(tmp_path / "run") == 3
    assert watched(make(tmp_path / "run"))[0] == {step: whole[step] for step in range(4, STEPS + 1)}


@pytest.mark.parametrize("fault", ["memory", "file"])
def test_a_picture_that_fails_is_no_reason_to_end(make, watched, tmp_path, monkeypatch, capsys, fault):
    if fault == "file":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "validation").write_text("in the way")
    else:
        monkeypatch.setattr(validation, "generate", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    config = make(tmp_path / "run", "static", steps=2)
    config.logger.videos = True
    seen, _, record = watched(config)
    assert sorted(seen) == [1, 2] and record["training"]["steps"] == step_of(tmp_path / "run") == 2
    assert "no videos at step 2" in capsys.readouterr().err


def test_a_validation_that_fails_comes_after_the_save(make, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "velocity_error", lambda *a: (_ for _ in ()).throw(MemoryError("no memory")))
    with pytest.raises(MemoryError):
        watched(make(tmp_path / "run", "static", steps=2))
    assert step_of(tmp_path / "run") == 2 and read_config(tmp_path / "run" / "student")["training"]["steps"] == 2


def test_other_settings_are_refused_or_said(stopped, capsys):
    make, folder, watched = stopped
    for group, name, value in (("model", "tile", [5, 2, 2]), ("model", "flow_shift", 5.0), ("model", "guidance_scale", 1.0), ("lora", "rank", 2), ("policy", "budget", 0.9)):
        config = make()
        setattr(getattr(config, group), name, value)
        with pytest.raises(CheckpointError, match=rf"of a run with other settings \(.*{group}\.{name} is "):
            program.train(config)
    config = make()
    config.seed += 1
    with pytest.raises(CheckpointError, match="seed is 3 there and 4 here"):
        program.train(config)
    config = make()
    config.optim.lr, config.optim.optimizer, config.optim.batch_size, config.runtime.precision = 5e-4, "muon", 4, "fp32"
    assert sorted(watched(config)[0]) == [3, 4]
    said = capsys.readouterr().out
    assert all(words in said for words in ("optim.lr is 0.001 there and 0.0005 here", "optim.optimizer is adamw there and muon here", "moments begin anew", "optim.batch_size is 2 there and 4 here"))
    config.optim.lr = 1e-4
    with pytest.raises(CheckpointError, match="of a finished run with other settings .optim.lr is 0.0005 there and 0.0001 here"):
        program.train(config)


def test_a_strange_state_is_refused_in_a_line(make, watched, tmp_path):
    """Any value anywhere in trainer.pt: nothing of it is trained on."""
    states, problems = [], []

    def try_all(run):
        whole = torch.load(run.folder / "state" / "trainer.pt", weights_only=True)
        tensor = next(iter(whole["student"]))
        altered = [{**whole, name: value} for name in whole for value in VALUES[::4]] + [{k: v for k, v in whole.items() if k != name} for name in whole]
        altered += [{**whole, "student": {**whole["student"], tensor: value}} for value in (torch.zeros(3), torch.full_like(whole["student"][tensor], float("nan")), 3, None)]
        altered += [{**whole, "data": {**whole["data"], name: value}} for name in whole["data"] for value in VALUES[::4]]
        altered += [{**whole, "plan": {**whole["plan"], "edges": value}} for value in ([1.0, float("nan")], [10.0], [500.0, 500.0])]
        for state in [*altered, [], None, 3]:
            torch.save(state, run.folder / "state" / "trainer.pt")
            (run.folder / "state" / "checksum").unlink(missing_ok=True)
            states.append(1)
            try:
                restore(run, run.folder / "state", read_state(run.folder / "state"))
            except (CheckpointError, DataError) as error:
                problems.append(str(error))
        interrupt(run)

    config = make(tmp_path / "run", "static", steps=4)
    config.runtime.checkpoint_seconds, config.policy.freeze_at = 0.0, 0.2  # so that there is a plan in it
    watched(config, {3: try_all})
    assert len(problems) > 0.6 * len(states) > 50 and all("\n" not in words for words in problems)


def test_a_nan_does_not_freeze_the_best(make, watched, tmp_path, monkeypatch):
    errors = iter([float("nan"), 0.5, 0.7])
    monkeypatch.setattr(validation, "velocity_error", lambda *a: {"validation/velocity_error": next(errors)})
    config = make(tmp_path / "run", "static", steps=3, keep=1)
    config.logger.validate_every, config.logger.videos = 1, False
    watched(config)
    assert read_config(tmp_path / "run" / "best")["training"] | {"commit": ""} == {"steps": 2, "policy": "static", "seed": 3, "commit": "", "velocity_error": 0.5}


def test_ranks_that_do_not_share_a_folder_are_told(stopped, monkeypatch):
    """Rank 1 finds nothing in its own folder and would begin anew."""
    make, _, watched = stopped
    others = lambda _, mine: [mine, json.dumps(json.loads(mine) | {"step": 0})]  # noqa: E731
    monkeypatch.setattr(Ranks, "texts", others)
    with pytest.raises(CheckpointError, match="do not begin alike: step is 0 on rank 1 and 2 on rank 0; output_dir="):
        watched(make())


def test_files_are_as_readable_as_their_folder(stopped):
    _, folder, _ = stopped
    (folder / "plain").write_text("")
    wanted = stat.S_IMODE((folder / "plain").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()} == {wanted}


def test_a_density_that_no_plan_has_is_refused_by_all(make, tmp_path):
    from usv.training.dry_run import report

    config = make(tmp_path / "run")
    config.policy = replace(config.policy, most_density=0.05)
    for refused in (lambda: check_density(config, 8), lambda: report(config), lambda: program.train(config)):
        with pytest.raises(SettingError, match=r"policy.most_density: got 0.05, but the sparsest plan still computes 0.125 of the 8 × 8"):
            refused()
    config.policy = replace(config.policy, most_density=0.01)
    with pytest.raises(SettingError, match="0.032"):
        check_density(config, 4096)
    check_density(replace(config, policy=replace(config.policy, name="static")), 8)
    config.policy, config.model = replace(config.policy, most_density=1.0), replace(config.model, height=tiny.SIZE + 1)
    with pytest.raises(SettingError, match="model.height: got 33, accepted: multiples of 8"):
        report(config)
