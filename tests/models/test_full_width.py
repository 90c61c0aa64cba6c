"""Every family beside Wan at its full width, two layers of it, 48 tokens: a dry run, which is CI's, and a real training step, which holds up
to 6 GB and is not:

    USV_FULL_WIDTH=1 nice python -m pytest -s tests/models/test_full_width.py -k step
"""

import math
import multiprocessing
import os
import resource
import time
from pathlib import Path

import family_worlds
import pytest
from runs import composed, program

from usv.config import CodecConfig, LoraConfig, TrainConfig, check_train
from usv.models import lora
from usv.training.dry_run import GIB, report

LAYERS = {"num_layers": 2}
# whose experiment holds, codec's compression of space and time times the patch, channels of the latents, width of the packed text, millions
# of parameters; numbers of the transformer that conf/model does not name are diffusers' own, those of the public checkpoints
FAMILIES = {
    "hunyuan_video": ("usv_hunyuan", 16, 4, 16, 4096, 842),
    "hunyuan_video15": ("usv_hunyuan15", 16, 4, 32, 3585, 472),
    "cogvideox": ("usv_cogvideox", 16, 4, 16, 4096, 282),
    "ltx": ("usv_ltx", 32, 8, 128, 4096, 177),
    "ltx2": ("usv_ltx", 32, 8, 128, 2 * 3840, 1117),
    "mochi": ("usv_cogvideox", 16, 6, 12, 4096, 476),
}


def settings(name: str, folder: Path) -> TrainConfig:
    """The family's experiment with two layers, 3 × 4 × 4 tokens and a step."""
    experiment, space, time_, *_ = FAMILIES[name]
    config = composed(f"experiment={experiment}", "runtime.precision=fp32", "logger=none")
    m = config.model
    m.height, m.width, m.num_frames, m.tile, m.max_sequence_length, m.weights = 4 * space, 4 * space, 2 * time_ + 1, [1, 2, 2], family_worlds.TEXT, "random"
    m.fps = family_worlds.FPS
    m.numbers = {**m.numbers, **LAYERS} | ({"num_layers": 1, "num_single_layers": 1} if name == "hunyuan_video" else {})
    if name == "ltx2":  # no experiment of its own: nothing prepares its text yet
        m.transformer, m.vae, m.numbers = "LTX2VideoTransformer3DModel", "AutoencoderKLLTX2Video", LAYERS
        config.lora = LoraConfig(rank=64, targets=list(lora.PROJECTIONS))
    if name == "mochi":
        m.transformer, m.vae, m.numbers, m.codec = "MochiTransformer3DModel", "AutoencoderKLMochi", LAYERS, CodecConfig(scale_temporal=6)
    config.output_dir, config.data.path, config.data.validation_clips = str(folder / "run"), str(folder / "shards"), 2
    config.policy.budget = 0.6
    check_train(config)
    return config


@pytest.mark.parametrize("name", FAMILIES)
def test_dry_run(name, tmp_path, capsys):
    found = report(settings(name, tmp_path))
    *_, millions = FAMILIES[name]
    teacher = next(role for role in found["roles"].values() if role.name.startswith("teacher"))
    assert found["tokens"] == 48 and round(teacher.parameters / 1e6) == millions
    assert "nothing was loaded" in capsys.readouterr().out and found["bytes"] > 4 * teacher.parameters


def one_step(name: str, folder: Path) -> None:
    """In a process of its own: builds the run, makes a step in the middle of it, prints what it took."""
    from usv.training.build import build
    from usv.training.ranks import start

    config, begun = settings(name, folder), time.perf_counter()
    run = build(config, *start(config))
    run.step = config.optim.steps // 2  # at the budget
    before, batch, built = [p.detach().clone() for _, p in run.engine.trained], next(iter(run.data)), time.perf_counter()
    values = program.step(run, batch).values
    seconds = time.perf_counter() - built
    moved = sum(not before[i].equal(p) for i, (_, p) in enumerate(run.engine.trained))
    assert 0 < values["optim/gradient_norm"] < math.inf and values["loss/velocity"] > 0 and values["sparsity/cost"] < 1
    assert moved > len(before) / 3, f"{moved} of {len(before)}"
    print(f"\n{name}: {sum(p.numel() for p in run.pipe.transformer.parameters()) / 1e6:.0f}M parameters, {sum(p.numel() for _, p in run.engine.trained) / 1e6:.1f}M "
          f"trained, built in {built - begun:.0f} s, a step in {seconds:.1f} s, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB; "
          f"loss {values['loss/velocity']:.2e}, gradient {values['optim/gradient_norm']:.2e}, density {values['sparsity/density']:.2f}, merged {values['sparsity/merged']:.2f}, {moved} of {len(before)} "
          "tensors moved", flush=True)  # fmt: skip


@pytest.mark.skipif(not os.environ.get("USV_FULL_WIDTH"), reason="up to 6 GB: USV_FULL_WIDTH=1")
@pytest.mark.parametrize("name", FAMILIES)
def test_one_step(name, tmp_path):
    _, _, _, channels, width, _ = FAMILIES[name]
    config = settings(name, tmp_path)
    shape = (channels, 3, config.model.height // config.model.codec.scale_spatial, config.model.width // config.model.codec.scale_spatial)
    family_worlds.write_shards(tmp_path / "shards", shape, width, name == "hunyuan_video15", clips=4)
    print(f"dry run: {report(config)['bytes'] / GIB:.2f} GiB")
    process = multiprocessing.get_context("spawn").Process(target=one_step, args=(name, tmp_path))
    process.start()
    process.join(580)
    assert process.exitcode == 0
