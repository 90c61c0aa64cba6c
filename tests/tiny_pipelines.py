"""A tiny random instance of every video pipeline of diffusers whose transformer can run under a pattern, and a call of it.

    pipe, call = make("WanPipeline")
    latents = video(pipe, call)

Two blocks of width 24 to 32 on some 48 tokens, two steps, latents out. Prompts are random embeddings; a codec is `Codec`,
whose latents are a fixed projection of pooled pixels: what a pattern changes lies in the transformer alone.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    CogVideoXDDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available
from PIL import Image
from torch import nn
from transformers import BatchFeature

SIZE, FRAMES, TEXT, WIDTH = 64, 9, 6, 16  # pixels, frames, text tokens and their width


class Config(SimpleNamespace):
    """A codec's config, read by attribute, by key and with `in`."""

    def __getitem__(self, name):
        return getattr(self, name)

    def __contains__(self, name):
        return hasattr(self, name)

    def get(self, name, default=None):
        return getattr(self, name, default)


class Stub(nn.Module):
    """A module that says where it is."""

    dtype, device = torch.float32, torch.device("cpu")


class Encoded:
    """A distribution of latents that is certain, as an attribute and as the first of a tuple."""

    def __init__(self, z):
        self.latent_dist = SimpleNamespace(sample=lambda generator=None: z, mode=lambda: z, mean=z)

    def __getitem__(self, index):
        return (self.latent_dist,)[index]


class Codec(Stub):
    """Stands for a VAE: encode pools pixels and projects them to `channels`, decode repeats the first three of them.

    t, s: compression of time (first frame alone) and of either side. more: what a pipeline looks up in the config.
    """

    def __init__(self, channels=4, t=4, s=8, **more):
        super().__init__()
        self.channels, self.t, self.s = channels, t, s
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3 * channels).view(channels, 3), requires_grad=False)
        halvings, times = int(math.log2(s)), int(math.log2(t))
        self.temporal_compression_ratio, self.spatial_compression_ratio = t, s
        self.temperal_downsample = [False] * (halvings - times) + [True] * times
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))
        self.config = Config(**{
            "z_dim": channels, "latent_channels": channels, "in_channels": 3, "scaling_factor": 1.0, "shift_factor": None,
            "scale_factor_temporal": t, "scale_factor_spatial": s, "temporal_compression_ratio": t, "spatial_compression_ratio": s,
            "invert_scale_latents": False,
            "block_out_channels": [8] * (halvings + 1), "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels,
            "timestep_conditioning": False, "patch_size": None, **more,
        })  # fmt: skip

    def encode(self, x, return_dict=True):
        """(B, 3, T, H, W) or (B, 3, H, W) -> latents as a distribution that is certain."""
        flat = x.dim() == 4
        x = x.unsqueeze(2) if flat else x
        first, rest = F.avg_pool3d(x[:, :, :1], (1, self.s, self.s)), x[:, :, 1:]
        if rest.shape[2] >= self.t:
            first = torch.cat((first, F.avg_pool3d(rest, (self.t, self.s, self.s))), 2)
        z = torch.einsum("dc,bcthw->bdthw", self.weight, first[:, :3])
        z = z.squeeze(2) if flat else z
        return Encoded(z)

    def decode(self, z, *_, return_dict=True, **__):
        z = z[:, :1].expand(-1, 3, -1, -1, -1)
        frames = torch.cat((z[:, :, :1], z[:, :, 1:].repeat_interleave(self.t, 2)), 2)
        out = frames.repeat_interleave(self.s, 3).repeat_interleave(self.s, 4)
        return SimpleNamespace(sample=out) if return_dict else (out,)

    def enable_tiling(self, *_, **__):
        pass


def flow(**more):
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **more})


def unipc():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def text(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def embeds(width=WIDTH, num=TEXT):
    """Prompt and negative prompt."""
    both = text(2, 1, num, width)
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}


def size(**more):
    return {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "num_inference_steps": 2, "output_type": "latent", **more}


def image():
    ramp = np.arange(SIZE * SIZE * 3, dtype=np.uint32).reshape(SIZE, SIZE, 3)
    return Image.fromarray((ramp * 2654435761 >> 24).astype(np.uint8))


def clip(frames=FRAMES):
    return [image()] * frames


def build(cls, seed=0, **config):
    """A model with random weights, also where its own initialisation is zero and would hide what attention does."""
    torch.manual_seed(seed)
    model = getattr(diffusers, cls)(**config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def without(call, *names):
    return {name: value for name, value in call.items() if name not in names}


class Eye(Stub):
    """Stands for an image encoder and for its preprocessing: three tokens from the picture's mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH), requires_grad=False)

    def forward(self, pixel_values=None, images=None, **_):
        if images is not None:
            return BatchFeature({"pixel_values": torch.tensor(np.asarray(images, dtype=np.float32) / 255).reshape(1, -1)})
        tokens = self.weight + pixel_values.float().mean()
        return SimpleNamespace(last_hidden_state=tokens, hidden_states=[tokens, tokens])

    def preprocess(self, images, **_):
        return self(images=images)


# Wan and its kin ---------------------------------------------------------------------------------------------------

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip
NO_TEXT = {"tokenizer": None, "text_encoder": None}
NO_IMAGE = {"image_encoder": None, "image_processor": None}


def eye():
    return {"image_encoder": (encoder := Eye()), "image_processor": encoder}


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


# CogVideoX ---------------------------------------------------------------------------------------------------------

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


# HunyuanVideo ------------------------------------------------------------------------------------------------------

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


# LTX ---------------------------------------------------------------------------------------------------------------

LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
    "num_layers": 2, "caption_channels": WIDTH,
}  # fmt: skip


def masked(negative=True, mask=(1, 1, 1, 1, 0, 0), **more):
    """Prompts with a mask each."""
    call = embeds() if negative else without(embeds(), "negative_prompt_embeds")
    masks = {name.replace("embeds", "attention_mask"): torch.tensor([mask]) for name in call}
    return size(**call, **masks, **more)


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


class AudioCodec(Codec):
    mel_compression_ratio, temporal_compression_ratio, latent_hop_length = 4, 4, 1024

    def __init__(self):
        super().__init__(2, t=4, s=4, sample_rate=16000, mel_hop_length=160, mel_bins=8)
        self.latents_mean, self.latents_std = torch.zeros(4), torch.ones(4)


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


# Cosmos ------------------------------------------------------------------------------------------------------------

COSMOS = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2.0,
    "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (16, 8, 8), "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": True, "extra_pos_embed_type": "learnable",
}  # fmt: skip


def resize(image, size, interpolation):
    return F.interpolate(image, size=size, mode=interpolation)


if not is_torchvision_available():  # of which Cosmos takes one function, to resize a mask
    nearest = SimpleNamespace(functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    transformer_cosmos.transforms = controlnet_cosmos.transforms = nearest


class Safe(Stub):
    """Stands for the safety checker."""

    def check_text_safety(self, _):
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos(cls, scheduler, more=None, **config):
    parts = {**NO_TEXT, "vae": Codec(latents_mean=None) if "World" in cls and "2" not in cls else Codec(),
             "scheduler": scheduler, "safety_checker": Safe(), **(more or {})}  # fmt: skip
    pipe = getattr(diffusers, cls)(transformer=build("CosmosTransformer3DModel", **{**COSMOS, **config}), **parts)
    if hasattr(pipe, "sigma_max"):  # latents of size 80 leave two digits less for a comparison
        pipe.scheduler.register_to_config(sigma_max=1.0)
    return pipe


def cosmos_edm():
    return diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=1.0, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon", rho=7.0,
        final_sigmas_type="sigma_min",
    )  # fmt: skip


def cosmos_t2w():
    return cosmos("CosmosTextToWorldPipeline", cosmos_edm()), size(**embeds())


def cosmos_v2w():
    return cosmos("CosmosVideoToWorldPipeline", cosmos_edm(), in_channels=5), size(**embeds(), image=image())


def cosmos2_t2i():
    pipe = cosmos("Cosmos2TextToImagePipeline", flow(use_karras_sigmas=True), extra_pos_embed_type=None)
    return pipe, {**without(size(**embeds()), "num_frames"), "height": 128}


def cosmos2_v2w():
    pipe = cosmos("Cosmos2VideoToWorldPipeline", flow(use_karras_sigmas=True), in_channels=5, extra_pos_embed_type=None)
    return pipe, size(**embeds(), image=image())


def cosmos25_predict():
    pipe = cosmos("Cosmos2_5_PredictBasePipeline", unipc(), in_channels=5, extra_pos_embed_type=None,
                  use_crossattn_projection=True, crossattn_proj_in_channels=12, encoder_hidden_states_channels=WIDTH)  # fmt: skip
    return pipe, size(**embeds(12), video=clip(5))


def cosmos25_transfer():
    context = {"img_context_dim_in": 8, "img_context_dim_out": 32}
    shared = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 12, "encoder_hidden_states_channels": WIDTH}
    control = build(
        "CosmosControlNetModel", n_controlnet_blocks=1, in_channels=6, latent_channels=6, model_channels=32,
        num_attention_heads=2, attention_head_dim=16, mlp_ratio=2.0, text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(16, 8, 8),
        extra_pos_embed_type=None, **context, **shared,
    )  # fmt: skip
    pipe = cosmos("Cosmos2_5_TransferPipeline", unipc(), {"controlnet": control}, in_channels=5, extra_pos_embed_type=None,
                  controlnet_block_every_n=2, img_context_num_tokens=2, **context, **shared)  # fmt: skip
    return pipe, {**without(size(**embeds(12)), "num_frames"), "controls": clip(), "num_frames_per_chunk": FRAMES}


# Kandinsky, EasyAnimate, Mochi, Allegro, MotifVideo, Helios, AnyFlow ------------------------------------------------

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
    "CosmosTextToWorldPipeline": cosmos_t2w,
    "CosmosVideoToWorldPipeline": cosmos_v2w,
    "Cosmos2TextToImagePipeline": cosmos2_t2i,
    "Cosmos2VideoToWorldPipeline": cosmos2_v2w,
    "Cosmos2_5_PredictBasePipeline": cosmos25_predict,
    "Cosmos2_5_TransferPipeline": cosmos25_transfer,
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
    "AnyFlowPipeline": anyflow,
}


def make(name: str):
    """(pipeline, arguments of its call)."""
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


@torch.no_grad()
def video(pipe, call, seed=0):
    """The latents that a call makes, as one tensor."""
    with contextlib.redirect_stdout(None):
        out = pipe(**call, generator=torch.Generator().manual_seed(seed), return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack([torch.as_tensor(np.asarray(x)) for x in out]) if isinstance(out, list) else torch.as_tensor(out)


def watch_dense(monkeypatch):
    """A list that grows by the length of each sequence that attends to one of its own length by torch's dense attention."""
    dense, seen = F.scaled_dot_product_attention, []

    def spy(query, key, value, *more, **options):
        if query.shape[-2] == key.shape[-2]:
            seen.append(query.shape[-2])
        return dense(query, key, value, *more, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen
