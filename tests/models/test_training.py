"""Every family but Wan, from its folder to its videos: three steps by train.py under the learned policy, merging and pruning, resumed to
the same weights; enabled on its pipeline; exported, whole and as adapters; loaded again to the same videos."""

import copy

import family_worlds
import pytest
import tiny_pipelines
import torch
from runs import interrupt, same, settings

import usv
from usv.config import LoraConfig, SettingError
from usv.models import lora
from usv.models.families import family_of
from usv.sampling.checkpoint import CheckpointError, load_student
from usv.sampling.export import export, export_file, export_lora


@pytest.fixture(scope="module", params=family_worlds.FAMILIES)
def world(request, tmp_path_factory):
    return family_worlds.make(request.param, tmp_path_factory.mktemp(request.param))


def three_steps(world, folder):
    config = settings(world.model.path, world.shards, folder, steps=3)
    config.model = copy.deepcopy(world.model)
    config.policy.budget = 0.6
    config.logger.validate_every = 3
    return config


def video(pipe, world):
    """Latents of an enabled pipeline, which has the size, steps and guidance of its student."""
    own = {*family_of(pipe.transformer).guidance, "height", "width", "num_frames", "num_inference_steps"}
    return tiny_pipelines.video(pipe, {name: value for name, value in world.call.items() if name not in own})


def test_from_folder_to_videos(world, watched, tmp_path):
    whole, weights, record = watched(three_steps(world, tmp_path / "whole"))
    assert len(whole) == 3 and all(loss > 0 for loss, _ in whole.values())
    halved = three_steps(world, tmp_path / "halved")
    first, _, _ = watched(halved, {2: interrupt})
    rest, resumed, again = watched(halved)
    assert {**first, **rest} == whole and same(weights, resumed) and again["plan"] == record["plan"]

    student, pipe = tmp_path / "halved" / "student", world.pipeline()
    own = tiny_pipelines.video(pipe, dict(world.call))
    usv.enable(pipe, student)
    made = video(pipe, world)
    assert made.shape == own.shape and made.isfinite().all() and not torch.equal(made, own)
    assert pipe._usv.record.mean_density() < 1 and pipe._usv.record.mean_merged() > 0

    out = export(student, world.model.path, tmp_path / "exported")
    exported = world.pipeline(out)
    assert type(exported) is pipe._usv.original_class
    usv.enable(exported, out)
    assert torch.equal(video(exported, world), made)
    with pytest.raises(CheckpointError, match=f"exported with.* load {type(world.pipeline()).__name__}.from_pretrained"):
        usv.enable(world.pipeline(), out)
    export(student, world.model.path, out, overwrite=True)
    with pytest.raises(CheckpointError, match="accepted: a student of a Wan transformer"):
        export_file(student, world.model.path, tmp_path / "student.safetensors")


def test_adapters_from_folder_to_videos(world, watched, tmp_path):
    """Trained as adapters, written as a LoRA that the family's pipeline loads; cut from whole weights for it as well."""
    config = three_steps(world, tmp_path / "run")
    config.lora = LoraConfig(rank=2, targets=list(lora.PROJECTIONS))
    config.optim.lr = 0.1
    watched(config)
    student, out = tmp_path / "run" / "student", tmp_path / "lora"
    pipe = world.pipeline()
    if not hasattr(pipe, "load_lora_weights"):
        with pytest.raises(SettingError, match="--lora: got a HunyuanVideo15Pipeline, which loads no LoRA"):
            export_lora(student, world.model.path, out)
        return
    own = video(usv.enable(world.pipeline(), base_of(world, student)), world)
    made = video(usv.enable(world.pipeline(), student), world)
    assert export_lora(student, world.model.path, out) == 1.0
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(video(usv.enable(pipe, out), world), made, rtol=1e-3, atol=1e-3 * float(made.abs().max()))
    assert (made - own).abs().max() > 0.01 * made.abs().max(), "the adapters matter"


def base_of(world, student):
    """The student with the weights of its base."""
    found = load_student(student, world.pipeline().transformer)
    found.model.transformer.load_state_dict(world.pipeline().transformer.state_dict())
    return found
