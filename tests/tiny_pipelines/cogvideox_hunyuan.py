"""CogVideoX and its kin, HunyuanVideo and HunyuanVideo 1.5."""

from __future__ import annotations

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler

from .parts import FRAMES, NO_TEXT, TEXT, WIDTH, Codec, Eye, build, clip, embeds, flow, image, size, text, without

COG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": WIDTH, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": FRAMES, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
}  # fmt: skip


def cog(cls, model="CogVideoXTransformer3DModel", **config):
    parts = {**NO_TEXT, "vae": Codec(), "scheduler": CogVideoXDDIMScheduler()}
    return getattr(diffusers, cls)(transformer=build(model, **{**COG, **config}), **parts)


def cogvideox():
    return cog("CogVideoXPipeline"), size(**embeds())


def cogvideox_i2v():
    return cog("CogVideoXImageToVideoPipeline", in_channels=8), size(**embeds(), image=image())


def cogvideox_v2v():
    return cog("CogVideoXVideoToVideoPipeline"), without(size(**embeds(), video=clip()), "num_frames")


def cogvideox_fun():
    return cog("CogVideoXFunControlPipeline", in_channels=8), without(size(**embeds(), control_video=clip()), "num_frames")


def consisid():
    pipe = cog("ConsisIDPipeline", model="ConsisIDTransformer3DModel", in_channels=8, is_train_face=False)
    return pipe, size(**embeds(), image=image())


HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": WIDTH,
    "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip


def hunyuan(cls, model="HunyuanVideoTransformer3DModel", parts=None, **config):
    parts = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None, "vae": Codec(), "scheduler": flow(), **(parts or {})}
    return getattr(diffusers, cls)(transformer=build(model, **{**HUNYUAN, **config}), **parts)


def hunyuan_embeds(negative=False):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])  # two tokens of padding
    both = {"prompt_embeds": text(1, TEXT, WIDTH), "pooled_prompt_embeds": text(1, 8), "prompt_attention_mask": mask}
    more = {f"negative_{name}": value * 0.5 if value.is_floating_point() else value for name, value in both.items()}
    return {**both, **(more if negative else {})}


def hunyuan_t2v():
    return hunyuan("HunyuanVideoPipeline", guidance_embeds=True), size(**hunyuan_embeds())


def hunyuan_i2v():
    pipe = hunyuan("HunyuanVideoImageToVideoPipeline", image_condition_type="token_replace", guidance_embeds=True,
                   parts={"image_processor": None})  # fmt: skip
    return pipe, size(**hunyuan_embeds(), image=image())


def hunyuan_skyreels():
    pipe = hunyuan("HunyuanSkyreelsImageToVideoPipeline", in_channels=8, guidance_embeds=True)
    return pipe, size(**hunyuan_embeds(True), image=image())


def framepack():
    encoder = Eye()
    pipe = hunyuan("HunyuanVideoFramepackPipeline", model="HunyuanVideoFramepackTransformer3DModel", guidance_embeds=True,
                   has_image_proj=True, image_proj_dim=WIDTH, has_clean_x_embedder=True,
                   parts={"image_encoder": encoder, "feature_extractor": encoder})  # fmt: skip
    return pipe, size(**hunyuan_embeds(), image=image(), latent_window_size=3)


HUNYUAN15 = {
    "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
    "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": WIDTH, "text_embed_2_dim": 12,
    "image_embed_dim": WIDTH, "rope_axes_dim": (2, 4, 4), "target_size": 64,
}  # fmt: skip


def hunyuan15_embeds():
    mask, mask_2 = torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.tensor([[1, 1, 0]])
    call = {}
    for prefix, scale in (("", 1.0), ("negative_", 0.5)):
        call |= {f"{prefix}prompt_embeds": scale * text(1, TEXT, WIDTH), f"{prefix}prompt_embeds_mask": mask,
                 f"{prefix}prompt_embeds_2": scale * text(1, 3, 12), f"{prefix}prompt_embeds_mask_2": mask_2}  # fmt: skip
    return call


def hunyuan15(cls, **more):
    from diffusers import ClassifierFreeGuidance

    parts = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None, "vae": Codec(), "scheduler": flow(), **more}
    model = build("HunyuanVideo15Transformer3DModel", **HUNYUAN15)
    return getattr(diffusers, cls)(transformer=model, guider=ClassifierFreeGuidance(), **parts)


def hunyuan15_t2v():
    return hunyuan15("HunyuanVideo15Pipeline"), size(**hunyuan15_embeds())


def hunyuan15_i2v():
    encoder = Eye()
    pipe = hunyuan15("HunyuanVideo15ImageToVideoPipeline", image_encoder=encoder, feature_extractor=encoder)
    return pipe, without(size(**hunyuan15_embeds(), image=image()), "height", "width")


PIPELINES = {
    "CogVideoXPipeline": cogvideox,
    "CogVideoXImageToVideoPipeline": cogvideox_i2v,
    "CogVideoXVideoToVideoPipeline": cogvideox_v2v,
    "CogVideoXFunControlPipeline": cogvideox_fun,
    "ConsisIDPipeline": consisid,
    "HunyuanVideoPipeline": hunyuan_t2v,
    "HunyuanVideoImageToVideoPipeline": hunyuan_i2v,
    "HunyuanSkyreelsImageToVideoPipeline": hunyuan_skyreels,
    "HunyuanVideoFramepackPipeline": framepack,
    "HunyuanVideo15Pipeline": hunyuan15_t2v,
    "HunyuanVideo15ImageToVideoPipeline": hunyuan15_i2v,
}
