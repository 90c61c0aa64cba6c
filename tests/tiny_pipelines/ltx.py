"""LTX and LTX-2."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import torch
from torch import nn

from .parts import (
    NO_TEXT,
    TEXT,
    WIDTH,
    AudioCodec,
    Codec,
    Config,
    Stub,
    build,
    clip,
    flow,
    image,
    masked,
    size,
    text,
    without,
)

LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
    "num_layers": 2, "caption_channels": WIDTH,
}  # fmt: skip


def ltx(cls):
    parts = {**NO_TEXT, "vae": Codec(4, 8, 16), "scheduler": flow()}
    return getattr(diffusers, cls)(transformer=build("LTXVideoTransformer3DModel", **LTX), **parts)


def ltx_t2v():
    return ltx("LTXPipeline"), masked(num_frames=17)


def ltx_i2v():
    return ltx("LTXImageToVideoPipeline"), masked(num_frames=17, image=image())


def ltx_condition():
    """Four frames of a video at frame 8: condition tokens before the video's own."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    conditions = [LTXVideoCondition(video=clip(9), frame_index=8)]
    return ltx("LTXConditionPipeline"), masked(num_frames=17, conditions=conditions)


class Words(Stub):
    """Stands for tokenizer and text encoder."""

    model_max_length, padding_side = TEXT, "left"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(text(1, TEXT, WIDTH), requires_grad=False)

    def forward(self, texts, *_, **__):
        if isinstance(texts, torch.Tensor):
            return (self.weight.expand(len(texts), -1, -1),)
        ids = torch.zeros(1 if isinstance(texts, str) else len(texts), TEXT, dtype=torch.long)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def batch_decode(self, *_, **__):
        return [""]


def ltx_long():
    """Two windows of three latent frames."""
    pipe = ltx("LTXI2VLongMultiPromptPipeline")
    pipe.register_modules(tokenizer=Words(), text_encoder=Words())
    call = {"prompt": "a | b", "num_frames": 33, "temporal_tile_size": 24, "temporal_overlap": 8, "cond_image": image()}
    return pipe, {**size(), **call}


class Connectors(Stub):
    """Stands for LTX-2's text connectors: text for the video and for the audio."""

    def forward(self, prompt_embeds, attention_mask, *_, **__):
        return prompt_embeds, prompt_embeds, attention_mask


def ltx2(cls, scheduler=None, **parts):
    model = build(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2, caption_channels=WIDTH,
        rope_double_precision=False, vae_scale_factors=(8, 32, 32), perturbed_attn=True, **parts.pop("config", {}),
    )  # fmt: skip
    parts = {
        **NO_TEXT, "vae": Codec(4, 8, 32), "audio_vae": AudioCodec(), "connectors": Connectors(), "vocoder": None,
        "scheduler": scheduler or flow(), "transformer": model, **parts,
    }  # fmt: skip
    return getattr(diffusers, cls)(**parts)


LTX2_CALL = {"height": 128, "width": 128, "num_frames": 17, "spatio_temporal_guidance_blocks": [1]}


def ltx2_t2v():
    return ltx2("LTX2Pipeline"), masked(**LTX2_CALL)


def ltx2_i2v():
    return ltx2("LTX2ImageToVideoPipeline"), masked(**LTX2_CALL, image=image(), image_crf=0)


def ltx2_condition():
    """A key frame: condition tokens after the video's own."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return ltx2("LTX2ConditionPipeline"), masked(**LTX2_CALL, conditions=[LTX2VideoCondition(image(), index=1, crf=0)])


def reference():
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    return [LTX2ReferenceCondition(frames=clip(9))]


def ltx2_in_context():
    return ltx2("LTX2InContextPipeline"), masked(**LTX2_CALL, reference_conditions=reference())


def ltx2_hdr():
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition as Reference

    return ltx2("LTX2HDRPipeline"), masked(**LTX2_CALL, reference_conditions=[Reference(frames=clip(9))])


def ltx2_dfr():
    call = without(masked(negative=False, **LTX2_CALL), "num_inference_steps", "spatio_temporal_guidance_blocks")
    return ltx2("LTX2DFRPipeline", config={"use_keyframes_abs_pos_embedding": True}), {**call, "sigmas": [1.0, 0.5]}


class Doubler(Stub):
    """Stands for LTX-2's latent upsampler in time: n frames -> 2 n - 1."""

    config = Config(temporal_upsample=True, spatial_upsample=False)

    def forward(self, z, *_, **__):
        return z.repeat_interleave(2, 2)[:, :, :-1]


def ltx2_dfr_refine():
    call = {**masked(negative=False), "height": 128, "width": 128, "num_frames": 9, "sigmas": [0.75, 0.25]}
    call |= {"latents": text(1, 4, 5, 4, 4), "keyframes_latents": text(1, 4, 1, 4, 4), "keyframe_positions": [8],
             "audio_latents": text(1, 2, 8, 2), "frame_rate": 25.0}  # fmt: skip
    pipe = ltx2("LTX2DFRTemporalRefinePipeline", diffusers.LTXEulerAncestralRFScheduler(eta=1.0),
                temporal_latent_upsampler=Doubler(), config={"use_keyframes_abs_pos_embedding": True})  # fmt: skip
    return pipe, without(call, "num_inference_steps")


PIPELINES = {
    "LTXPipeline": ltx_t2v,
    "LTXImageToVideoPipeline": ltx_i2v,
    "LTXConditionPipeline": ltx_condition,
    "LTXI2VLongMultiPromptPipeline": ltx_long,
    "LTX2Pipeline": ltx2_t2v,
    "LTX2ImageToVideoPipeline": ltx2_i2v,
    "LTX2ConditionPipeline": ltx2_condition,
    "LTX2InContextPipeline": ltx2_in_context,
    "LTX2HDRPipeline": ltx2_hdr,
    "LTX2DFRPipeline": ltx2_dfr,
    "LTX2DFRTemporalRefinePipeline": ltx2_dfr_refine,
}
