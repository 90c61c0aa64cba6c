"""What making videos will need, before anything is loaded:  python infer.py model=wan_1_3b ckpt=STUDENT dry_run=true

    offload=none    all networks on the device       model   the one at work       group   two layers at a time, by a stream
    peak = largest over the stages, text, denoising, decoding, of the weights that are there and what the stage computes with

Weights are bf16, the VAE's fp32, as `best_place` and `load_pipeline` have them on a GPU. With a student the pipeline's own transformer
stays beside it. Decoding by AutoencoderKLWan holds 22 kB a pixel of one frame at 96 channels, however many frames (measured on it in fp32 on
a CPU by torch's profiler: 20.6 to 21.7 kB at 64×64 to 128×64, 2 to 5 latent frames); of other VAEs only the weights are counted. An estimate: nothing was run.
"""

from __future__ import annotations

from torch import nn

from usv.config import InferConfig, SettingError, TrainConfig
from usv.models.families import family_of
from usv.models.protocol import sides_of
from usv.sparse.cost import ModelShape
from usv.training.dry_run import GIB, GPUS, forward_bytes, meta_networks, token_grid

DECODING = 22_000  # bytes a pixel
TILE = 256  # pixels a side: of a tile of AutoencoderKLWan, by default


def largest_leaf(network: nn.Module) -> int:
    """Parameters of the layer that has most of its own."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in network.modules())


def stages(config: InferConfig) -> dict[str, dict[str, float]]:
    """Bytes on the device by stage, under config.offload: weights that are there and work. SettingError as the models' folders are read."""
    settings = TrainConfig(model=config.model)
    networks = meta_networks(settings)
    transformer, m = networks["transformer"], config.model
    grid = token_grid(settings, sides_of(transformer.config))
    shape = ModelShape.of(transformer.config, m.max_sequence_length, family_of(transformer).joint)
    guided = m.guidance_scale != 1 and (config.ckpt is None or config.compare)
    branches = 2 if guided and m.vae != "AutoencoderKLWan" else 1  # Wan's pipelines run both in turn, others as one batch
    of_transformer = m.experts * (1 if config.ckpt is None else 2)  # the pipeline's own is kept beside the student
    weights = {"text": 0.0, "denoising": 2.0 * of_transformer * parameters(transformer), "decoding": 4.0 * parameters(networks["VAE"])}
    moved = {"text": 0.0, "denoising": 2.0 * 2 * largest_leaf(transformer), "decoding": 4.0 * 2 * largest_leaf(networks["VAE"])}
    if (encoder := networks.get("text encoder")) is not None:
        weights["text"], moved["text"] = 2.0 * parameters(encoder), 2.0 * 2 * largest_leaf(encoder)
    work = {"text": 0.0, "denoising": config.batch_size * branches * forward_bytes(shape, grid.num_tokens, True), "decoding": decoding_bytes(config, networks["VAE"])}
    one = {"text": weights["text"], "denoising": 2.0 * parameters(transformer), "decoding": weights["decoding"]}  # by model offload
    there = {"none": dict.fromkeys(weights, sum(weights.values())), "model": one, "group": moved}[config.offload]
    return {stage: {"weights": there[stage], "work": work[stage]} for stage in weights}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def decoding_bytes(config: InferConfig, vae: nn.Module) -> float:
    """What decoding a batch computes with, and the videos, in fp32."""
    m = config.model
    videos = config.batch_size * m.num_frames * 3 * m.height * m.width * 4
    if type(vae).__name__ != "AutoencoderKLWan":
        return videos
    height, width = (min(side, TILE) if config.vae_tiling else side for side in (m.height, m.width))
    patch = vae.config.patch_size or 1
    channels = vae.config.decoder_base_dim or vae.config.base_dim
    return config.batch_size * DECODING * channels / 96 * height * width / patch**2 + videos * (2 if config.vae_tiling else 1)


def report(config: InferConfig) -> dict:
    """Print the table; returns its numbers. SettingError for an unknown GPU."""
    if config.dry_run_gpu not in GPUS:
        raise SettingError(f"dry_run_gpu: got {config.dry_run_gpu}, accepted: {' | '.join(GPUS)}")
    found, capacity = stages(config), GPUS[config.dry_run_gpu][1] * 1e9
    peak = max(sum(stage.values()) for stage in found.values())
    m = config.model
    print(f"{m.path}: {m.num_frames} frames of {m.height}×{m.width}, {config.batch_size} at a time, {'a student' if config.ckpt else 'dense'}, offload={config.offload}, "
          f"vae_tiling={str(config.vae_tiling).lower()}; nothing was loaded")  # fmt: skip
    print(f"{'stage':12}{'weights':>10}{'work':>10}{'GiB':>10}")
    for name, stage in found.items():
        print(f"{name:12}{stage['weights'] / GIB:>10.2f}{stage['work'] / GIB:>10.2f}{sum(stage.values()) / GIB:>10.2f}")
    fits = peak < 0.92 * capacity
    print(f"peak {peak / GIB:.1f} GiB of {capacity / GIB:.1f} ({config.dry_run_gpu}): an estimate, not a measurement"
          + ("" if fits else "; does NOT fit: try batch_size=1, vae_tiling=true, offload=model or offload=group"))  # fmt: skip
    return {"stages": found, "bytes": peak, "capacity": capacity, "fits": fits}
