"""What the tiny pipelines are made of: stand-ins for codecs and encoders, and what their calls share."""

from __future__ import annotations

import math
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
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


NO_TEXT = {"tokenizer": None, "text_encoder": None}
NO_IMAGE = {"image_encoder": None, "image_processor": None}


def eye():
    return {"image_encoder": (encoder := Eye()), "image_processor": encoder}


def masked(negative=True, mask=(1, 1, 1, 1, 0, 0), **more):
    """Prompts with a mask each."""
    call = embeds() if negative else without(embeds(), "negative_prompt_embeds")
    masks = {name.replace("embeds", "attention_mask"): torch.tensor([mask]) for name in call}
    return size(**call, **masks, **more)


class AudioCodec(Codec):
    mel_compression_ratio, temporal_compression_ratio, latent_hop_length = 4, 4, 1024

    def __init__(self):
        super().__init__(2, t=4, s=4, sample_rate=16000, mel_hop_length=160, mel_bins=8)
        self.latents_mean, self.latents_std = torch.zeros(4), torch.ones(4)
