"""A tiny world of every family beside Wan for train.py: a pipeline's folder, shards of random clips and texts, and the settings of `model`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import shards  # of data/, by conftest.py
import tiny_pipelines
import torch
from safetensors.torch import save

from usv.config import CodecConfig, ModelConfig
from usv.training.shards import FORMAT, model_identity

TEXT, FPS = 7, 8  # rows of the longest text
FAMILIES = {  # pipeline, compression of space and time, width of the packed text
    "hunyuan_video": ("HunyuanVideoPipeline", 8, 4, 16),
    "hunyuan_video15": ("HunyuanVideo15Pipeline", 8, 4, 17),
    "cogvideox": ("CogVideoXPipeline", 8, 4, 16),
    "ltx": ("LTXPipeline", 16, 8, 16),
    "ltx2": ("LTX2Pipeline", 32, 8, 32),
    "mochi": ("MochiPipeline", 8, 6, 16),
}


@dataclass
class World:
    """model: settings of train.py. shards: their folder. call: arguments of the pipeline. stand_ins: its parts that lie in no folder."""

    model: ModelConfig
    shards: Path
    call: Mapping
    stand_ins: Mapping[str, torch.nn.Module]

    def pipeline(self, folder=None):
        """The pipeline of a folder, by default of the model's."""
        folder = folder or self.model.path
        absent = {name: None for name, part in json.loads(Path(folder, "model_index.json").read_text()).items() if part == [None, None]}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **{**absent, **self.stand_ins})
        pipe.set_progress_bar_config(disable=True)
        return pipe


def make(name: str, folder: Path) -> World:
    """Writes the world of a family into a folder."""
    kind, space, time, width = FAMILIES[name]
    pipe, call = tiny_pipelines.make(kind)
    if name == "hunyuan_video15":  # whose pipeline cannot be made without a codec
        vae = diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, spatial_compression_ratio=8)
        pipe.register_modules(vae=vae)
    stand_ins = {part: module for part, module in pipe.components.items() if isinstance(module, tiny_pipelines.Stub)}
    pipe.register_modules(**dict.fromkeys(stand_ins))
    pipe.save_pretrained(folder / "model")
    config = pipe.transformer.config
    model = ModelConfig(
        str(folder / "model"), call["height"], call["width"], call["num_frames"], TEXT, [1, 2, 2], num_inference_steps=2, guidance_scale=2.0,
        transformer=type(pipe.transformer).__name__, codec=CodecConfig(scale_spatial=space, scale_temporal=time),
    )  # fmt: skip
    shape = (config.get("out_channels") or config.in_channels, (call["num_frames"] - 1) // time + 1, call["height"] // space, call["width"] // space)
    return World(model, write_shards(folder / "shards", shape, width, name == "hunyuan_video15"), call, stand_ins)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_shards(folder: Path, latent_shape, width: int, tags: bool, clips: int = 10) -> Path:
    """A folder beside the model's as data/prepare.py writes it, of random clips and packed texts of several lengths. tags: HunyuanVideo-1.5's, of two encoders."""
    folder.mkdir()

    def text(rows, seed):
        packed = normal(rows, width, seed=seed)
        if tags:
            packed[:, -1] = torch.tensor([1.0, 2.0]).repeat(rows)[:rows]
        return packed

    splits = {}
    for split, count in (("train", clips - 2), ("val", 2)):
        samples = [
            (f"{i:08d}", {"latents": normal(*latent_shape, seed=i).half(), "text": text(3 + i % (TEXT - 2), 50 + i)}, {"caption": "a clip"})
            for i in range(count)
        ]
        shards.write_shard(folder / f"{split}-00000.tar", iter(samples), report=[])
        splits[split] = {"num_samples": count, "shards": {f"{split}-00000.tar": count}}
    (folder / "empty.safetensors").write_bytes(save({"text": text(2, 99)}))
    index = {
        "format": FORMAT, "model": model_identity(folder.parent / "model"), "latent_shape": list(latent_shape), "text_dim": width, "max_sequence_length": TEXT, "height": 0,
        "width": 0, "num_frames": 0, "fps": FPS, "splits": splits, "num_skipped": 0,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder
