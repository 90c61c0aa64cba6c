"""Runs of train.py in this process on a tiny world; the fixtures `make` and `watched` of conftest.py are made of this."""

import signal
import sys
from pathlib import Path

import tiny
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train as program  # noqa: E402
from usv.config import (  # noqa: E402
    DataConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    PolicyConfig,
    RuntimeConfig,
    TrainConfig,
    check_train,
    typed,
)
from usv.objectives import check_objective  # noqa: E402
from usv.sampling.checkpoint import read_config  # noqa: E402

STEPS = 8


def settings(model, shards, folder, policy="gumbel", steps=STEPS, precision="fp32", **runtime) -> TrainConfig:
    """A run's settings."""
    return TrainConfig(
        output_dir=str(folder), seed=3,
        model=ModelConfig(str(model), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE), num_inference_steps=2),
        policy=PolicyConfig(policy, budget=0.8, bins=2, warm_down=[0.0, 0.4], freeze_at=0.6),
        data=DataConfig(str(shards), drop_text=0.2, validation_clips=2),
        optim=OptimConfig(steps=steps, batch_size=2, lr=1e-3, warmup=2),
        runtime=RuntimeConfig(precision=precision, checkpoint_seconds=1e9, **runtime),
        logger=LoggerConfig("none", every=1, validate_every=4),
    )  # fmt: skip


def composed(*words) -> TrainConfig:
    """The settings that `train.py words…` runs with."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = typed(compose("train", list(words)), TrainConfig)
    check_train(config)
    check_objective(config)
    return config


def watcher(monkeypatch):
    """Runs train() here; gives the exact loss and gradient norm of every step, and calls `at[step]` after that step."""
    original = program.log_step

    def run(config, at=None):
        seen = {}

        def spy(run, record, tracker):
            if "loss/velocity" in record.values:  # not of a skipped step
                seen[run.step] = (record.values["loss/velocity"], record.values["optim/gradient_norm"])
            original(run, record, tracker)
            if at and run.step in at:
                at[run.step](run)

        monkeypatch.setattr(program, "log_step", spy)
        folder = program.train(config)
        return seen, load_file(folder / "student.safetensors"), read_config(folder)

    return run


def interrupt(_run):
    signal.raise_signal(signal.SIGINT)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
