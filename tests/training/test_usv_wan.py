"""experiment=usv_wan end to end: the full width of Wan2.1-1.3B, two of its layers, random weights, three steps with adapters."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from runs import composed
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import shards  # noqa: E402

import train as program  # noqa: E402
from usv.config import SettingError, TrainConfig  # noqa: E402
from usv.sampling.checkpoint import read_config  # noqa: E402

SHAPE, LENGTH, WIDTH = (16, 2, 8, 8), 8, 4096


def make_shards(folder: Path) -> Path:
    """Random latents and UMT5-wide embeddings, as data/prepare.py would index them."""
    names = {}
    for split, count in (("train", 4), ("val", 2)):
        g = torch.Generator().manual_seed(count)
        samples = (
            (
                f"{n:08d}",
                {"latents": torch.randn(SHAPE, generator=g), "text": torch.randn(3, WIDTH, generator=g)},
                {"caption": "x"},
            )
            for n in range(count)
        )
        names[split] = {f"{split}-00000.tar": shards.write_shard(folder / f"{split}-00000.tar", samples, report=[])}
    index = {
        "format": 1, "model": {"name": "wan", "vae": None, "text_encoder": None}, "latent_shape": list(SHAPE), "text_dim": WIDTH,
        "max_sequence_length": LENGTH, "splits": {s: {"num_samples": sum(n.values()), "shards": n} for s, n in names.items()},
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    save_file({"text": torch.zeros(1, WIDTH)}, folder / "empty.safetensors")
    return folder


def settings(*overrides) -> TrainConfig:
    return composed("experiment=usv_wan", *overrides)


def test_full_width_trains(tmp_path):
    config = settings(
        "model.weights=random", "model.architecture.num_layers=2", "model.height=64", "model.width=64", "model.num_frames=5",
        f"model.max_sequence_length={LENGTH}", "model.tile=[2,2,2]", f"data.path={make_shards(tmp_path / 'shards')}",
        "data.validation_clips=2", f"output_dir={tmp_path / 'run'}", "optim.steps=3", "optim.warmup=0", "lora.rank=8",
        "policy.bins=1", "policy.budget=0.9", "policy.warm_down=[0,0]", "runtime.precision=fp32", "logger=none", "logger.every=1",
        "runtime.keep=0",
    )  # fmt: skip
    assert config.runtime.gradient_checkpointing
    handler = signal.getsignal(signal.SIGINT)
    try:
        student = program.train(config)
    finally:
        signal.signal(signal.SIGINT, handler)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/velocity"] for line in lines if "loss/velocity" in line]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert any("validation/velocity_error" in line for line in lines)
    record, tensors = read_config(student), load_file(student / "student.safetensors")
    assert (record["transformer"]["num_attention_heads"], record["transformer"]["ffn_dim"]) == (12, 8960)
    moved = [n for n, value in tensors.items() if ".lora_B." in n and value.abs().max() > 0]
    assert len(moved) == 2 * 10, "every adapter of both layers has learned"
    assert tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"].shape == (1536, 8)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["lora.rank=8", "runtime=zero3"], "lora.rank: got 8"),
        (
            ["runtime=single", "runtime.sequence_parallel=2"],
            "runtime.sequence_parallel: got 2, accepted: 1 with runtime=single",
        ),
        (["runtime=ddp", "runtime.sequence_parallel=0"], "runtime.sequence_parallel: got 0"),
        (["runtime.name=fsdp"], "runtime.name: got fsdp, accepted: single | ddp | zero2 | zero3"),
        (["optim.optimizer=sgd"], "optim.optimizer: got sgd, accepted: adamw | muon | adamw8bit"),
        (["runtime.threads=0"], "runtime.threads: got 0"),
        (["runtime.max_skipped=0"], "runtime.max_skipped: got 0"),
    ],
)
def test_combinations_that_do_not_work_are_refused(overrides, words):
    with pytest.raises(SettingError) as caught:
        settings(*overrides)
    assert words in str(caught.value)


def test_two_experts_and_missing_packages_are_refused():
    from usv.training.engine import make_optimizer
    from usv.training.ranks import start

    config = settings("model=wan22_a14b")
    with pytest.raises(SettingError, match="model.expert: got none"):
        start(config)
    for override, words in (("objective=consistency", "objective.name: got consistency"), ("model=wan_1_3b", "model.expert: got high")):
        with pytest.raises(SettingError, match=words):
            settings("model=wan22_a14b", override, "model.expert=high")
    config = settings("optim.optimizer=adamw8bit")
    with pytest.raises(SettingError, match="bitsandbytes"):
        make_optimizer(config, [("x", torch.nn.Parameter(torch.zeros(2)))])


def test_folders_of_several_sizes_are_named_on_the_command_line():
    """As docs/scaling.md says it."""
    assert settings("data.path='data/shards/wan_*'").data.path == "data/shards/wan_*"
    mix = settings("+data.mix={data/shards/wan_480x832: 3, data/shards/wan_832x480: 1}").data.mix
    assert mix == {"data/shards/wan_480x832": 3.0, "data/shards/wan_832x480": 1.0}
