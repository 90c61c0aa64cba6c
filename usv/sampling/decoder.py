"""A tiny decoder: latents to pixels for a fraction of the VAE's time, distilled from it (usv/training/decoder.py).

    python -m usv.decoder --model data/wan-mini --shards data/shards/camera     # trains one, data/wan-mini/tiny_decoder
    python infer.py ckpt=… decoder=tiny prompt=…                                # decodes with it

With few steps the VAE's decoder is what is left to wait for. The idea is TAESD's, and TAEHV's for video; the network is diffusers' `AutoencoderTiny`
at the latents' own resolution, so `AutoencoderTiny.from_pretrained` loads the folder. It sees one latent frame at a time and gives all
frames of it, as channels of a pixel shuffle.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from usv.config import SettingError

FOLDER = "tiny_decoder"  # in a model's folder


class TinyDecoder(torch.nn.Module):
    """Normalised latents (B, C, T, h, w) -> (B, F, 3, H, W), about [0, 1], not clamped; F = 1 + (T − 1) · frames.

    frames, space: how many a latent frame stands for, and pixels a latent's side. A VAE that compresses time makes one frame of the
    first latent, so of its frames the last is taken.
    """

    def __init__(self, tiny: AutoencoderTiny, frames: int, space: int):
        super().__init__()
        self.tiny, self.frames, self.space = tiny, frames, space

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        flat = latents.transpose(1, 2).flatten(0, 1) / self.tiny.config.scaling_factor
        video = F.pixel_shuffle(self.tiny.decode(flat, return_dict=False)[0], self.space)
        video = video.unflatten(1, (self.frames, 3)).unflatten(0, (latents.shape[0], latents.shape[2])).flatten(1, 2)
        return video[:, self.frames - 1 :] / 2 + 0.5


def new_decoder(vae, width: int = 64, blocks: int = 1, scale: float = 1.0) -> TinyDecoder:
    """An untrained one for the latents of a VAE. width: of its convolutions; blocks: residual blocks between the first and the last. scale:
    of the latents; the network bends what is beyond 1.5 of it, and flattens what is beyond 3 (tanh)."""
    frames, space = factors(vae)
    tiny = AutoencoderTiny(
        latent_channels=vae.config.z_dim, out_channels=3 * frames * space**2, decoder_block_out_channels=(width,), num_decoder_blocks=(blocks,),
        encoder_block_out_channels=(1,), num_encoder_blocks=(0,), scaling_factor=scale,
    )  # fmt: skip
    return TinyDecoder(tiny, frames, space)


def linear_taps(latents: torch.Tensor, pixels: torch.Tensor, ridge: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (M, C, 3, 3) and bias (M,) of the convolution from latents (N, C, h, w) to pixels (N, M, h, w) of least squared error, in closed form."""
    seen = F.unfold(latents, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
    gram = seen.T @ seen
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    taps = torch.linalg.solve(gram, seen.T @ pixels.flatten(2).transpose(1, 2).flatten(0, 1).double()).float()
    return taps[:-1].T.reshape(pixels.shape[1], latents.shape[1], 3, 3), taps[-1]


def factors(vae) -> tuple[int, int]:
    """Frames and pixels a side of one latent."""
    return vae.config.scale_factor_temporal, vae.config.scale_factor_spatial


def load_decoder(name: str, model: str, pipe) -> TinyDecoder | None:
    """decoder=full (None: the pipeline's own) | tiny (of the model's folder) | a folder. SettingError where there is none that fits."""
    if name == "full":
        return None
    folder = Path(model) / FOLDER if name == "tiny" else Path(name)
    accepted = f"accepted: full, tiny where the model's folder has {FOLDER}, or a folder of python -m usv.decoder"
    if not (folder / "config.json").is_file():
        raise SettingError(f"decoder: got {name}, {folder} holds no decoder; {accepted}")
    try:
        tiny = AutoencoderTiny.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingError(f"decoder: got {name}, {folder} cannot be read ({str(error).splitlines()[0][:200]}); {accepted}") from None
    frames, space = factors(pipe.vae)
    have, want = (tiny.config.latent_channels, tiny.config.out_channels), (pipe.vae.config.z_dim, 3 * frames * space**2)
    if have != want:
        raise SettingError(
            f"decoder: got {name} of {have[0]} latent and {have[1]} output channels, accepted: {want[0]} and {want[1]}, of a VAE that makes "
            f"{frames} frames of {space}x{space} pixels of a latent"
        )
    return TinyDecoder(tiny, frames, space).eval().requires_grad_(False).to(pipe.device)
