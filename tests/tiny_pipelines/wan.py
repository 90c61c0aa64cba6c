"""Wan and its kin: SkyReels, Lucy, ChronoEdit, AnyFlow."""

from __future__ import annotations

import diffusers
from PIL import Image

from .parts import FRAMES, NO_IMAGE, NO_TEXT, WIDTH, Codec, build, clip, embeds, eye, image, size, unipc, without

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip


def wan(cls="WanPipeline", vae=None, model="WanTransformer3DModel", scheduler=None, parts=None, **config):
    parts = {**NO_TEXT, "vae": vae or Codec(), "scheduler": scheduler or unipc(), **(parts or {})}
    return getattr(diffusers, cls)(transformer=build(model, **{**WAN, **config}), **parts)


def wan_t2v():
    return wan(), size(**embeds())


def wan_i2v():
    return wan("WanImageToVideoPipeline", in_channels=12, parts=NO_IMAGE), size(**embeds(), image=image())


def wan_v2v():
    return wan("WanVideoToVideoPipeline"), without(size(**embeds(), video=clip()), "num_frames")


def wan_vace():
    pipe = wan("WanVACEPipeline", model="WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=72)
    return pipe, size(**embeds())


def wan_animate():
    motion = {
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8,
        "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }  # fmt: skip
    pipe = wan("WanAnimatePipeline", model="WanAnimateTransformer3DModel", in_channels=12, latent_channels=4,
               num_attention_heads=2, attention_head_dim=12, image_dim=WIDTH, added_kv_proj_dim=24, parts=eye(), **motion)  # fmt: skip
    faces = [Image.new("RGB", (16, 16), (i, 90, 200)) for i in range(FRAMES)]
    call = {"image": image(), "pose_video": clip(), "face_video": faces, "segment_frame_length": FRAMES}
    return pipe, without(size(**embeds(num=512), **call), "num_frames")


def lucy():
    return wan("LucyEditPipeline", in_channels=8), size(**embeds(), video=clip())


SKYREELS = {"model": "SkyReelsV2Transformer3DModel", "added_kv_proj_dim": None, "image_dim": None}


def skyreels():
    return wan("SkyReelsV2Pipeline", **SKYREELS), size(**embeds())


def skyreels_i2v():
    config = {**SKYREELS, "added_kv_proj_dim": 24, "image_dim": WIDTH, "in_channels": 12}
    return wan("SkyReelsV2ImageToVideoPipeline", **config, parts=eye()), size(**embeds(num=512), image=image())


def skyreels_df():
    return wan("SkyReelsV2DiffusionForcingPipeline", **SKYREELS), size(**embeds(), prompt=None, base_num_frames=FRAMES)


def skyreels_df_i2v():
    pipe = wan("SkyReelsV2DiffusionForcingImageToVideoPipeline", **SKYREELS)
    return pipe, size(**embeds(), image=image(), base_num_frames=FRAMES)


def skyreels_df_v2v():
    pipe = wan("SkyReelsV2DiffusionForcingVideoToVideoPipeline", **SKYREELS)
    call = {"video": clip(), "overlap_history": 5, "base_num_frames": 9, "num_frames": 13}
    return pipe, {**size(**embeds()), **call}


def chronoedit():
    pipe = wan("ChronoEditPipeline", model="ChronoEditTransformer3DModel", in_channels=12, parts=eye(),
               image_dim=WIDTH, added_kv_proj_dim=24)  # fmt: skip
    return pipe, size(**embeds(num=512), image=image())


def anyflow():
    config = without(WAN, "cross_attn_norm")
    model = build("AnyFlowTransformer3DModel", **config)
    return diffusers.AnyFlowPipeline(None, None, model, Codec(), diffusers.FlowMapEulerDiscreteScheduler()), size(
        **without(embeds(), "negative_prompt_embeds"))


PIPELINES = {
    "WanPipeline": wan_t2v,
    "WanImageToVideoPipeline": wan_i2v,
    "WanVideoToVideoPipeline": wan_v2v,
    "WanVACEPipeline": wan_vace,
    "WanAnimatePipeline": wan_animate,
    "LucyEditPipeline": lucy,
    "SkyReelsV2Pipeline": skyreels,
    "SkyReelsV2ImageToVideoPipeline": skyreels_i2v,
    "SkyReelsV2DiffusionForcingPipeline": skyreels_df,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": skyreels_df_i2v,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": skyreels_df_v2v,
    "ChronoEditPipeline": chronoedit,
    "AnyFlowPipeline": anyflow,
}
