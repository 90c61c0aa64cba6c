"""Clips that the dense model makes itself: prompts to the latents its own sampler ends at.

A clip's noise is of its number in the plan, so it is the same whoever makes it and whenever; guidance leads away from the empty
prompt, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from encoder import Encoder
from shard_plan import Job, Settings
from sources import skip

from usv.config import ModelConfig
from usv.sampling.generate import denoised, levels_of, single_precision_rope
from usv.sampling.patterns import transformers_of

SEED_STRIDE = 1_000_003  # between the clips of two --seed


def taught(settings: Settings, plan: dict, job: Job, skipped: list[dict], encoder: Encoder, done: Callable[[int], None]) -> Iterator[tuple[str, dict, dict]]:
    """The samples of one shard, as `writing.samples` gives them; `skipped` gets what is not finite."""
    teacher, prepared = settings.teacher, ready(encoder)
    for begin in range(0, len(job.clips), teacher.batch_size):
        part = job.clips[begin : begin + teacher.batch_size]
        captions = [plan["sources"][index]["caption"] for _, index, _ in part]
        seeds = [settings.seed * SEED_STRIDE + number for number, _, _ in part]
        texts = [encoder.text(caption) for caption in captions]
        latents = sample(prepared, settings, texts, encoder.text(""), seeds).half().cpu()
        for (number, _, clip), caption, text, latent, seed in zip(part, captions, texts, latents, seeds, strict=True):
            done(1)
            if not latent.isfinite().all():
                skipped.append(skip(caption, "not finite: the teacher's latents in fp16", clip))
                continue
            yield f"{number:08d}", {"latents": latent, "text": text}, {"caption": caption, "source": "teacher", "clip": clip, "seed": seed}


def ready(encoder: Encoder):
    """The encoder's pipeline, quiet, with rotary tables in single precision as in training."""
    encoder.pipe.set_progress_bar_config(disable=True)
    for transformer in transformers_of(encoder.pipe).values():
        single_precision_rope(transformer)
    return encoder.pipe


@torch.no_grad()
def sample(pipe, settings: Settings, texts: list[torch.Tensor], empty: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """Normalised latents (B, C, T, h, w) of prompts whose embeddings are (n, D) each, without padding."""
    teacher, place = settings.teacher, {"device": pipe.device, "dtype": pipe.transformer.dtype}

    def padded(text: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(text.to(**place), (0, 0, 0, settings.max_sequence_length - len(text)))

    model = ModelConfig(
        str(settings.model), settings.height, settings.width, settings.num_frames, settings.max_sequence_length,
        num_inference_steps=teacher.num_inference_steps, guidance_scale=teacher.guidance_scale, flow_shift=teacher.flow_shift,
    )  # fmt: skip
    positive = torch.stack([padded(text) for text in texts])
    negative = padded(empty).expand_as(positive) if teacher.guidance_scale > 1 else None
    with levels_of(pipe, model):
        return denoised(pipe, model, positive, negative, seeds, teacher.num_inference_steps, teacher.guidance_scale)
