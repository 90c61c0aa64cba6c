"""Kandinsky, EasyAnimate, Mochi, Allegro, MotifVideo and Helios."""

from __future__ import annotations

import diffusers
import torch

from .parts import (
    FRAMES,
    NO_TEXT,
    SIZE,
    TEXT,
    WIDTH,
    AudioCodec,
    Codec,
    Stub,
    build,
    embeds,
    flow,
    image,
    masked,
    size,
    text,
    without,
)

KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": WIDTH, "in_text_dim2": 8, "time_dim": 8, "patch_size": (1, 2, 2),
    "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4), "visual_cond": True,
}  # fmt: skip


def kandinsky5(cls):
    parts = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None, "vae": Codec(), "scheduler": flow()}
    return getattr(diffusers, cls)(transformer=build("Kandinsky5Transformer3DModel", **KANDINSKY), **parts)


def kandinsky5_call(**more):
    call = {}
    for prefix, scale in (("", 1.0), ("negative_", 0.5)):
        call |= {f"{prefix}prompt_embeds_qwen": scale * text(1, TEXT, WIDTH), f"{prefix}prompt_embeds_clip": scale * text(1, 8),
                 f"{prefix}prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32)}  # fmt: skip
    return {**size(**call), "num_frames": 21, **more}  # of 13 frames and fewer diffusers' image to video makes NaN


def kandinsky5_t2v():
    return kandinsky5("Kandinsky5T2VPipeline"), kandinsky5_call()


def kandinsky5_i2v():
    return kandinsky5("Kandinsky5I2VPipeline"), kandinsky5_call(image=image())


def kandinsky6():
    model = build("Kandinsky6Transformer3DModel", **KANDINSKY, in_audio_dim=4, out_audio_dim=4)
    parts = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None, "vae": Codec(), "scheduler": flow(),
             "audio_vae": AudioCodec(), "vocoder": Stub()}  # fmt: skip
    call = {"pooled_prompt_embeds": text(1, 8), "negative_pooled_prompt_embeds": 0.5 * text(1, 8)}
    return diffusers.Kandinsky6TI2VAPipeline(transformer=model, **parts), size(**embeds(), **call)


EASY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 2,
    "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": WIDTH, "sample_width": 8, "sample_height": 8,
}  # fmt: skip


def easyanimate(cls, channels):
    parts = {**NO_TEXT, "vae": Codec(cache_mag_vae=False), "scheduler": flow()}
    return getattr(diffusers, cls)(transformer=build("EasyAnimateTransformer3DModel", **{**EASY, "in_channels": channels}), **parts)


def easyanimate_t2v():
    return easyanimate("EasyAnimatePipeline", 4), masked()


def pixels(frames=FRAMES, channels=3):
    return text(1, channels, frames, SIZE, SIZE).sigmoid()


def easyanimate_control():
    pipe = easyanimate("EasyAnimateControlPipeline", 12)
    encode = pipe.encode_prompt  # which diffusers 0.42.1 calls with an argument that it does not have
    pipe.encode_prompt = lambda *args, text_encoder_index=0, **kwargs: encode(*args, **kwargs)
    return pipe, masked(control_video=pixels())


def easyanimate_inpaint():
    call = {"video": pixels(), "mask_video": (pixels(channels=1) > 0.5).float() * 255}
    return easyanimate("EasyAnimateInpaintPipeline", 9), masked(**call)


def mochi():
    model = build(
        "MochiTransformer3DModel", patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        pooled_projection_dim=12, in_channels=4, text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=TEXT,
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(flow(), Codec(), None, None, model)
    masks = {f"{prefix}prompt_attention_mask": torch.tensor([mask]).bool()
             for prefix, mask in (("", [1, 1, 1, 1, 0, 0]), ("negative_", [1, 0, 0, 0, 0, 0]))}  # fmt: skip
    return pipe, size(**embeds(), **masks, num_frames=13)


def allegro():
    model = build(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=3, caption_channels=WIDTH,
    )  # fmt: skip
    return diffusers.AllegroPipeline(None, None, Codec(), model, diffusers.DDIMScheduler()), masked(
        num_frames=12, negative_prompt=None)


def motif(cls, **call):
    model = build(
        "MotifVideoTransformer3DModel", in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=2, num_decoder_layers=1, text_embed_dim=WIDTH, rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    pipe = getattr(diffusers, cls)(flow(), Codec(), None, None, model, guider, feature_extractor=None)
    return pipe, masked(**call)


def motif_t2v():
    return motif("MotifVideoPipeline")


def motif_i2v():
    return motif("MotifVideoImage2VideoPipeline", image=image(), prompt=None)


HELIOS = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_dim": (4, 4, 4), "is_amplify_history": True,
}  # fmt: skip


def helios(cls, scheduler, **more):
    parts = {**NO_TEXT, "vae": Codec(), "scheduler": scheduler, **more}
    return getattr(diffusers, cls)(transformer=build("HeliosTransformer3DModel", **HELIOS), **parts)


HELIOS_CALL = {"num_frames": 17, "num_latent_frames_per_chunk": 4, "history_sizes": [4, 2, 1]}


def helios_t2v():
    """Two chunks, the second with the first as its history."""
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    return helios("HeliosPipeline", scheduler), {**size(**embeds()), **HELIOS_CALL}


def helios_pyramid():
    call = {**without(size(**embeds()), "num_inference_steps"), **HELIOS_CALL, "height": 128, "width": 128}
    return helios("HeliosPyramidPipeline", diffusers.HeliosScheduler(gamma=0.3)), {**call, "pyramid_num_inference_steps_list": [1, 1, 1]}


PIPELINES = {
    "Kandinsky5T2VPipeline": kandinsky5_t2v,
    "Kandinsky5I2VPipeline": kandinsky5_i2v,
    "Kandinsky6TI2VAPipeline": kandinsky6,
    "EasyAnimatePipeline": easyanimate_t2v,
    "EasyAnimateControlPipeline": easyanimate_control,
    "EasyAnimateInpaintPipeline": easyanimate_inpaint,
    "MochiPipeline": mochi,
    "AllegroPipeline": allegro,
    "MotifVideoPipeline": motif_t2v,
    "MotifVideoImage2VideoPipeline": motif_i2v,
    "HeliosPipeline": helios_t2v,
    "HeliosPyramidPipeline": helios_pyramid,
}
