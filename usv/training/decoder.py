"""Distil a VAE's decoder into a tiny one (usv/sampling/decoder.py), from shards of latents.

    loss = mean |tiny(z + noise) − full(z)| + mean |their differences between neighbouring pixels|

It begins as the best linear decoder of each latent's 3×3 neighbours, in closed form (`start`). Generated latents are not quite an encoder's: noise of a random strength up to `NOISE` (of a channel's 1) teaches which of them to trust. The
second term keeps edges and asks for the same step across a patch's border as within it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from usv.bounds import Range
from usv.config import SettingError
from usv.cpu import keep_freed_memory
from usv.files import atomic_folder, check_folder, write_result
from usv.metrics import psnr
from usv.sampling.decoder import FOLDER, TinyDecoder, linear_taps, new_decoder
from usv.sampling.generate import best_place, decode, load_pipeline
from usv.training.data import ShardDataset
from usv.training.run import commit

NOISE, WARMUP, START_CLIPS, TEST_CLIPS = 0.1, 20, 24, 32
RANGES = {
    "steps": Range(0, 1_000_000), "batch_size": Range(1, 4096), "lr": Range(0, 1, above=True), "width": Range(4, 1024), "blocks": Range(0, 64),
}  # fmt: skip


def loss_of(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Both (B, F, 3, H, W); see the module."""
    error = made - wanted
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def start(tiny: TinyDecoder, latents: torch.Tensor, wanted: torch.Tensor) -> None:
    """Latents pass the first layers as their positive and negative parts, and the last convolution is that of least squared error.

    latents (B, C, T, h, w); wanted (B, F, 3, H, W) in [0, 1]. Channels beyond 2 C, and residual blocks, begin as nothing and learn.
    """
    layers, channels = tiny.tiny.decoder.layers, latents.shape[1]
    first, last = layers[0], layers[-1]
    eye = torch.eye(channels, device=first.weight.device)[: first.out_channels // 2]
    first.weight[: 2 * len(eye)], first.bias[: 2 * len(eye)] = 0.0, 0.0
    first.weight[: len(eye), :, 1, 1], first.weight[len(eye) : 2 * len(eye), :, 1, 1] = eye, -eye
    for block in layers[2:-1]:
        block.conv[-1].weight.zero_()
        block.conv[-1].bias.zero_()
    flat = latents.transpose(1, 2).flatten(0, 1) / tiny.tiny.config.scaling_factor
    padded = torch.cat([wanted[:, :1].expand(-1, tiny.frames - 1, -1, -1, -1), wanted], 1)  # of the first latent only one frame is known
    pixels = padded.unflatten(1, (latents.shape[2], tiny.frames)).flatten(2, 3).flatten(0, 1)
    weight, bias = linear_taps(layers[:-1](torch.tanh(flat / 3) * 3), torch.nn.functional.pixel_unshuffle(pixels, tiny.space))
    last.weight.copy_(weight)
    last.bias.copy_(bias)


def noisy(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each clip with noise of a strength of its own."""
    strength = NOISE * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
    return latents + strength * torch.randn(latents.shape, generator=generator)


def distil(pipe, data, steps: int, lr: float, width: int, blocks: int, seed: int = 0) -> TinyDecoder:
    """A decoder trained on the batches of `data`, at a learning rate that falls as a cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batches = iter(data)
    latents = torch.cat([batch["latents"] for batch in islice(batches, -(-START_CLIPS // data.batch_size))])
    tiny = new_decoder(pipe.vae, width, blocks, max(1.0, float(latents.abs().max()))).to(pipe.device)
    optimizer = torch.optim.AdamW(tiny.tiny.decoder.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    start(tiny, noisy(latents, generator).to(pipe.device), torch.cat([decode(pipe, part.to(pipe.device)) for part in latents.split(data.batch_size)]))
    for step, batch in enumerate(bar := tqdm(islice(batches, steps), total=steps, unit="step")):
        latents = batch["latents"]
        with torch.no_grad():
            wanted = decode(pipe, latents.to(pipe.device))
        loss = loss_of(tiny(noisy(latents, generator).to(pipe.device)), wanted)
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
    return tiny.eval().requires_grad_(False)


@torch.no_grad()
def measure(pipe, tiny: TinyDecoder, latents: torch.Tensor, repeats: int = 5) -> dict[str, float]:
    """How near the tiny decoder's clips are to the full one's, and seconds a clip of both, the least of interleaved calls."""
    full, fast = decode(pipe, latents.to(pipe.device)), decode(pipe, latents.to(pipe.device), tiny)
    seconds: dict[str, list[float]] = {"full": [], "tiny": []}
    for _ in range(repeats):
        for name, decoder in (("full", None), ("tiny", tiny)):
            begun = time.perf_counter()
            decode(pipe, latents[:8].to(pipe.device), decoder).cpu()
            seconds[name].append((time.perf_counter() - begun) / len(latents[:8]))
    near = psnr(fast.cpu(), full.cpu())
    return {
        "clips": len(latents), "psnr_mean": round(float(near.mean()), 2), "psnr_min": round(float(near.min()), 2),
        **{f"{name}_seconds": round(min(values), 5) for name, values in seconds.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/wan-mini", help="diffusers folder or hub id, whose VAE is distilled")
    parser.add_argument("--shards", required=True, help="of data/prepare.py, with a split val")
    parser.add_argument("--out", type=Path, help=f"folder to write (default: {FOLDER} in the model's folder)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=64, help="channels of its convolutions")
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks between the first and the last convolution")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run(args: argparse.Namespace) -> dict:
    """Train, measure on the split val, write; returns what decoder.json holds."""
    for name, range_ in RANGES.items():
        if not range_.holds(getattr(args, name)):
            raise SettingError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, accepted: {range_}")
    out = args.out or Path(args.model) / FOLDER
    check_folder(out.parent, "--out")
    keep_freed_memory()
    pipe = load_pipeline(args.model, *best_place(), text=False)
    data = ShardDataset(args.shards, args.batch_size, model=args.model)
    held_out = ShardDataset(args.shards, 1, split="val", shuffle=False, repeat=False, model=args.model)
    clips = torch.cat([batch["latents"] for batch in islice(held_out, TEST_CLIPS)])
    tiny = distil(pipe, data, args.steps, args.lr, args.width, args.blocks)
    report = {"commit": commit(), "model": args.model, "steps": args.steps, **measure(pipe, tiny, clips)}

    def write(folder: Path) -> None:
        tiny.tiny.save_pretrained(folder)
        write_result(folder / "decoder.json", report)

    atomic_folder(out, write)
    print(f"{out}: {report['psnr_mean']} dB of the full decoder on {report['clips']} held-out clips (worst {report['psnr_min']}), "
          f"{report['tiny_seconds']:.4f} s a clip, the full one {report['full_seconds']:.4f}")  # fmt: skip
    return report
