"""train.py and infer.py on a tiny world: kill, Ctrl-C and NaN lose nothing, resuming changes nothing, errors are one line."""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import is_dataclass
from pathlib import Path

import av
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from runs import ROOT, STEPS, interrupt, program, same
from safetensors.torch import load_file

from usv.config import TrainConfig
from usv.sampling.checkpoint import CheckpointError, read_config
from usv.sparse.plan import SparsityPlan
from usv.training import validation as judging
from usv.training.data import ShardDataset


def arguments(config: TrainConfig) -> list[str]:
    """The same settings on a command line."""
    words = [f"output_dir={config.output_dir}", f"seed={config.seed}", f"policy={config.policy.name}", "logger=none"]
    for group in ("model", "policy", "data", "optim", "runtime", "logger"):
        for key, value in vars(getattr(config, group)).items():
            if not is_dataclass(value):
                words.append(f"{group}.{key}={'null' if value is None else str(value).replace(' ', '')}")
    return words


def logged(folder):
    """{step: loss} of metrics.jsonl; of a step logged twice the last counts."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/velocity"] for line in lines if "loss/velocity" in line}


# ---- the run itself --------------------------------------------------------------------------------------------------


def test_a_run_trains_validates_and_leaves_a_student(make, watched, tmp_path):
    seen, weights, record = watched(make(tmp_path / "run"))
    assert sorted(seen) == list(range(1, STEPS + 1)) and len({loss for loss, _ in seen.values()}) == STEPS
    base = load_file(Path(make(tmp_path).model.path) / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = [k for k in base if not torch.equal(base[k], weights[f"transformer.{k}"])]
    assert len(moved) > 0.9 * len(base)
    plan = SparsityPlan.from_dict(record["plan"])
    assert len(plan.edges) == 2 and plan.num_layers == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if "validation/velocity_error" in line]
    assert [line["step"] for line in validation] == [4, 8]
    assert all(line["validation/plan_cost"] <= 0.8 + 1e-6 for line in validation)
    assert any(line["sparsity/cost"] < 1 for line in lines if "sparsity/cost" in line)
    videos = sorted((tmp_path / "run" / "validation").glob("step*_[0-9].mp4"))
    assert len(videos) == 2 and len(list((tmp_path / "run" / "validation").glob("*.mp4"))) == 6  # and each side alone
    with av.open(str(videos[0])) as container:
        frames = [f for f in container.decode(video=0)]
    assert len(frames) == tiny.FRAMES and (frames[0].width, frames[0].height) == (4 * tiny.SIZE, 2 * tiny.SIZE)


def test_bf16_trains_as_fp32_does(make, watched, tmp_path):
    """What runtime.precision=auto takes on a CPU that multiplies bf16, on any CPU: the whole run, its validation and its videos."""
    exact, _, _ = watched(make(tmp_path / "fp32"))
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, it thinks
    seen, weights, _ = watched(make(tmp_path / "bf16", precision="bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(x.dtype == torch.float32 for x in weights.values())
    for step, (loss, _) in exact.items():
        assert seen[step][0] == pytest.approx(loss, rel=0.1) and seen[step][0] != loss
    assert len(list((tmp_path / "bf16" / "validation").glob("*.mp4"))) == 6


@pytest.mark.parametrize("policy, stop", [("gumbel", 2), ("gumbel", 6), ("entropy", 3), ("static", 3)])
def test_ctrl_c_and_resume_equal_an_uninterrupted_run(make, watched, tmp_path, policy, stop):
    """Bit-equal losses, gradient norms, weights and plan, stopped before and after the plan is frozen."""
    whole, weights, record = watched(make(tmp_path / "whole", policy))
    first, _, early = watched(make(tmp_path / "cut", policy), {stop: interrupt})
    assert sorted(first) == list(range(1, stop + 1)) and early["training"]["steps"] == stop
    second, resumed, late = watched(make(tmp_path / "cut", policy))
    assert sorted(second) == list(range(stop + 1, STEPS + 1))
    assert {**first, **second} == whole
    assert same(resumed, weights) and late["plan"] == record["plan"]


def test_a_finished_run_is_left_as_it_is(make, watched, tmp_path):
    _, weights, _ = watched(make(tmp_path / "run", "static", steps=2))
    written = (tmp_path / "run" / "student" / "config.json").stat().st_mtime_ns
    again, same_weights, _ = watched(make(tmp_path / "run", "static", steps=2))
    assert again == {} and same(weights, same_weights) and (tmp_path / "run" / "student" / "config.json").stat().st_mtime_ns == written


def test_resume_never_begins_anew(make, watched, tmp_path):
    first, _, _ = watched(make(tmp_path / "run", "static", steps=2))
    assert watched(make(tmp_path / "run", "static", steps=2, resume="never"))[0] == first


def test_gradient_checkpointing_trains_the_same(make, watched, tmp_path):
    plain, _, _ = watched(make(tmp_path / "a", steps=4))
    again, _, _ = watched(make(tmp_path / "b", steps=4, gradient_checkpointing=True))
    assert plain == again


def test_experts_are_trained_one_a_run_and_sampled_together(make, watched, tiny_wan, tmp_path):
    """Each sees its own noise levels only, starts at its own transformer, and both run in one pipeline."""
    from diffusers import WanPipeline

    import usv
    from usv.sampling.generate import generate, load_pipeline

    second = tiny.make_transformer(seed=9)
    both = WanPipeline.from_pretrained(tiny_wan)
    WanPipeline(**{**both.components, "transformer_2": second}, boundary_ratio=0.8).save_pretrained(tmp_path / "wan")
    levels = {"high": [], "low": []}
    for expert, seen in levels.items():
        config = make(tmp_path / expert, steps=4)
        config.model.path, config.model.experts, config.model.expert, config.model.boundary = str(tmp_path / "wan"), 2, expert, 0.8
        teacher = []
        watched(config, at={1: lambda run: teacher.append(run.teacher.state_dict()), 4: lambda run: seen.extend([*run.span, *run.edges])})
        wanted = second.state_dict() if expert == "low" else both.transformer.state_dict()
        assert all(torch.equal(teacher[0][f"transformer.{n}"], v) for n, v in wanted.items() if "rope" not in n)
        assert not list((tmp_path / expert).glob("validation/*.mp4"))
    config.model.expert, config.output_dir = "low", str(tmp_path / "high")
    with pytest.raises(CheckpointError, match="of the expert high, this run trains low"):
        watched(config)
    assert levels["high"][1] == 1 and levels["high"][-1] == 1000 and 800 < levels["high"][2]
    assert levels["low"][0] == 0 and levels["low"][1] == levels["high"][0] and levels["low"][-1] == pytest.approx(800)
    pipe = load_pipeline(str(tmp_path / "wan"))
    usv.enable(pipe, (tmp_path / "high" / "student", tmp_path / "low" / "student"))
    videos = generate(pipe, make(tmp_path / "x").model, ["a cat"], [0], 1, 3).videos
    assert torch.isfinite(videos).all() and pipe._usv.record.forwards == 3


@pytest.fixture
def poison(monkeypatch):
    """NaN in the training batches of these numbers, counted from 1; gives the patch, to be undone."""
    original, count = ShardDataset._batch, []

    def poisoned(self, epoch, position):
        batch = original(self, epoch, position)
        if self.repeat:
            count.append(1)
            if len(count) in poison.numbers:
                batch["latents"][0, 0, 0] = float("nan")
        return batch

    def poison(numbers):
        poison.numbers = numbers
        monkeypatch.setattr(ShardDataset, "_batch", poisoned)
        return lambda: monkeypatch.setattr(ShardDataset, "_batch", original)

    return poison


def test_a_step_that_is_not_finite_is_skipped_and_counted(make, watched, poison, tmp_path):
    poison({4})
    config = make(tmp_path / "run", "static")
    seen, weights, _ = watched(config)
    assert sorted(seen) == [1, 2, 3, 5, 6, 7, 8] and all(torch.isfinite(w).all() for w in weights.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["optim/skipped_steps"]) for x in lines if "optim/skipped_steps" in x] == [(4, 1.0)]
    assert torch.load(tmp_path / "run" / "state" / "trainer.pt", weights_only=True)["skipped"] == 1


def test_damaged_data_stops_before_it_spoils_anything(make, watched, poison, tmp_path):
    """NaN from the fourth batch on: a report, the checkpoint of step 3 untouched, and from it the run goes on as if nothing was."""
    whole, _, _ = watched(make(tmp_path / "whole"))
    config = make(tmp_path / "run")
    config.runtime.checkpoint_seconds = 0.0
    mend = poison(range(4, 100))
    with pytest.raises(FloatingPointError, match=r"loss nan.* at step 7.*5 steps in a row.*last good checkpoint is in .*state"):
        watched(config)
    mend()
    assert torch.load(tmp_path / "run" / "state" / "trainer.pt", weights_only=True)["step"] == 3
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["step"] == 7
    resumed, _, _ = watched(config)
    assert resumed == {step: whole[step] for step in range(4, STEPS + 1)}


@pytest.mark.parametrize("module, function", [("usv.sampling.checkpoint.torch", "save"), ("usv.sampling.checkpoint", "save_file")])
def test_a_full_disk_during_a_save_leaves_the_checkpoint_before(make, watched, tmp_path, monkeypatch, module, function):
    """The third write of the trainer's state, or of the student, fills the disk half way through."""
    import importlib

    whole, _, _ = watched(make(tmp_path / "whole", "static", steps=4))
    config = make(tmp_path / "run", "static", steps=4)
    config.runtime.checkpoint_seconds = 0.0
    owner = importlib.import_module("torch" if module.endswith("torch") else module)
    original, calls = getattr(owner, function), []

    def full(obj, path, *args, **kwargs):
        calls.append(1)
        if len(calls) < 3:
            return original(obj, path, *args, **kwargs)
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full)
        with pytest.raises(OSError, match="No space left"):
            watched(config)
    assert torch.load(tmp_path / "run" / "state" / "trainer.pt", weights_only=True)["step"] == 2
    assert load_file(tmp_path / "run" / "student" / "student.safetensors") and read_config(tmp_path / "run" / "student")
    left = {p.name for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")}
    assert not left, "half-written files stay behind"
    resumed, _, _ = watched(config)
    assert resumed == {step: whole[step] for step in (3, 4)}


def test_checkpoints_rotate(make, watched, tmp_path):
    """The last two are kept whole beside the best student, and a run goes on from an older one."""
    config = make(tmp_path / "run", "static", keep=2)
    config.runtime.checkpoint_seconds = 0.0
    whole, _, _ = watched(config)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-0000007", "step-0000008"]
    assert read_config(tmp_path / "run" / "best")["training"]["steps"] in (4, 8)
    older = tmp_path / "run" / "checkpoints" / "step-0000007"
    assert read_config(older / "student")["training"]["steps"] == 7
    again, _, _ = watched(make(tmp_path / "other", "static", resume=str(older / "state")))
    assert again == {8: whole[8]}


@pytest.mark.parametrize("again", ["never", "older"])
def test_checkpoints_and_best_are_those_of_the_run_that_goes_on(make, watched, tmp_path, monkeypatch, again):
    """In the folder of a run that came further: one begun anew, and one that goes on from an older checkpoint."""
    errors = iter([0.1] + [0.5] * 9)
    monkeypatch.setattr(judging, "velocity_error", lambda *a: {"validation/velocity_error": next(errors)})
    folder = tmp_path / "run"

    def run(at=None, **how):
        config = make(folder, "static", **how)
        config.runtime.checkpoint_seconds, config.logger.videos = 0.0, False
        seen, _, _ = watched(config, at)
        return sorted(seen), sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())

    assert run(keep=3) == ([*range(1, 9)], [6, 7, 8])
    if again == "older":
        assert run({7: interrupt}, keep=1, resume=str(folder / "checkpoints" / "step-0000006" / "state")) == ([7], [7])
        assert read_config(folder / "best")["training"]["velocity_error"] == 0.1
    else:
        assert run({1: interrupt}, keep=1, resume="never") == ([1], [1]) and not (folder / "best").exists()
        assert run(keep=1) == ([*range(2, 9)], [8])
        assert read_config(folder / "best")["training"]["velocity_error"] == 0.5


@pytest.fixture
def state(make, watched, tmp_path):
    watched(make(tmp_path / "run", "static", steps=2), {1: interrupt})
    return tmp_path / "run"


def test_state_of_another_length_or_policy_or_damaged_is_refused(make, state):
    with pytest.raises(CheckpointError, match="belongs to a run of 2 steps, this one has 5"):
        program.train(make(state, "static", steps=5))
    with pytest.raises(CheckpointError, match="policy.name is static there and gumbel here"):
        program.train(make(state, "gumbel", steps=2))
    other = make(state, "static", steps=2)
    other.objective.solver_steps += 1
    with pytest.raises(CheckpointError, match="objective.solver_steps is"):
        program.train(other)
    file = state / "state" / "trainer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"trainer\.pt: damaged .*delete"):
        program.train(make(state, "static", steps=2))


def test_resume_from_nowhere_is_refused(make, tmp_path):
    with pytest.raises(CheckpointError, match="no trainer.pt there; accepted: auto, never, or"):
        program.train(make(tmp_path / "run", resume=str(tmp_path / "nowhere")))


# ---- the programs ----------------------------------------------------------------------------------------------------


def launch(script, words):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, str(ROOT / script), *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)  # fmt: skip


def test_train_kill_resume_infer(make, watched, tmp_path):
    """The way a user goes: train.py killed without warning, the same command again, then infer.py with compare=true."""
    config = make(tmp_path / "run", steps=24)
    config.runtime.checkpoint_seconds = 0.0
    process = launch("train.py", arguments(config))
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "run" / "metrics.jsonl").exists() and len(logged(config.output_dir)) >= 3:
            break
        time.sleep(0.01)
    process.kill()
    output = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, output[-2000:]
    early = logged(config.output_dir)
    assert 3 <= len(early) < 24
    watched(make(tmp_path / "run", steps=24))
    whole, _, _ = watched(make(tmp_path / "whole", steps=24))
    after = logged(config.output_dir)
    assert sorted(after) == list(range(1, 25))
    # the first steps ran in another process; metrics.jsonl holds six decimals
    assert all(after[step] == pytest.approx(loss, rel=1e-4, abs=2e-6) for step, (loss, _) in whole.items())
    assert all(after[step] == pytest.approx(early[step], rel=1e-4, abs=2e-6) for step in early)

    words = [f"ckpt={config.output_dir}/student", 'prompt="a cat, the camera pans left"', "seeds=2", "compare=true",
             f"output_dir={tmp_path}/videos"]  # fmt: skip
    words += [w for w in arguments(config) if w.startswith("model.")]
    process = launch("infer.py", words)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    assert "student" in output and "dense" in output
    report = json.loads((tmp_path / "videos" / "infer.json").read_text())
    assert {v["method"] for v in report["videos"]} == {"dense", "student"} and len(report["videos"]) == 4
    for video in report["videos"]:
        with av.open(video["path"]) as container:
            assert len(list(container.decode(video=0))) == tiny.FRAMES
    student, dense = report["methods"]["student"], report["methods"]["dense"]
    assert (student["forwards_per_video"], dense["forwards_per_video"]) == (2, 4)
    plan = SparsityPlan.from_dict(read_config(f"{config.output_dir}/student")["plan"])
    assert student["density"] < 1.0 or plan.density(8) == 1.0
    assert set(student["seconds"]) == {"text", "denoise", "decode"} and report["commit"]
    with Image.open(tmp_path / "videos" / "contact_sheet.png") as sheet:
        assert sheet.height > 4 * tiny.SIZE


def message_of(script, words, monkeypatch) -> str:
    """Runs a program in this process as the shell would; its message of failure."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert isinstance(caught.value.code, str), "a message, which also makes the exit code 1"
    assert len(caught.value.code.splitlines()) == 1
    return caught.value.code


@pytest.mark.parametrize(
    "change, words",
    [
        ("policy.budget=0.01", ["SettingError: policy.budget: got 0.01", "accepted: 0."]),
        ("policy.budgt=0.5", ["SettingError", "'policy.budget'"]),
        ("policy=gumbl", ["SettingError", "policy=gumbel"]),
        ("model.height=33", ["SettingError: model.height: got 33", "multiples of 8", "e.g. 32"]),
        ("model.path=/no/such/model", ["SettingError: model.path=/no/such/model", "data/wan-mini"]),
        ("data.path=/no/such/data", ["DataError: /no/such/data", "data/prepare.py"]),
        ("model.height=64", ["DataError", "(16, 5, 16, 8)"]),
        ("output_dir={file}/run", ["SettingError: output_dir=", "cannot be written", "folder you may write to"]),
        ("runtime.resume=/no/such/state", ["CheckpointError", "no trainer.pt there"]),
        ("policy.warm_down=[0.5]", ["SettingError: policy.warm_down: got [0.5], accepted: "]),
    ],
)
def test_train_refuses_in_one_line(make, tmp_path, monkeypatch, change, words):
    (tmp_path / "file").write_text("")
    base = [w for w in arguments(make(tmp_path / "run")) if w.split("=")[0] != change.split("=")[0]]
    message = message_of("train.py", [*base, change.format(file=tmp_path / "file")], monkeypatch)
    assert all(word in message for word in words), message


def test_fewer_held_out_clips_than_asked_for(make, watched, tmp_path, capsys):
    """A folder of few own videos: validation takes what there is and says so."""
    config = make(tmp_path / "run", "static", steps=1)
    config.data.validation_clips = 500
    watched(config)
    assert "data.validation_clips=500 were asked for" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/velocity_error" in row for row in rows)


def test_diverging_training_stops_with_a_report(make, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    config = make(tmp_path / "run", "static")
    config.optim.lr = 1e30
    try:
        message = message_of("train.py", arguments(config), monkeypatch)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert message.startswith("FloatingPointError: loss") and "in a row" in message and "No checkpoint was written yet" in message and "optim.lr" in message
    report = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert report["config"]["optim"]["lr"] == 1e30 and not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ([], ["SettingError: prompt: give prompt="]),
        (["prompt=a", "prompts=b"], ["SettingError: prompt: give prompt="]),
        (["prompts=/no/such/file.txt"], ["SettingError: prompts=/no/such/file.txt: no such file", "one prompt a line"]),
        (["prompts={empty}"], ["SettingError", "holds no prompt"]),
        (["prompt=a", "ckpt=/no/such/ckpt"], ["CheckpointError: /no/such/ckpt: no such checkpoint", "train.py"]),
        (["prompt=a", "ckpt={foreign}"], ["CheckpointError", "expected 'usv-student-1'"]),
        (["prompt=a", "compare=true"], ["SettingError: compare=true", "ckpt=FOLDER"]),
        (["prompt=a", "output_dir={empty}/videos"], ["SettingError: output_dir=", "cannot be written"]),
        (["promt=a"], ["SettingError", "'prompt"]),
        (["prompt=a", "seeds=0"], ["SettingError: seeds: got 0"]),
        (["prompt=a", "batch_size=0"], ["SettingError: batch_size: got 0"]),
        (["prompt=a", "num_inference_steps=0"], ["SettingError: num_inference_steps: got 0"]),
    ],
)
def test_infer_refuses_in_one_line(make, tiny_wan, tmp_path, monkeypatch, change, words):
    (tmp_path / "empty").write_text("# nothing\n\n")
    foreign = tiny_wan / "transformer"
    base = [w for w in arguments(make(tmp_path / "run")) if w.startswith("model.")]
    base += [] if any(w.startswith("output_dir") for w in change) else [f"output_dir={tmp_path}/videos"]
    change = [w.format(empty=tmp_path / "empty", foreign=foreign) for w in change]
    message = message_of("infer.py", [*base, *change], monkeypatch)
    assert all(word in message for word in words), message
