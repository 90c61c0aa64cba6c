"""Cosmos."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import torch.nn.functional as F
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available

from .parts import FRAMES, NO_TEXT, WIDTH, Codec, Stub, build, clip, embeds, flow, image, size, unipc, without

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


PIPELINES = {
    "CosmosTextToWorldPipeline": cosmos_t2w,
    "CosmosVideoToWorldPipeline": cosmos_v2w,
    "Cosmos2TextToImagePipeline": cosmos2_t2i,
    "Cosmos2VideoToWorldPipeline": cosmos2_v2w,
    "Cosmos2_5_PredictBasePipeline": cosmos25_predict,
    "Cosmos2_5_TransferPipeline": cosmos25_transfer,
}
