"""Every setting of train.py and infer.py, typed. Hydra's YAML under conf/ fills these; unknown keys fail with the nearest name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from usv.bounds import NUMBER_WORDS, number_keys, out_of_range


class SettingError(ValueError):
    """A setting that cannot be used; the message says what is accepted."""


@dataclass
class ArchitectureConfig:
    """Numbers of a WanTransformer3DModel, for runs that have no folder to read them from; num_layers 0: not given."""

    num_layers: int = 0
    num_attention_heads: int = 0
    attention_head_dim: int = 128
    ffn_dim: int = 0
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    image_dim: int | None = None  # of Wan 2.1's image to video: width of the image embeddings
    added_kv_proj_dim: int | None = None  # and of what their keys and values are made of


@dataclass
class CodecConfig:
    """Numbers of an AutoencoderKLWan; scale_* are its down-sampling factors."""

    z_dim: int = 16
    base_dim: int = 96
    decoder_base_dim: int | None = None
    is_residual: bool = False
    patch_size: int | None = None
    image_channels: int = 3
    scale_spatial: int = 8
    scale_temporal: int = 4


@dataclass
class ModelConfig:
    """A diffusers Wan folder or hub id and the shape it is run at.

    weights: pretrained (from path) | random (`architecture`, untrained: tests and measurements). experts: transformers of
    the pipeline; of two, one serves timesteps from `boundary` · 1000 on (expert=high), the other those below (low): one is
    trained a run. fps: frames a second of its clips, with which infer.py writes them. transformer, vae: diffusers' classes of another
    family than Wan, and the numbers that make the transformer (`vae` is counted as its class makes it).
    """

    path: str = "data/wan-mini"
    height: int = 96
    width: int = 96
    num_frames: int = 9
    max_sequence_length: int = 16
    tile: list[int] = field(default_factory=lambda: [3, 4, 4])
    cell: list[int] = field(default_factory=lambda: [1, 2, 2])  # of a tile, in which tokens may merge; frames beyond 1 let neighbours in time merge
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    flow_shift: float = 3.0
    weights: str = "pretrained"
    experts: int = 1
    expert: str | None = None
    boundary: float = 0.875
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    fps: int = 8
    transformer: str = "WanTransformer3DModel"
    numbers: dict[str, Any] = field(default_factory=dict)
    vae: str = "AutoencoderKLWan"


@dataclass
class PolicyConfig:
    """How sparsity is decided. `budget`: mean cost of a forward as a fraction of the dense one's FLOPs.

    name: gumbel (learned) | entropy | static | hand_rule | calibration (what a learned one has to beat) | inherit (the plan of objective.init, from the first step on). mode: plan (every input
    computes the plan's densities) | dynamic (once the plan is fixed each input computes what it needs for a share of its attention
    mass, steered in training so that the plan's densities are met on average; all else is the plan's). axes: what is
    decided, or inherited; an axis left out stays dense. steps: also decide which of the bins' upper edges a few-step student runs at; budget is
    then the whole sampling's cost as a fraction of that many (`bins`) dense forwards. jump_every: training steps from one probe of a
    candidate step to the next; a probe samples three times and asks the teacher about each. input: what the damage of a rung is told
    from (gumbel): none (a table of what was probed) | place (a network over timestep and layer) | content (over the input, too: until freeze_at
    the gates of each batch are its own; the plan that is kept is that of a mean input). budgets: [smallest, largest], a dial: every step draws its budget between them, and the student can be
    asked for any; `budget` is then the one it has unless asked.
    """

    name: str = "gumbel"
    mode: str = "plan"
    axes: list[str] = field(default_factory=lambda: ["density", "merge"])
    steps: bool = False
    jump_every: int = 1
    most_density: float = 1.0  # bound on the plan's mean density, beside the budget (gumbel)
    merge_layers: int | None = None  # only the first so many layers may merge (gumbel)
    budget: float = 0.32
    bins: int = 8
    probes: int = 2
    input: str = "place"
    budgets: list[float] = field(default_factory=list)
    cost: str | None = None  # a file of python -m usv.bench costs: what rungs and budget cost, in seconds of this machine; none: FLOPs
    gamma: float = 1.0
    warm_down: list[float] = field(default_factory=lambda: [0.05, 0.5])  # share of the run: density falls from, to
    freeze_at: float = 0.7  # share of the run after which the decoded plan is fixed and fine-tuned


@dataclass
class AttentionConfig:
    """How the sparse attention runs. impl: auto | reference | cpu | triton | flex.

    In infer.py `pattern` names a training-free pattern and `options` its settings (usv/patterns); beside a checkpoint it chooses
    the blocks at the densities of the student's plan.
    """

    impl: str = "auto"
    pattern: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ObjectiveConfig:
    """What the student is trained towards (usv/objectives).

    name: velocity (the teacher's guided velocity; sampled like the teacher) | consistency (where the flow ends; few steps) |
    trajectory (where the flow of a guide ends, from what the student's own rollouts meet; few steps) | distribution (the student's
    own samples, judged by teacher and critic, beside one of the others; few steps). init: a student folder to start from. guide: a
    student's folder, or teacher; none: the student of objective.init, as it was, else the teacher; of a student of few steps one forward
    says where its flow ends.
    solver_steps: of the guide, from noise to clip. reuse: how often a batch of trajectories is trained on, on average; they cost most of
    a step. student_timesteps: those of the few-step student, 1000 first; empty: model.num_inference_steps of the teacher's sampler.

    Of distribution: base: velocity | consistency | trajectory, which goes on with base_weight beside matching_weight. critic_updates
    of the critic for each step of the student, at critic_lr, on samples made afresh; critic_warmup: batches on which it learns before
    the student's first step. adversarial: non_saturating | hinge, the loss of a head that tells samples from clips; adversarial_weight 0: none.
    """

    name: str = "velocity"
    solver_steps: int = 20
    reuse: int = 1
    student_timesteps: list[float] = field(default_factory=list)
    init: str | None = None
    guide: str | None = None
    base: str = "consistency"
    base_weight: float = 1.0
    matching_weight: float = 1.0
    critic_lr: float = 5e-5
    critic_updates: int = 5
    critic_warmup: int = 50
    adversarial: str = "non_saturating"
    adversarial_weight: float = 0.0


@dataclass
class DataConfig:
    """Shards of data/prepare.py: a folder or a URL. mix: several with their weights, {folder or URL: share}, instead of path
    (on the command line +data.mix={…: 3, …: 1}). Folders of several sizes, or a pattern that names them, give buckets.
    """

    path: str = "data/shards/camera"
    mix: dict[str, float] = field(default_factory=dict)
    drop_text: float = 0.05
    validation_clips: int = 8


@dataclass
class OptimConfig:
    """AdamW, gradient clipping, moving average of the student. batch_size: of the whole step, over all ranks. accumulate: in so many parts,
    one after another, each rank works on its clips of a step, which equals working on them at once and needs the memory of one. grad_clip: a norm above 0,
    in every runtime; a large one, 1e9, never clips.

    train: all | router: the base stays as it is, only coarse gates and policy learn, so that its quantised copies and every LoRA of it go on
    working; guidance is then not folded in. optimizer: adamw | muon (matrices of the blocks by Muon, the rest by AdamW) | adamw8bit (moments in 8 bits; needs the package bitsandbytes and a GPU).
    """

    steps: int = 600
    batch_size: int = 6
    accumulate: int = 1
    lr: float = 5e-4
    warmup: int = 20
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    grad_clip: float = 1.0
    ema: float = 0.98
    optimizer: str = "adamw"
    train: str = "all"


@dataclass
class LoraConfig:
    """rank 0 trains all weights; else student and critic are adapters on one frozen base, which is also the teacher."""

    rank: int = 0
    alpha: float = 32.0
    targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    )


@dataclass
class RuntimeConfig:
    """precision: auto (bf16 where the device multiplies it natively) | fp32 | bf16.

    name: single | ddp | zero2 | zero3, how the trained weights lie on several ranks (docs/scaling.md). offload: ZeRO's
    optimiser states in CPU memory. zero3_persist: tensors of at most so many elements are never partitioned.
    sequence_parallel: so many ranks share each sample, every one with a part of its tokens and, in attention, of the heads.
    keep: older checkpoints kept beside the newest; the best is kept besides. max_skipped: non-finite steps in a row that
    are skipped before the run stops. threads: of a process on the CPU; none: its share of the cores.
    """

    name: str = "single"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    offload: bool = False
    zero3_persist: int = 100_000
    sequence_parallel: int = 1
    checkpoint_seconds: float = 60.0
    keep: int = 0
    max_skipped: int = 5
    threads: int | None = None
    resume: str = "auto"


@dataclass
class LoggerConfig:
    """name: wandb | trackio (on this machine only; pip install trackio) | none. mode, of wandb; auto: online with an account."""

    name: str = "wandb"
    mode: str = "auto"
    project: str = "usv"
    every: int = 10
    validate_every: int = 100
    videos: bool = True


@dataclass
class TrainConfig:
    """train.py"""

    experiment: str | None = None
    output_dir: str = "outputs/usv_mini"
    seed: int = 0
    dry_run: bool = False  # print memory, FLOPs and expected time of a step, load nothing, train nothing
    dry_run_gpu: str = "h100"
    dry_run_devices: int = 1
    dry_run_utilisation: float = 0.35  # share of the GPU's dense bf16 peak that a step is assumed to reach
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class InferConfig:
    """infer.py"""

    ckpt: str | None = None
    ckpt_low: str | None = None  # of two experts, the student for low noise; ckpt is then the one for high noise
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    prompt: str | None = None
    prompts: str | None = None  # a file, one prompt a line
    image: str | None = None  # of image to video, the first frame of all videos, a picture's path
    last_image: str | None = None  # and the last one
    seed: int = 0
    seeds: int = 1  # videos per prompt, with seeds seed, seed + 1, …
    batch_size: int = 4
    num_inference_steps: int | None = None
    budget: float | None = None  # share of the dense cost that the student's plan is decoded for, if it carries damages; none: its own
    speedup: float | None = None  # or of the dense forward over the student's, with `costs`
    costs: str | None = None  # a file of python -m usv.bench costs, of this machine
    compare: bool = False
    sequence_parallel: int = 1  # processes of torchrun that share each video, a student's or a pattern's; the others spread the prompts
    offload: str = "none"  # what is on the GPU: none: all | model: the network at work | group: its layers in turn
    vae_tiling: bool = False  # decode in tiles of 256 pixels
    dry_run: bool = False  # print the memory it will need, load nothing, make nothing
    dry_run_gpu: str = "h100"
    decoder: str = "full"  # full: the VAE's | tiny: the model folder's, of python -m usv.decoder | a folder; of the student's videos
    output_dir: str = "outputs/videos"
    fps: int | None = None  # of the files; none: model.fps


def keys_of(schema: type) -> list[str]:
    """All dotted keys of a schema."""
    return _flatten(OmegaConf.to_container(OmegaConf.structured(schema)))


def _flatten(tree: dict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{name}.")
    return keys


def check_overrides(arguments: list[str], schema: type, groups: dict[str, list[str]]) -> None:
    """Refuse `key=value` arguments whose key or group choice does not exist, naming the nearest that does."""
    keys, numbers = keys_of(schema), number_keys(schema)
    for argument in arguments:
        if "=" not in argument or argument.startswith(("-", "hydra.", "hydra/")):
            continue
        key, value = argument.split("=", 1)
        key = key.lstrip("+~")
        refuse_old(key, value)
        if key in groups and value in groups[key]:
            continue
        if key in groups and (key == "experiment" or key not in keys or not isinstance(getattr(schema(), key, None), str)):
            nearest = difflib.get_close_matches(value, groups[key], 1, 0.0)
            raise SettingError(
                f"{argument}: there is no {key} {value!r}; accepted: {', '.join(groups[key])}"
                + (f"; did you mean {key}={nearest[0]}?" if nearest else "")
            )
        if key.startswith("attention.options."):
            continue  # each pattern knows its own
        if key not in keys:
            nearest = difflib.get_close_matches(key, [*keys, *groups], 1, 0.0)
            raise SettingError(f"{argument}: there is no setting {key!r}; did you mean {nearest[0]!r}? See conf/ for all")
        if value.isalpha() and value.lower() not in NUMBER_WORDS and key in numbers:
            raise SettingError(f"{argument}: got a word, accepted: a number")


def refuse_old(key: str, value: str) -> None:
    """SettingError for a setting that has another name now."""
    if key.split(".")[0] != "distill":
        return
    new = f"{key.replace('distill', 'objective')}={'distribution' if (key, value) == ('distill', 'few_step') else value}"
    if key == "distill.distribution":
        new = f"objective=distribution objective.matching_weight={value}"
    raise SettingError(f"{key}={value}: distill is called objective now; write {new}")


def config_groups(folder: Path) -> dict[str, list[str]]:
    """Groups under conf/ and their choices."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(folder.iterdir()) if d.is_dir()}


def typed(config: DictConfig, schema: type):
    """Hydra's config as `schema`; SettingError for a wrong type or key."""
    if "distill" in config:
        raise SettingError("distill: is called objective now, its few_step distribution; write objective: in your own files, see conf/objective")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise SettingError(str(error).split("\n")[0]) from None


POLICIES = ("static", "entropy", "hand_rule", "calibration", "gumbel", "inherit")
RUNTIMES = ("single", "ddp", "zero2", "zero3")
IMPLS = ("auto", "reference", "cpu", "triton", "flex", "flex_compiled")


def _ascending(pair: list[float]) -> bool:
    return len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1


def check_numbers(config: TrainConfig | InferConfig) -> None:
    """SettingError for a number that is not finite or out of its range (usv/bounds.py), and for a name that is empty."""
    if (problem := out_of_range(config)) is not None:
        raise SettingError(problem)


def check_train(config: TrainConfig) -> None:
    """Values that types cannot check. SettingError names setting, got, accepted."""
    check_numbers(config)
    rules = [
        ("policy.name", config.policy.name, config.policy.name in POLICIES, " | ".join(POLICIES)),
        ("policy.mode", config.policy.mode, config.policy.mode in ("plan", "dynamic"), "plan | dynamic"),
        ("policy.name", config.policy.name, config.policy.name != "inherit" or bool(config.objective.init), "inherit only with objective.init=FOLDER"),
        ("model.expert", config.model.expert, config.model.expert in ((None,) if config.model.experts == 1 else (None, "high", "low")), "high | low, where model.experts is 2"),
        ("policy.axes", config.policy.axes, (bool(config.policy.axes) or config.policy.name == "inherit") and set(config.policy.axes) <= {"density", "merge"}, "[density], [merge] or both; with policy=inherit also none"),
        ("policy.most_density", config.policy.most_density, 0 < config.policy.most_density <= 1, "a density in (0, 1]"),
        ("policy.steps", config.policy.steps, not config.policy.steps or config.policy.name == "gumbel", "true with policy=gumbel"),
        ("policy.bins", config.policy.bins, config.policy.bins >= 2 or not config.policy.steps, "at least 2 with policy.steps"),
        ("policy.most_density", config.policy.most_density, config.policy.most_density == 1 or config.policy.name != "gumbel" or "density" in config.policy.axes, "1 where policy.axes leave density alone"),
        ("policy.budget", config.policy.budget, 0 < config.policy.budget <= 1, "a fraction of the dense cost in (0, 1]"),
        ("policy.jump_every", config.policy.jump_every, config.policy.jump_every >= 1, "at least 1"),
        ("policy.bins", config.policy.bins, config.policy.bins >= 1, "at least 1"),
        ("policy.freeze_at", config.policy.freeze_at, 0 < config.policy.freeze_at <= 1, "a share of the run in (0, 1]"),
        ("policy.input", config.policy.input, config.policy.input in ("none", "place", "content"), "none | place | content"),
        ("policy.budgets", config.policy.budgets, not config.policy.budgets or (_ascending(config.policy.budgets) and config.policy.budgets[0] > 0), "[smallest, largest] in (0, 1], or []"),
        ("policy.budgets", config.policy.budgets, not config.policy.budgets or (config.policy.name == "gumbel" and not config.policy.steps and config.policy.mode == "plan"), "[] but for policy=gumbel with mode=plan, without policy.steps"),
        ("policy.budget", config.policy.budget, not config.policy.budgets or config.policy.budgets[0] <= config.policy.budget <= config.policy.budgets[1], "within policy.budgets"),
        ("policy.warm_down", config.policy.warm_down, _ascending(config.policy.warm_down), "[from, to], shares of the run, 0 ≤ from ≤ to ≤ 1"),
        ("attention.impl", config.attention.impl, config.attention.impl in IMPLS, " | ".join(IMPLS)),
        ("data.validation_clips", config.data.validation_clips, config.data.validation_clips >= 1, "at least 1"),
        ("logger.every", config.logger.every, config.logger.every >= 1, "at least 1"),
        ("logger.validate_every", config.logger.validate_every, config.logger.validate_every >= 1, "at least 1"),
        ("optim.steps", config.optim.steps, config.optim.steps >= 1, "at least 1"),
        ("policy.merge_layers", config.policy.merge_layers, config.policy.merge_layers is None or config.policy.merge_layers >= 0, "null (all) or a number of layers"),
        ("optim.batch_size", config.optim.batch_size, config.optim.batch_size >= 1, "at least 1"),
        ("model.cell", config.model.cell, len(config.model.cell) == 3 and min(config.model.cell) >= 1 and max(config.model.cell) > 1, "[t, h, w], each ≥ 1, one above"),
        ("model.tile", config.model.tile, len(config.model.tile) == 3 and min(config.model.tile) >= 1, "[t, h, w], each ≥ 1"),
        ("runtime.name", config.runtime.name, config.runtime.name in RUNTIMES, " | ".join(RUNTIMES)),
        ("runtime.sequence_parallel", config.runtime.sequence_parallel, config.runtime.sequence_parallel >= 1, "1 (off) or more"),
        ("runtime.sequence_parallel", config.runtime.sequence_parallel, config.runtime.sequence_parallel == 1 or config.runtime.name != "single", "1 with runtime=single; above it runtime=ddp | zero2 | zero3 on as many processes or a multiple"),
        ("runtime.keep", config.runtime.keep, config.runtime.keep >= 0, "0 or more"),
        ("runtime.threads", config.runtime.threads, config.runtime.threads is None or config.runtime.threads >= 1, "at least 1, or none"),
        ("runtime.max_skipped", config.runtime.max_skipped, config.runtime.max_skipped >= 1, "at least 1"),
        ("lora.rank", config.lora.rank, config.lora.rank >= 0, "0 (all weights) or more"),
        ("optim.optimizer", config.optim.optimizer, config.optim.optimizer in ("adamw", "muon", "adamw8bit"), "adamw | muon | adamw8bit"),
        ("optim.train", config.optim.train, config.optim.train in ("all", "router"), "all | router"),
        ("model.weights", config.model.weights, config.model.weights in ("pretrained", "random"), "pretrained | random"),
        ("runtime.precision", config.runtime.precision, config.runtime.precision in ("auto", "fp32", "bf16"), "auto | fp32 | bf16"),
        ("logger.name", config.logger.name, config.logger.name in ("wandb", "trackio", "none"), "wandb | trackio | none"),
        ("logger.mode", config.logger.mode, config.logger.mode in ("auto", "online", "offline"), "auto | online | offline"),
    ]  # fmt: skip
    for name, got, fine, accepted in rules:
        if not fine:
            raise SettingError(f"{name}: got {got}, accepted: {accepted}")
    check_combination(config)


def check_combination(config: TrainConfig) -> None:
    """SettingError for what does not work together."""
    if config.optim.train == "router":
        wrong = {"lora.rank": config.lora.rank, "objective": config.objective.name != "velocity" and config.objective.name, "runtime": config.runtime.name == "zero3" and "zero3"}
        for name, got in wrong.items():
            if got:
                accepted = {"lora.rank": "0", "objective": "velocity; few steps need weights that learn", "runtime": "single | ddp | zero2, whose teacher is the frozen base"}[name]
                raise SettingError(f"{name}: got {got} with optim.train=router, accepted: {accepted}")
    if config.lora.rank and config.runtime.name == "zero3":
        raise SettingError(
            f"lora.rank: got {config.lora.rank} with runtime=zero3, accepted: single | ddp | zero2 (adapters are small: zero2 partitions "
            "their states; zero3 would partition the frozen base that teacher and critic share)"
        )
