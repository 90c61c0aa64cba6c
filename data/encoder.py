"""A diffusers folder as an encoder: clips -> normalised latents, captions -> text embeddings.

    latents = (vae.encode(video).mode() − latents_mean) · scaling_factor / latents_std      (pipelines undo this before decoding)

Of image to video (a WanImageToVideoPipeline) the first frame, in FLF2V also the last, goes through the pipeline's own preprocessing,
`prepare_latents` and `encode_image`: what a clip is trained with is what the pipeline makes of that frame.

Text goes through the pipeline's own encode_prompt, so template, cleaning, truncation and padding are the pipeline's; what it gives for a
caption is packed into one matrix, as `Family.inputs` of usv/models takes it.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

# WanPipeline's own defaults; a model folder may state others in usv.json
WAN = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "max_sequence_length": 512}
IMAGE_TEXT = 512  # tokens of the text beside image embeddings: diffusers tells the two apart by it
ENCODER_STRIDE = 4  # AutoencoderKLWan.encode takes 1 frame, then groups of 4, and drops what is left over


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def model_defaults(model: Path) -> dict:
    """Clip size, fps and max_sequence_length that the model was made for."""
    own = read_json(model / "usv.json")
    fps = {"fps": 8} if own else {}
    return {**WAN, **fps, **{name: own[name] for name in WAN if name in own}}


def given_frames(model: Path) -> int:
    """Frames of a clip that a model is given: 0, text to video; 1, the first; 2, the first and the last. Its folder says so."""
    if read_json(model / "model_index.json").get("_class_name") != "WanImageToVideoPipeline":
        return 0
    return 1 if read_json(model / "transformer" / "config.json").get("pos_embed_seq_len") is None else 2


def embeds_images(model: Path) -> bool:
    """Whether a model is also given the embeddings of its image encoder (Wan 2.1)."""
    return given_frames(model) > 0 and read_json(model / "transformer" / "config.json").get("image_dim") is not None


def check_model(model: Path, text: bool, length: int = IMAGE_TEXT, transformer: bool = False) -> None:
    """ValueError unless `model` is a diffusers folder with the parts that are needed; with its transformer, of a Wan. length: tokens of a caption."""
    needed = ["vae/config.json"]
    if embeds_images(model):
        needed += ["image_encoder/config.json", "image_processor"]
        if length != IMAGE_TEXT:
            raise ValueError(f"--max-sequence-length {length}: {IMAGE_TEXT} is accepted for {model}, whose text and image embeddings are told apart by it")
    if text:
        needed += ["text_encoder/config.json", "tokenizer", "model_index.json"]
    if transformer:
        needed += ["transformer/config.json", "scheduler"]
    missing = [part for part in needed if not (model / part).exists()]
    if missing:
        raise ValueError(
            f"--model {model} lacks {', '.join(missing)}; accepted: a local folder as WanPipeline.save_pretrained "
            "writes it" + (" (--no-text needs its vae only)" if "vae/config.json" not in missing and not transformer else "")
        )
    if transformer and (found := read_json(model / "model_index.json").get("_class_name")) != "WanPipeline":
        raise ValueError(f"--model {model}: got a {found}, accepted: a WanPipeline, whose sampler makes the clips")


def check_size(model: Path, height: int, width: int, num_frames: int) -> None:
    """ValueError, naming the nearest accepted value, for a clip size that the model cannot take."""
    vae = read_json(model / "vae" / "config.json")
    ltx = vae.get("_class_name") == "AutoencoderKLLTXVideo"
    factor = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or (32 if ltx else 8)
    stride = 8 if ltx else ENCODER_STRIDE
    patch = read_json(model / "transformer" / "config.json").get("patch_size", [1, 2, 2])
    patch = [1, patch, patch] if isinstance(patch, int) else patch
    multiple = math.lcm(16, factor * patch[1], factor * patch[2])  # 16: WanPipeline.check_inputs
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(f"--{name} {value}: a multiple of {multiple} is accepted, e.g. {nearest}")
    if num_frames < 1 or (num_frames - 1) % stride:
        nearest = max(1, round((num_frames - 1) / stride) * stride + 1)
        raise ValueError(f"--num-frames {num_frames}: the VAE encodes 1 + {stride}k frames (it would drop the rest), "
                         f"e.g. {nearest}")  # fmt: skip


def normalised(vae, z: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, T, h, w) of a VAE as its transformer takes them. What a VAE does not state is 0, 1 and 1."""

    def stated(name: str, default: float) -> torch.Tensor:
        value = getattr(vae.config, name, None)
        value = getattr(vae, name, None) if value is None else value  # LTX keeps them as buffers
        return torch.as_tensor(default if value is None else value, device=z.device, dtype=z.dtype).view(1, -1, 1, 1, 1)

    return (z - stated("latents_mean", 0.0)) * stated("scaling_factor", 1.0) / stated("latents_std", 1.0)


def packed_text(pipe, caption: str, length: int) -> torch.Tensor:
    """(n, E): what the pipeline's `encode_prompt` gives for a caption in one matrix, without rows that are padding.

    ValueError for a pipeline whose text is not known.
    """
    name, device = type(pipe).__name__, pipe.device
    if name.startswith("HunyuanVideo15"):
        words, mask, glyphs, glyph_mask = pipe.encode_prompt(caption, device=device)
        parts = [words[0, mask[0].bool()], glyphs[0, glyph_mask[0].bool()]]
        width = max(part.shape[-1] for part in parts)
        tagged = [F.pad(part, (0, width - part.shape[-1] + 1), value=0.0) for part in parts]
        for tag, part in enumerate(tagged, 1):
            part[:, -1] = tag
        return torch.cat(tagged)
    if name.startswith("HunyuanVideo"):
        words, pooled, mask = pipe.encode_prompt(caption, device=device, max_sequence_length=length - 1)
        return torch.cat((F.pad(pooled, (0, words.shape[-1] - pooled.shape[-1])), words[0, mask[0].bool()]))
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": device}
    if name.startswith("CogVideoX"):  # padding is attended, so it is kept
        return pipe.encode_prompt(caption, **options)[0][0]
    if name.startswith(("LTX", "Mochi")) and not name.startswith("LTX2"):
        words, mask = pipe.encode_prompt(caption, **options)[:2]
        return words[0, mask[0].bool()]
    raise ValueError(f"--model: got a {name}, accepted: one of Wan, HunyuanVideo, HunyuanVideo15, CogVideoX, LTX, Mochi")


class Encoder:
    """VAE and text encoder of one model folder.

    Args:
        model: diffusers folder.
        max_sequence_length: tokens a caption may have; longer ones are cut, as in WanPipeline.
        text_dtype: in which the text encoder runs and its embeddings are stored.
        text: False loads no text encoder.
        transformer: dtype of the denoiser, for clips that the model makes itself; None does not load it.
    """

    def __init__(self, model: Path, max_sequence_length: int, text_dtype=torch.float32, device="cpu", text=True, transformer=None):
        from diffusers import AutoModel, DiffusionPipeline

        self.device, self.length = torch.device(device), max_sequence_length
        self.pipe = None
        self.given, self.embeds = given_frames(model), embeds_images(model)
        if text or self.given:
            listed = read_json(model / "model_index.json")
            denoisers = [name for name in ("transformer", "transformer_2") if name in listed]
            unused = {} if transformer else dict.fromkeys(denoisers)
            unused |= {} if text else {"text_encoder": None, "tokenizer": None}
            dtypes = {"text_encoder": text_dtype, "default": torch.float32} | (dict.fromkeys(denoisers, transformer) if transformer else {})
            self.pipe = DiffusionPipeline.from_pretrained(model, dtype=dtypes, **unused).to(self.device)
            self.vae = self.pipe.vae
        else:
            self.vae = AutoModel.from_pretrained(str(model / "vae")).to(self.device)
        self.text = lru_cache(maxsize=512)(self._text)

    @torch.no_grad()
    def latents(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, T, 3, H, W) uint8 -> normalised latents (B, C, T', h, w) fp16."""
        video = frames.to(self.device).permute(0, 2, 1, 3, 4).float() / 127.5 - 1
        mode = self.vae.encode(video).latent_dist.mode()
        return normalised(self.vae, mode).half().cpu()

    @torch.no_grad()
    def conditions(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is given of a clip (T, 3, H, W) uint8, in fp16: image_latents (C, T', h, w), as they are concatenated to the latents
        (TI2V-5B: of the first frame alone), and image_embeds (n, N, D) of its n given frames; {} of text to video."""
        if not self.given:
            return {}
        pipe, (num, _, height, width) = self.pipe, frames.shape
        pictures = [Image.fromarray(frames[i].permute(1, 2, 0).numpy()) for i in (0, -1)[: self.given]]
        first, *last = (pipe.video_processor.preprocess(x, height=height, width=width).to(self.device, torch.float32) for x in pictures)
        size = {"height": height, "width": width, "num_frames": num, "dtype": torch.float32, "device": self.device}
        unused = first.new_zeros(1)  # in place of the noise
        made = pipe.prepare_latents(first, 1, pipe.vae.config.z_dim, **size, latents=unused, last_image=last[0] if last else None)
        found = {"image_latents": made[1][0]}
        if self.embeds:
            found["image_embeds"] = pipe.encode_image(pictures, self.device)
        return {name: value.half().cpu() for name, value in found.items()}

    @torch.no_grad()
    def _text(self, caption: str) -> torch.Tensor:
        """Caption -> (n, D) embedding of its n tokens, without the zero rows that pad it."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        if not type(self.pipe).__name__.startswith("Wan"):
            return packed_text(self.pipe, caption, self.length).cpu()
        tokens = self.pipe.tokenizer(prompt_clean(caption), truncation=True, max_length=self.length).input_ids
        padded, _ = self.pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.length, device=self.device
        )
        return padded[0, : len(tokens)].cpu()
