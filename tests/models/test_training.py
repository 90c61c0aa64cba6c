"""Every family but Wan learns by train.py: three steps under the learned policy with merging and pruning, resumed to the same weights,
saved and loaded to the same velocities."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import shards
import torch
from family_cases import COGVIDEOX, HUNYUAN, LTX, normal
from runs import interrupt, same, settings
from safetensors.torch import load_file, save

from usv.sampling.checkpoint import load_student
from usv.sparse.plan import Rung
from usv.training.shards import FORMAT

# transformer, its numbers, width of the packed text, compression of space: 3 × 5 × 3 tokens of 9 frames of 80 × 48
HUNYUAN15 = dict(in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3, num_refiner_layers=1,
                 text_embed_dim=12, text_embed_2_dim=8, image_embed_dim=6, rope_axes_dim=[4, 6, 6])  # fmt: skip
LTX2 = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
            audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=3, caption_channels=12)  # fmt: skip
MOCHI = dict(patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
             time_embed_dim=8)  # fmt: skip
FAMILIES = {
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", HUNYUAN | {"rope_axes_dim": [4, 6, 6]}, 12, 8),
    "cogvideox": ("CogVideoXTransformer3DModel", COGVIDEOX | {"use_rotary_positional_embeddings": True}, 12, 8),
    "ltx": ("LTXVideoTransformer3DModel", LTX, 12, 16),
    "hunyuan_video15": ("HunyuanVideo15Transformer3DModel", HUNYUAN15, 13, 16),
    "ltx2": ("LTX2VideoTransformer3DModel", LTX2, 24, 16),
    "mochi": ("MochiTransformer3DModel", MOCHI, 16, 8),
}
TEXT = 7


def write_shards(folder, latent_shape, width, tags=False, clips=10):
    """A folder as data/prepare.py writes it, of random clips and packed texts of several lengths."""
    folder.mkdir()
    splits = {}

    def text(rows, seed):
        packed = normal(rows, width, seed=seed)
        if tags:  # HunyuanVideo-1.5: of two encoders
            packed[:, -1] = torch.tensor([1.0, 2.0]).repeat(rows)[:rows]
        return packed

    for split, count in (("train", clips - 2), ("val", 2)):
        samples = [
            (f"{i:08d}", {"latents": normal(*latent_shape, seed=i).half(), "text": text(3 + i % (TEXT - 2), 50 + i)}, {"caption": "a clip"})
            for i in range(count)
        ]
        shards.write_shard(folder / f"{split}-00000.tar", iter(samples), report=[])
        splits[split] = {"num_samples": count, "shards": {f"{split}-00000.tar": count}}
    (folder / "empty.safetensors").write_bytes(save({"text": text(2, 99)}))
    index = {
        "format": FORMAT, "model": {"name": "tiny"}, "latent_shape": list(latent_shape), "text_dim": width, "max_sequence_length": TEXT, "height": 0,
        "width": 0, "num_frames": 0, "fps": 8, "splits": splits, "num_skipped": 0,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    """Settings of three steps of a family, merging and pruning decided, and its shards."""
    name, numbers, width, space = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    sides = (3, 80 // space, 48 // space)
    write_shards(folder / "shards", (numbers["in_channels"] if request.param != "hunyuan_video15" else 4, *sides), width, request.param == "hunyuan_video15")
    config = settings(folder / "none", folder / "shards", folder / "whole", steps=3)
    model = replace(config.model, height=80, width=48, num_frames=9, max_sequence_length=TEXT, tile=[2, 2, 2], weights="random", guidance_scale=2.0,
                    transformer=name, numbers=numbers)  # fmt: skip
    model.codec.scale_spatial, model.codec.scale_temporal = space, 4
    config.model = model
    config.logger.validate_every = 3
    return config


def test_three_steps_resume_load(world, watched):
    """Also: the gates and the policy have learned something, and a plan below the dense cost is what is saved."""
    whole, weights, record = watched(world)
    assert len(whole) == 3 and all(loss > 0 for loss, _ in whole.values())
    halved = copy.deepcopy(world)
    halved.output_dir = world.output_dir + "_halved"
    first, _, _ = watched(halved, {2: interrupt})
    rest, resumed, again = watched(halved)
    assert {**first, **rest} == whole and same(weights, resumed) and again["plan"] == record["plan"]

    base = getattr(diffusers, world.model.transformer).from_config({k: tuple(v) if isinstance(v, list) else v for k, v in world.model.numbers.items()})
    student = load_student(halved.output_dir + "/student", base.eval())
    assert all(torch.equal(value, weights[name]) for name, value in student.model.state_dict().items())
    latents = normal(1, *record_shape(world), seed=7)
    text = next(iter(load_file(world.data.path + "/empty.safetensors").values()))[None]
    once, twice = (student.model(latents, torch.tensor([500.0]), text, [Rung(1, 1)] * student.model.num_layers)[0].detach() for _ in range(2))
    assert once.shape == latents.shape and torch.equal(once, twice) and once.isfinite().all()


def record_shape(world):
    return json.loads(Path(world.data.path, "index.json").read_text())["latent_shape"]
