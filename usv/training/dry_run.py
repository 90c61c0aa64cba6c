"""What a training run will need, before anything is loaded:  python train.py experiment=usv_wan dry_run=true

Parameters are counted on the meta device from the model's numbers. Memory is weights + gradients + optimiser + average +
activations of one device; FLOPs are those of usv/sparse/cost.py; the time of a step is FLOPs / (peak · utilisation). It is an
estimate: nothing was run. Attention's own workspace, allocator fragmentation and communication are not in it.

Activations of a trained block, bytes a token that autograd keeps (counted on dense blocks, tests/training/test_dry_run.py):

    under bf16 autocast   72 · d + 4 · d_ff          in fp32   90 · d + 8 · d_ff          adapters   + 18 · d + 2 · d_ff

Teacher and critic run while no student's graph is held, so what they need beyond the student's activations is counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from usv.config import SettingError, TrainConfig
from usv.models.families import family_of
from usv.models.protocol import sides_of
from usv.objectives import make_objective
from usv.sampling.record import numbers_of
from usv.sparse.cost import ModelShape, block_flops, dense_flops, rung_costs
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.measured import read_costs
from usv.sparse.plan import RUNGS
from usv.training.feasible import check_budget, check_content, check_density, check_optimizer, check_sharing, check_size

GIB = 2**30
# name: (dense bf16 peak in TFLOP/s with fp32 accumulation, memory in GB), from the vendor's data sheets
GPUS = {
    "h100": (989, 80), "h200": (989, 141), "b200": (2250, 180), "a100": (312, 80), "a100_40gb": (312, 40),
    "l40s": (362, 48), "rtx4090": (165, 24), "rtx5090": (210, 32),
}  # fmt: skip
TEXT_ENCODER = dict(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)  # UMT5-XXL, which all Wan models share
IMAGE_ENCODER = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)  # CLIP ViT-H/14, of Wan 2.1's image to video


@dataclass(frozen=True)
class Role:
    """One network of the run; bytes are of one device."""

    name: str
    parameters: int
    trained: int = 0
    weights: float = 0.0
    gradients: float = 0.0
    optimiser: float = 0.0
    average: float = 0.0
    activations: float = 0.0
    where: str = "device"

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.average + self.activations


def transformer_config(config: TrainConfig) -> dict:
    """The numbers of the transformer: of the folder where there is one, else of conf/model. SettingError without either."""
    file = Path(config.model.path) / "transformer" / "config.json"
    if file.is_file():
        return numbers_of(file)
    if config.model.numbers:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in config.model.numbers.items()}
    a = config.model.architecture
    if min(a.num_layers, a.num_attention_heads, a.ffn_dim) < 1:
        raise SettingError(
            f"model.path={config.model.path}: no folder is there and model.architecture has no num_layers, num_attention_heads "
            "or ffn_dim; name a model of conf/model, a local diffusers folder, or use the embedded default model.path=data/wan-mini"
        )
    return {**vars(a), "patch_size": tuple(a.patch_size)}


def meta_transformer(config: TrainConfig) -> torch.nn.Module:
    """The transformer on the meta device: its config with all defaults, its parameters to be counted."""
    import diffusers

    if not hasattr(diffusers, config.model.transformer):
        raise SettingError(f"model.transformer: got {config.model.transformer}, accepted: a class of diffusers, e.g. WanTransformer3DModel")
    with torch.device("meta"):
        return getattr(diffusers, config.model.transformer).from_config(transformer_config(config))


def meta_networks(config: TrainConfig) -> dict[str, torch.nn.Module]:
    """Transformer, text and image encoder and VAE on the meta device: no memory, no weights."""
    import diffusers
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    folder = Path(config.model.path)
    c = config.model.codec
    vae = dict(
        base_dim=c.base_dim, decoder_base_dim=c.decoder_base_dim, z_dim=c.z_dim, is_residual=c.is_residual,
        patch_size=c.patch_size, in_channels=c.image_channels, out_channels=c.image_channels,
        latents_mean=[0.0] * c.z_dim, latents_std=[1.0] * c.z_dim,
    )  # fmt: skip
    encoder = TEXT_ENCODER
    if (folder / "vae" / "config.json").is_file():
        vae = numbers_of(folder / "vae" / "config.json")
    if (folder / "text_encoder" / "config.json").is_file():
        encoder = json.loads((folder / "text_encoder" / "config.json").read_text())
    wan = config.model.vae == "AutoencoderKLWan"
    networks = {"transformer": meta_transformer(config)}
    with torch.device("meta"):
        if getattr(networks["transformer"].config, "image_dim", None) is not None:
            networks["image encoder"] = CLIPVisionModel(CLIPVisionConfig(**IMAGE_ENCODER))
        if wan:  # no other family's is loaded in training
            networks["text encoder"] = UMT5EncoderModel(UMT5Config(**encoder))
        networks["VAE"] = getattr(diffusers, config.model.vae).from_config(vae if wan else {})
    return networks


def count_parameters(config: TrainConfig) -> dict[str, int]:
    """Parameters of transformer, coarse gates, text and image encoder and VAE."""
    networks = meta_networks(config)
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    shape = ModelShape.of(networks["transformer"].config, 0)
    counts["gates"] = shape.num_layers * (shape.dim + 1) * shape.num_heads
    counts["adapters"] = _adapters(networks["transformer"], config)
    return counts


def _adapters(transformer, config: TrainConfig) -> int:
    """Parameters of LoRA adapters: rank · (in + out) of every target in the blocks."""
    inside = tuple(f"{blocks.attribute}." for blocks in family_of(transformer).blocks)
    linears = (
        m
        for n, m in transformer.named_modules()
        if n.startswith(inside) and n.endswith(tuple("." + t for t in config.lora.targets))
    )
    return config.lora.rank * sum(m.in_features + m.out_features for m in linears)


def token_grid(config: TrainConfig, patch) -> TokenGrid:
    """Tokens along time, height and width of one clip."""
    m, folder = config.model, Path(config.model.path)
    space, time_ = m.codec.scale_spatial, m.codec.scale_temporal
    if (folder / "vae" / "config.json").is_file():
        vae = json.loads((folder / "vae" / "config.json").read_text())
        space, time_ = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    check_size(m, space, time_, patch)
    return TokenGrid(
        ((m.num_frames - 1) // time_ + 1) // patch[0], m.height // space // patch[1], m.width // space // patch[2]
    )


def activation_bytes(shape: ModelShape, tokens: float, bf16: bool, checkpointing: bool) -> float:
    """Bytes autograd keeps of one sample's trained forward."""
    block = tokens * ((72 * shape.dim + 4 * shape.ffn_dim) if bf16 else (90 * shape.dim + 8 * shape.ffn_dim))
    if not checkpointing:
        return shape.num_layers * block
    return block + shape.num_layers * tokens * shape.dim * (2 if bf16 else 4)


def forward_bytes(shape: ModelShape, tokens: float, bf16: bool) -> float:
    """Bytes that one block's forward without gradients holds at its widest: fp32 norm, q, k, v or the FFN's two states."""
    half = 2 if bf16 else 4
    return tokens * (shape.dim * (8 + 5 * half) + 2 * half * shape.ffn_dim)


def clips_at_once(config: TrainConfig) -> int:
    """Clips at one time on one device, or on those that share them."""
    return max(1, config.optim.batch_size // (config.dry_run_devices // config.runtime.sequence_parallel * config.optim.accumulate))


def partition(config: TrainConfig) -> tuple[float, float, float]:
    """Share of weights, gradients and optimiser states that one device holds."""
    n = config.dry_run_devices
    return {"zero2": (1.0, 1 / n, 1 / n), "zero3": (1 / n, 1 / n, 1 / n)}.get(config.runtime.name, (1.0, 1.0, 1.0))


def trained_role(name: str, frozen: int, trained: int, config: TrainConfig, average: bool, activations: float) -> Role:
    """A trained network. Weights are fp32 (autocast, see usv/training/ranks.py); ZeRO keeps a second fp32 copy as its master."""
    weights, gradients, states = partition(config)
    zero = config.runtime.name.startswith("zero")
    moments = 2 if config.optim.optimizer == "adamw8bit" else 8
    optimiser = trained * states * (moments + (4 if zero else 0))
    return Role(
        name, frozen + trained, trained, weights * 4 * trained, gradients * 4 * trained,
        0.0 if config.runtime.offload else optimiser, (weights * 4 * trained) if average else 0.0, activations,
    )  # fmt: skip


def roles(config: TrainConfig, bf16: bool = True) -> tuple[list[Role], ModelShape, int]:
    """All networks of the run with their memory on one device; the shape; tokens of a clip."""
    network, counts = meta_transformer(config), count_parameters(config)
    check_sharing(config, family_of(network))
    grid = token_grid(config, sides_of(network.config))
    shape = ModelShape.of(network.config, config.model.max_sequence_length, family_of(network).joint)
    layout = tile_layout(grid, Tile(*config.model.tile, cell=tuple(config.model.cell)))
    check_density(config, layout.num_blocks)
    check_content(config, 1)
    check_optimizer(config)
    if config.policy.cost is None:
        check_budget(config, dict(zip(RUNGS, rung_costs(shape, layout))), shape.num_layers)
    else:
        read_costs(config.policy.cost)  # that it is whole; it may be of another device
    tokens, sharing = grid.num_tokens, config.runtime.sequence_parallel
    if config.dry_run_devices % sharing:
        raise SettingError(
            f"runtime.sequence_parallel: got {sharing} on dry_run_devices={config.dry_run_devices}, accepted: its divisors"
        )
    clips = clips_at_once(config) / sharing  # on one device
    frozen_base, half = config.lora.rank > 0 or config.optim.train == "router", 2 if bf16 else 4
    frozen, trained = (
        (counts["transformer"], counts["adapters"] + counts["gates"])
        if frozen_base
        else (0, counts["transformer"] + counts["gates"])
    )
    kept = clips * activation_bytes(shape, tokens, bf16, config.runtime.gradient_checkpointing)
    blocks = 1 if config.runtime.gradient_checkpointing else shape.num_layers
    if config.lora.rank:  # the inputs of A, once for each target
        kept += clips * blocks * tokens * (18 * shape.dim + 2 * shape.ffn_dim)
    elif bf16 and not frozen_base:  # autocast's copies of the weights live until the step ends
        kept += 2 * counts["transformer"]
    branches = teacher_branches(config)
    transient = max(0.0, clips * branches * forward_bytes(shape, tokens, bf16) - kept)
    cells = config.policy.bins * shape.num_layers * 10 if config.policy.name == "gumbel" else 0
    found = [
        trained_role("student", frozen, trained, config, True, kept),
        Role(
            "teacher" + (" = frozen base" if frozen_base else ""),
            counts["transformer"],
            weights=half * counts["transformer"],
            activations=transient,
        ),
        Role("policy", cells, cells, where="CPU"),
        Role("text encoder", counts.get("text encoder", 0), where="not loaded: embeddings are in the shards"),
        *([Role("image encoder", counts["image encoder"], where="not loaded: embeddings are in the shards")] if "image encoder" in counts else ()),
        Role("VAE", counts["VAE"], weights=4 * counts["VAE"])
        if config.model.vae == "AutoencoderKLWan"
        else Role("VAE", counts["VAE"], where="not loaded: validation of this family makes no videos"),
    ]
    if has_critic(config):
        learned = counts["adapters"] if frozen_base else counts["transformer"]  # no gates; of its activations the student's place holds all
        found.insert(2, trained_role("critic" + (" = adapters" if frozen_base else ""), frozen, learned, config, False, 0.0))
    if has_guide(config):
        found.insert(2, Role("guide", counts["transformer"], weights=half * counts["transformer"]))
    if config.model.experts > 1:
        found.insert(2, Role("other expert", counts["transformer"], where="not loaded: one expert is trained a run"))
    return found, shape, tokens


def validation_bytes(config: TrainConfig, shape: ModelShape, tokens: int, bf16: bool, parameters: int) -> float:
    """What validation adds to weights and states: first the teacher's guided forward, then the averaged student as a network of its own
    and its forward, as many clips at once as a training step has on a device. parameters: of the transformer."""
    forward = clips_at_once(config) * forward_bytes(shape, tokens, bf16)
    branches = 1 if config.model.guidance_scale == 1 else 2
    return max(branches * forward, (2 if bf16 else 4) * parameters + forward)


def teacher_branches(config: TrainConfig) -> int:
    """Forwards of the teacher for what is wanted of a clip: with and without its text, where guidance is folded in."""
    return 1 if config.model.guidance_scale == 1 or config.optim.train == "router" else 2


def has_guide(config: TrainConfig) -> bool:
    """Whether another student than the trained one gives the trajectories."""
    return make_objective(config.objective, config.model.flow_shift).needs.guide


def has_critic(config: TrainConfig) -> bool:
    """Whether the losses of this run need a critic."""
    return make_objective(config.objective, config.model.flow_shift).needs.critic


def step_flops(config: TrainConfig, shape: ModelShape, tokens: int) -> dict[str, float]:
    """FLOPs of one optimiser step over the whole batch, by part. Backward is 2 forwards (1 of frozen weights), of attention 2.5.

    Where the policy decides steps, two of them are assumed to share the budget, and all probes (`rollout.jump_damage`) to be made, of a
    third step.
    """
    batch, dense = config.optim.batch_size, dense_flops(shape, tokens)
    guided = teacher_branches(config)
    budget = min(1.0, config.policy.budget * config.policy.bins / 2) if config.policy.steps else config.policy.budget
    attention = shape.num_layers * block_flops(shape, tokens)["attention"]
    sparse = budget * (1 + config.policy.probes / shape.num_layers)
    linear = 1 if config.lora.rank or config.optim.train == "router" else 2  # frozen weights need no gradient of their own
    backward = linear * (dense - attention) + 2.5 * attention + (dense if config.runtime.gradient_checkpointing else 0)
    beside = make_objective(config.objective, config.model.flow_shift).forwards()
    guide = budget if has_guide(config) else guided
    flops = {
        "teacher": batch * dense * (guided * beside.teacher + guide * beside.guide),
        "student forward": batch * dense * (sparse + budget * (beside.student + beside.rollouts)),
        "student backward": batch * backward * (sparse + budget * beside.rollouts),
    }
    if config.policy.steps:  # rollouts with the step, without and dense, each judged at four noise levels
        flops["student forward"] += batch * dense * (3 + budget * 5) / config.policy.jump_every
        flops["teacher"] += batch * dense * 3 * 4 * guided / config.policy.jump_every
    if has_critic(config):
        forwards, backwards = beside.critic
        flops["critic"] = batch * (forwards * dense + backwards * (2 * dense + 0.5 * attention))
    return flops


def clip_flops(config: TrainConfig, shape: ModelShape, tokens: int) -> float:
    """FLOPs of one clip by the dense model's own sampler; text encoder and VAE are not in it."""
    return dense_flops(shape, tokens) * config.model.num_inference_steps * (1 if config.model.guidance_scale == 1 else 2)


def report(config: TrainConfig) -> dict:
    """Print the tables; returns their numbers. SettingError for an unknown GPU."""
    if config.dry_run_gpu not in GPUS:
        raise SettingError(f"dry_run_gpu: got {config.dry_run_gpu}, accepted: {' | '.join(GPUS)}")
    peak, capacity = GPUS[config.dry_run_gpu]
    bf16 = config.runtime.precision != "fp32"
    found, shape, tokens = roles(config, bf16)
    teacher = found[1]
    flops = step_flops(config, shape, tokens)
    training, devices = sum(role.total for role in found), config.dry_run_devices
    validating = sum(role.total - role.activations for role in found) + validation_bytes(config, shape, tokens, bf16, teacher.parameters)
    total = max(training, validating)
    seconds = sum(flops.values()) / devices / (peak * 1e12 * config.dry_run_utilisation)
    m = config.model
    print(f"{config.experiment}: {m.num_frames} frames of {m.height}×{m.width}, {tokens:,} tokens, batch {config.optim.batch_size}, "
          f"runtime {config.runtime.name} on {devices} × {config.dry_run_gpu}, {'LoRA' if config.lora.rank else 'full' if config.optim.train == 'all' else config.optim.train}, "
          f"{'bf16' if bf16 else 'fp32'}; nothing was loaded")  # fmt: skip
    head = ("weights", "gradients", "optimiser", "average", "activ.", "total GiB")
    print(f"{'role':24}{'parameters':>16}{'trained':>16}" + "".join(f"{h:>11}" for h in head))
    for role in found:
        sizes = (role.weights, role.gradients, role.optimiser, role.average, role.activations, role.total)
        place = "" if role.where == "device" else f"  ({role.where})"
        print(
            f"{role.name:24}{role.parameters:>16,}{role.trained:>16,}"
            + "".join(f"{x / GIB:>11.2f}" for x in sizes)
            + place
        )
    print(f"while training {training / GIB:.1f} GiB, on the first device while validating {validating / GIB:.1f}")
    print(f"memory of one device: {total / GIB:.1f} GiB of {capacity * 1e9 / GIB:.1f}"
          + ("" if total < 0.92 * capacity * 1e9 else ": does NOT fit; try lora.rank=64, runtime=zero3, more devices, or a smaller batch"))  # fmt: skip
    for name, value in flops.items():
        print(f"  {name:18}{value / 1e12:>12.1f} TFLOP a step")
    print(f"expected {seconds:.1f} s a step, {seconds * config.optim.steps / 3600:.1f} h for {config.optim.steps} steps: an estimate, FLOPs / "
          f"({peak} TFLOP/s × utilisation {config.dry_run_utilisation:g}), not a measurement")  # fmt: skip
    clip = clip_flops(config, shape, tokens) / devices / (peak * 1e12 * config.dry_run_utilisation)
    print(f"clips that the dense model makes itself (data/generate.py): {clip:.1f} s each on these devices, of {m.num_inference_steps} "
          f"{'guided ' if m.guidance_scale != 1 else ''}steps")  # fmt: skip
    return {
        "roles": {r.name: r for r in found},
        "tokens": tokens,
        "flops": flops,
        "bytes": total,
        "seconds": seconds,
        "clip_seconds": clip,
        "capacity": capacity * 1e9,
    }
