"""Prompts to videos through a WanPipeline, dense or enabled, with the time of each stage; a pipeline of any family from its folder."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, WanPipeline

from usv.config import ModelConfig, SettingError
from usv.sampling.decoder import TinyDecoder
from usv.sampling.enable import Enabled
from usv.sampling.patterns import transformers_of
from usv.sampling.pipeline_class import frames_argument
from usv.sampling.record import numbers_of, pipeline_index
from usv.sampling.sampler import with_shift

IMAGE_TO_VIDEO = "WanImageToVideoPipeline"  # by name: its file, once imported, says that CLIP's image processor would like torchvision
# A codec that keeps every frame makes diffusers say, for each call, that it rounds a number of frames it does not change.
for name in ("pipeline_wan", "pipeline_wan_i2v"):
    logging.getLogger(f"diffusers.pipelines.wan.{name}").addFilter(lambda record: "divisible by 1." not in record.getMessage())


@dataclass
class Generation:
    """videos (N, T, 3, H, W) float in [0, 1]; seconds by stage over all of them; forwards of one video."""

    videos: torch.Tensor
    seconds: dict[str, float]
    forwards: int


def best_place() -> tuple[torch.dtype, str]:
    """dtype and device in which a model generates fastest here: bf16 on a GPU, fp32 on a CPU."""
    return (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")


def latent_size(pipe, model: ModelConfig) -> tuple[int, int, int]:
    """(T, H, W) of a video's latents, by the codec of a pipeline."""
    space = pipe.vae_scale_factor_spatial
    return (model.num_frames - 1) // pipe.vae_scale_factor_temporal + 1, model.height // space, model.width // space


def load_pipeline(
    path: str, dtype: torch.dtype = torch.float32, device: str = "cpu", text: bool = True, expert: str | None = None,
    kind: type[DiffusionPipeline] = WanPipeline,
) -> DiffusionPipeline:  # fmt: skip
    """A folder or hub id in diffusers' format as a WanPipeline, or the WanImageToVideoPipeline that it says it is; without `text` it has no text
    and image encoders and takes embeddings.

    expert: high | low, of two transformers the one to load, as if it were the only one. kind: DiffusionPipeline for the class that the
    folder itself names, of any family.

    SettingError when it cannot be had.
    """
    without = {} if text else {"text_encoder": None, "tokenizer": None}
    without |= {"high": {"transformer_2": None}, "low": {"transformer": None}, None: {}}[expert]
    if kind is WanPipeline and says_image_to_video(path):
        kind, without = getattr(diffusers, IMAGE_TO_VIDEO), without | ({} if text else {"image_encoder": None, "image_processor": None})
    if kind is not WanPipeline:  # of parts that a folder was saved without diffusers wants to be told
        without |= {name: None for name, entry in pipeline_index(path).items() if entry == [None, None]}
    for file in Path(path).glob("transformer*/config.json"):
        numbers_of(file)
    try:
        pipe = kind.from_pretrained(path, dtype=dtype, **without)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"model.path={path}: no {'Wan ' if kind is WanPipeline else ''}pipeline could be loaded ({str(error).splitlines()[0][:200]}); give a diffusers folder or a "
            "reachable hub id, or use the embedded default model.path=data/wan-mini"
        ) from None
    for part in (pipe.vae, getattr(pipe, "image_encoder", None)):  # as the models' cards run them
        if part is not None and part.dtype != torch.float32:
            part.to(torch.float32)
    if expert == "low":
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, None
    if expert is not None:
        pipe.register_to_config(boundary_ratio=None)
    for transformer in transformers_of(pipe).values():
        single_precision_rope(transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def says_image_to_video(path: str) -> bool:
    """Whether a folder or hub id names the image-to-video pipeline as its own; False where nothing can be read, which loading it will say."""
    try:
        return DiffusionPipeline.load_config(path).get("_class_name") == IMAGE_TO_VIDEO
    except (OSError, ValueError):
        return False


def prompts_of(path: Path, option: str) -> list[str]:
    """The prompts of a text file, one a line; lines that begin with # are passed over. SettingError, begun by `option`, for any other file."""
    if not path.is_file():
        raise SettingError(f"{option}{path}: no such file; give a text file with one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]  # splitlines: at U+2028 too
    except UnicodeDecodeError as error:
        raise SettingError(f"{option}{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise SettingError(f"{option}{path}: holds no prompt; put one on each line")
    return lines


def single_precision_rope(transformer) -> None:
    """fp64 tables, which Wan keeps, would make every query and key of the dense model fp64."""
    rope = getattr(transformer, "rope", None)
    if hasattr(rope, "freqs_cos"):
        rope.freqs_cos, rope.freqs_sin = rope.freqs_cos.float(), rope.freqs_sin.float()


def generate(pipe: WanPipeline, model: ModelConfig, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 4, *args, **kwargs) -> Generation:
    """All of `generated` together, in memory."""
    parts = list(generated(pipe, model, prompts, seeds, batch_size, *args, **kwargs))
    return Generation(torch.cat([part.videos for part in parts]), summed(part.seconds for part in parts), parts[0].forwards)


def denoised(pipe: WanPipeline, model: ModelConfig, positive: torch.Tensor, negative: torch.Tensor | None, seeds: Sequence[int], steps: int, scale: float, images: Sequence = ()) -> torch.Tensor:
    """Normalised latents (B, C, T, h, w) of a batch by the pipeline's own scheduler; positive, negative (B, L, D): embeddings of prompts and of what
    guidance leads away from; images: the given first and last frame, of a pipeline that takes them."""
    enabled = isinstance(getattr(pipe, "_usv", None), Enabled)
    return pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, height=model.height, width=model.width,
        num_frames=model.num_frames if enabled else frames_argument(pipe, model.num_frames), num_inference_steps=steps, guidance_scale=scale,
        generator=[torch.Generator().manual_seed(int(n)) for n in seeds], output_type="latent", max_sequence_length=model.max_sequence_length,
        **dict(zip(("image", "last_image"), images)),
    ).frames  # fmt: skip


def summed(seconds: Iterable[dict[str, float]]) -> dict[str, float]:
    """Seconds by stage over several batches."""
    total: dict[str, float] = {}
    for part in seconds:
        total = {stage: total.get(stage, 0.0) + value for stage, value in part.items()}
    return total


@torch.no_grad()
def generated(
    pipe: WanPipeline,
    model: ModelConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    progress=None,
    embeds: torch.Tensor | None = None,
    empty: torch.Tensor | None = None,
    decoder: TinyDecoder | None = None,
    images: Sequence = (),
    conditions: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Generation]:
    """One video for each (prompt, seed), a batch at a time; the start noise depends on the seed alone, not on batching or method.

    embeds (N, L, D) and empty (L, D): embeddings of the prompts and of the empty one, instead of asking the text encoder.
    images: of image to video, PIL or (1, 3, H, W) in [0, 1]: the first frame, or the first and the last, of all videos. conditions: instead
    of images what data/prepare.py made of them, (N, …) by name; videos are then made one by one.
    decoder: instead of the VAE's (usv/sampling/decoder.py). guidance_scale None: the model's own for a dense pipeline, for an enabled one 1, or what a router's student was recorded with. A prompt that is cut is named, on stderr.
    """
    enabled = isinstance(getattr(pipe, "_usv", None), Enabled)  # a training-free pattern keeps the model's guidance
    own = pipe._usv.student.sampling.get("guidance_scale", 1.0) if enabled else model.guidance_scale
    scale = guidance_scale if guidance_scale is not None else own
    steps = num_inference_steps or model.num_inference_steps
    if conditions:
        images, batch_size = [torch.zeros(1, 3, model.height, model.width)], 1
    else:
        check_images(pipe, images)
    for start in range(0, len(prompts), batch_size):
        texts, numbers = list(prompts[start : start + batch_size]), seeds[start : start + batch_size]
        given = prepared(pipe, {name: value[start] for name, value in conditions.items()}) if conditions else nullcontext()
        with given, nullcontext() if enabled else levels_of(pipe, model):  # a student has brought its own
            begun = now()
            if embeds is None:
                say_cut(pipe, texts, model.max_sequence_length)
                positive, negative = pipe.encode_prompt(
                    texts, "", scale > 1, max_sequence_length=model.max_sequence_length, device=pipe._execution_device
                )
            else:
                positive = embeds[start : start + batch_size].to(pipe._execution_device, pipe.transformer.dtype)
                negative = empty.to(positive).expand_as(positive) if scale > 1 else None
            encoded = now()
            latents = denoised(pipe, model, positive, negative, numbers, steps, scale, images)
            sampled = now()
            videos = decode(pipe, latents, decoder).cpu()
            seconds = {"text": encoded - begun, "denoise": sampled - encoded, "decode": now() - sampled}
        if progress is not None:
            progress.update(len(texts))
        yield Generation(videos, seconds, steps * (2 if scale > 1 else 1))


def takes_image(pipe: DiffusionPipeline) -> bool:
    """Whether its videos begin with a given frame."""
    return any(cls.__name__ == IMAGE_TO_VIDEO for cls in type(pipe).__mro__)


def check_images(pipe: DiffusionPipeline, images: Sequence) -> None:
    """SettingError where the pipeline is given other frames (first, last) than it makes videos of."""
    got = ("none", "the first frame", "the first and the last frame")[len(images)]
    if not takes_image(pipe):
        accepted = ("none",)
    else:
        config = transformers_of(pipe)["transformer"].config
        first_only = pipe.config.expand_timesteps or (config.image_dim is not None and config.pos_embed_seq_len is None)
        accepted = ("the first frame",) if first_only else ("the first and the last frame",) if config.pos_embed_seq_len is not None else (
            "the first frame", "the first and the last frame")  # fmt: skip
    if got not in accepted:
        raise SettingError(f"image, last_image: got {got} for a {type(pipe).__name__} of this model, accepted: {' or '.join(accepted)}")


@contextmanager
def prepared(pipe: DiffusionPipeline, conditions: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """An image-to-video pipeline with one clip's conditions, as data/prepare.py made them by the pipeline's own methods, whatever image it is called with."""
    own = pipe.prepare_latents

    def prepare_latents(*args, **kwargs):
        noise, made, *mask = own(*args, **kwargs)
        return noise, conditions["image_latents"][None].to(made), *mask

    pipe.prepare_latents = prepare_latents
    if "image_embeds" in conditions:
        pipe.encode_image = lambda image, device=None: conditions["image_embeds"].to(device)
    try:
        yield
    finally:
        for name in ("prepare_latents", "encode_image"):
            vars(pipe).pop(name, None)


SAID: set[tuple[str, int]] = set()  # prompts already named: methods are compared on the same ones


def say_cut(pipe: WanPipeline, texts: Sequence[str], limit: int) -> None:
    """Name on stderr each prompt longer than the model is given, and where it ends."""
    for text in dict.fromkeys(texts):
        if (text, limit) not in SAID and (found := cut_at(pipe.tokenizer, text, limit)) is not None:
            SAID.add((text, limit))
            tokens, kept = found
            print(f"prompt cut: {tokens} tokens, model.max_sequence_length is {limit}; the model reads “{kept}” and nothing after it", file=sys.stderr)


def cut_at(tokenizer, text: str, limit: int) -> tuple[int, str] | None:
    """(tokens of a text, its part that `limit` tokens hold); None where all of it fits."""
    tokens = tokenizer(text, add_special_tokens=True).input_ids
    if len(tokens) <= limit:
        return None
    return len(tokens), tokenizer.decode(tokenizer(text, max_length=limit, truncation=True).input_ids, skip_special_tokens=True)


@contextmanager
def levels_of(pipe: WanPipeline, model: ModelConfig) -> Iterator[None]:
    """The pipeline with the flow shift of the settings, which its scheduler need not have."""
    own = pipe.scheduler
    pipe.scheduler = with_shift(own, model.flow_shift)
    try:
        yield
    finally:
        pipe.scheduler = own


def now() -> float:
    """Seconds, after everything that was launched has ended: a stage's last kernels belong to it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def decode(pipe: WanPipeline, latents: torch.Tensor, decoder: TinyDecoder | None = None) -> torch.Tensor:
    """Normalised latents (B, C, T, h, w) -> (B, F, 3, H, W) in [0, 1], as WanPipeline does it, or by a decoder of its own."""
    if decoder is not None:
        return decoder(latents.float()).clamp(0, 1)
    vae = pipe.vae
    mean, std = (torch.tensor(x, device=latents.device).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    video = vae.decode(latents.to(vae.dtype) * std + mean, return_dict=False)[0]
    pipe.maybe_free_model_hooks()  # under model offload the VAE would stay
    return (video.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


