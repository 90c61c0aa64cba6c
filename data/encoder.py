"""A Wan-format model folder as an encoder: clips -> normalised latents, captions -> text embeddings.

    latents = (vae.encode(video).mode() − latents_mean) / latents_std      (WanPipeline undoes this before decoding)

Text goes through WanPipeline.encode_prompt itself, so cleaning, truncation and padding are the pipeline's.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import torch

# WanPipeline's own defaults; a model folder may state others in usv.json
WAN = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "max_sequence_length": 512}
ENCODER_STRIDE = 4  # AutoencoderKLWan.encode takes 1 frame, then groups of 4, and drops what is left over


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def model_defaults(model: Path) -> dict:
    """Clip size, fps and max_sequence_length that the model was made for."""
    own = read_json(model / "usv.json")
    fps = {"fps": 8} if own else {}
    return {**WAN, **fps, **{name: own[name] for name in WAN if name in own}}


def check_model(model: Path, text: bool) -> None:
    """ValueError unless `model` is a diffusers folder with the parts that are needed."""
    needed = ["vae/config.json"]
    if text:
        needed += ["text_encoder/config.json", "tokenizer", "model_index.json"]
    missing = [part for part in needed if not (model / part).exists()]
    if missing:
        raise ValueError(
            f"--model {model} lacks {', '.join(missing)}; accepted: a local folder as WanPipeline.save_pretrained "
            "writes it" + (" (--no-text needs its vae only)" if "vae/config.json" not in missing else "")
        )


def check_size(model: Path, height: int, width: int, num_frames: int) -> None:
    """ValueError, naming the nearest accepted value, for a clip size that the model cannot take."""
    vae = read_json(model / "vae" / "config.json")
    factor = vae.get("scale_factor_spatial", 8)
    patch = read_json(model / "transformer" / "config.json").get("patch_size", [1, 2, 2])
    multiple = math.lcm(16, factor * patch[1], factor * patch[2])  # 16: WanPipeline.check_inputs
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(f"--{name} {value}: a multiple of {multiple} is accepted, e.g. {nearest}")
    if num_frames < 1 or (num_frames - 1) % ENCODER_STRIDE:
        nearest = max(1, round((num_frames - 1) / ENCODER_STRIDE) * ENCODER_STRIDE + 1)
        raise ValueError(f"--num-frames {num_frames}: the VAE encodes 1 + 4k frames (it would drop the rest), "
                         f"e.g. {nearest}")  # fmt: skip


class Encoder:
    """VAE and text encoder of one model folder.

    Args:
        model: diffusers folder.
        max_sequence_length: tokens a caption may have; longer ones are cut, as in WanPipeline.
        text_dtype: in which the text encoder runs and its embeddings are stored.
        text: False loads the VAE only.
    """

    def __init__(self, model: Path, max_sequence_length: int, text_dtype=torch.float32, device="cpu", text=True):
        from diffusers import AutoencoderKLWan, WanPipeline

        self.device, self.length = torch.device(device), max_sequence_length
        self.pipe = None
        if text:
            listed = read_json(model / "model_index.json")
            unused = {name: None for name in ("transformer", "transformer_2") if name in listed}
            dtypes = {"text_encoder": text_dtype, "default": torch.float32}
            self.pipe = WanPipeline.from_pretrained(model, dtype=dtypes, **unused).to(self.device)
            self.vae = self.pipe.vae
        else:
            self.vae = AutoencoderKLWan.from_pretrained(model / "vae").to(self.device)
        config = self.vae.config
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        self.text = lru_cache(maxsize=512)(self._text)

    @torch.no_grad()
    def latents(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) uint8 -> normalised latents (B, C, T', h, w) fp16."""
        video = frames.to(self.device).permute(0, 2, 1, 3, 4).float() / 127.5 - 1
        mode = self.vae.encode(video).latent_dist.mode()
        return ((mode - self.mean) / self.std).half().cpu()

    @torch.no_grad()
    def _text(self, caption: str) -> torch.Tensor:
        """Caption -> (n, D) embedding of its n tokens, without the zero rows that pad it."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.pipe.tokenizer(prompt_clean(caption), truncation=True, max_length=self.length).input_ids
        padded, _ = self.pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.length, device=self.device
        )
        return padded[0, : len(tokens)].cpu()
