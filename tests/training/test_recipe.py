"""The recipe for real Wan (docs/recipe.md): its stages one after another at two layers and tiny width, and its prices are those of dry_run."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import tiny
import torch
from runs import composed as settings
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import generate  # noqa: E402

import train as program  # noqa: E402
import usv  # noqa: E402
from usv.objectives import distribution  # noqa: E402
from usv.sampling.checkpoint import read_config  # noqa: E402
from usv.sampling.generate import load_pipeline  # noqa: E402
from usv.training.dry_run import report  # noqa: E402


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_at_two_layers(tiny_wan, tmp_path, monkeypatch):
    """Prompts to the teacher's clips, velocity distillation with accumulation, three steps by distribution matching at two learning rates, a video."""
    handler = signal.getsignal(signal.SIGINT)
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt number {i}" for i in range(8)))
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "max_sequence_length": tiny.TEXT, "fps": 8, "num_inference_steps": 2}
    words = [word for name, value in size.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert generate.main(["--prompts", str(tmp_path / "prompts.txt"), "--model", str(tiny_wan), "--out", str(tmp_path / "taught"), "--split", "val=0.25", *words]) == 0

    common = [
        f"model.path={tiny_wan}", *(f"model.{name}={value}" for name, value in size.items()), "model.tile=[3,2,2]", f"data.path={tmp_path / 'taught'}",
        "data.validation_clips=2", "logger=none", "logger.every=1", "logger.videos=false", "runtime.precision=fp32", "runtime.keep=0", "optim.warmup=0",
    ]  # fmt: skip
    learned = settings(
        "experiment=usv_wan", *common, f"output_dir={tmp_path / 'velocity'}", "optim.steps=3", "optim.batch_size=4", "optim.accumulate=4",
        "policy.bins=2", "policy.budget=0.8", "policy.warm_down=[0,0]",
    )  # fmt: skip
    few = settings("experiment=usv_wan_few_step", *common, f"output_dir={tmp_path / 'few'}", f"objective.init={tmp_path / 'velocity' / 'student'}",
                   "optim.steps=2", "optim.batch_size=2", "objective.critic_warmup=1", "objective.critic_updates=2", "objective.solver_steps=2", "policy.bins=2")  # fmt: skip
    rates, made = [], distribution.Critic.__init__
    monkeypatch.setattr(distribution.Critic, "__init__", lambda critic, model, lr, *a, **k: (rates.append(lr), made(critic, model, lr, *a, **k))[1])
    try:
        first, last = program.train(learned), program.train(few)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (few.optim.lr, few.optim.ema, rates) == (2e-6, 0.995, [4e-7]) and few.policy.name == "inherit"
    for folder, loss in ((tmp_path / "velocity", "loss/velocity"), (tmp_path / "few", "loss/critic")):
        found = [line[loss] for line in metrics(folder) if loss in line]
        assert found and all(torch.isfinite(torch.tensor(found)))
        assert any("validation/velocity_error" in line for line in metrics(folder))
    begun, ended = (load_file(folder / "student.safetensors") for folder in (first, last))
    assert any(not torch.equal(begun[name], ended[name]) for name in begun)
    record = read_config(last)
    assert record["sampling"]["student_timesteps"] == [1000.0, 857.0, 600.0] and record["plan"] == read_config(first)["plan"]

    pipe, forwards = load_pipeline(str(tiny_wan)), []
    usv.enable(pipe, str(last))
    pipe.transformer.proj_out.register_forward_hook(lambda *a: forwards.append(1))
    video = pipe("prompt number 1", height=tiny.SIZE, width=tiny.SIZE, num_frames=tiny.FRAMES, output_type="pt").frames
    assert len(forwards) == 3 and video.shape[1:] == (tiny.FRAMES, 3, tiny.SIZE, tiny.SIZE)


ROWS = {"velocity": ["experiment=usv_wan"], "three steps": ["experiment=usv_wan_few_step"]}


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_the_prices_are_those_of_dry_run(devices, capsys):
    """Hours of every stage of docs/recipe.md on so many GPUs: clips times what a step of one clip a device takes."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in (ROOT / "docs" / "recipe.md").read_text().splitlines() if line.startswith("|")]
    column = next(row for row in lines if f"{devices} GPU" in " ".join(row))
    column = next(i for i, cell in enumerate(column) if re.match(rf"{devices} GPU", cell))
    found = {}
    for name, words in ROWS.items():
        runtime = [] if devices == 1 else ["runtime=ddp", f"optim.batch_size={devices}", f"dry_run_devices={devices}"]
        found[name] = report(settings(*words, *runtime))
    each = {"velocity": found["velocity"]["seconds"] / devices, "three steps": found["three steps"]["seconds"] / devices, "clips": found["velocity"]["clip_seconds"]}
    priced = 0
    for row in lines:
        if row[1:] and row[1] in each:
            clips = int(row[2].split(" = ")[-1].replace(",", ""))
            assert row[column] == f"{clips * each[row[1]] / 3600:,.1f}", (row, clips * each[row[1]] / 3600)
            priced += 1
    assert priced == 9
