"""Every setting of train.py and infer.py, typed. Hydra's YAML under conf/ fills these; unknown keys fail with the nearest name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class SettingError(ValueError):
    """A setting that cannot be used; the message says what is accepted."""


@dataclass
class ModelConfig:
    """A diffusers Wan folder and the shape it is run at."""

    path: str = "data/wan-mini"
    height: int = 96
    width: int = 96
    num_frames: int = 9
    max_sequence_length: int = 16
    tile: list[int] = field(default_factory=lambda: [3, 4, 4])
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    flow_shift: float = 3.0


@dataclass
class PolicyConfig:
    """How sparsity is decided. `budget`: mean cost of a forward as a fraction of the dense one's FLOPs."""

    name: str = "gumbel"
    budget: float = 0.32
    bins: int = 8
    probes: int = 2
    lr: float = 0.05
    tau_start: float = 1.0
    tau_end: float = 0.2
    entropy_bonus: float = 0.01
    gamma: float = 1.0
    warm_down: list[float] = field(default_factory=lambda: [0.05, 0.5])  # share of the run: density falls from, to
    freeze_at: float = 0.7  # share of the run after which the decoded plan is fixed and fine-tuned


@dataclass
class AttentionConfig:
    """How the sparse attention runs. impl: auto | reference | cpu | triton | flex.

    In infer.py without a checkpoint, `pattern` names a training-free pattern and `options` its settings (usv/patterns).
    """

    impl: str = "auto"
    pattern: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DistillConfig:
    """Losses of the student."""

    velocity: float = 1.0


@dataclass
class DataConfig:
    """Shards of data/prepare.py."""

    path: str = "data/shards/camera"
    drop_text: float = 0.05
    validation_clips: int = 8


@dataclass
class OptimConfig:
    """AdamW, gradient clipping, moving average of the student."""

    steps: int = 600
    batch_size: int = 6
    lr: float = 5e-4
    warmup: int = 20
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    grad_clip: float = 1.0
    ema: float = 0.98


@dataclass
class RuntimeConfig:
    """precision: auto (bf16 where the device multiplies it natively) | fp32 | bf16."""

    precision: str = "auto"
    gradient_checkpointing: bool = False
    checkpoint_seconds: float = 60.0
    resume: str = "auto"


@dataclass
class LoggerConfig:
    """name: wandb | none. mode auto: online with an account, else offline."""

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
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class InferConfig:
    """infer.py"""

    ckpt: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    prompt: str | None = None
    prompts: str | None = None  # a file, one prompt a line
    seed: int = 0
    seeds: int = 1  # videos per prompt, with seeds seed, seed + 1, …
    batch_size: int = 4
    num_inference_steps: int | None = None
    compare: bool = False
    output_dir: str = "outputs/videos"
    fps: int = 8


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
    keys = keys_of(schema)
    for argument in arguments:
        if "=" not in argument or argument.startswith(("-", "hydra.", "hydra/")):
            continue
        key, value = argument.split("=", 1)
        key = key.lstrip("+~")
        if key in groups and value in groups[key]:
            continue
        if key in groups and (key == "experiment" or key not in keys or not isinstance(getattr(schema(), key, None), str)):
            nearest = difflib.get_close_matches(value, groups[key], 1, 0.0)
            raise SettingError(
                f"{argument}: there is no {key} {value!r}; accepted: {', '.join(groups[key])}"
                + (f"; did you mean {key}={nearest[0]}?" if nearest else "")
            )
        if key not in keys:
            nearest = difflib.get_close_matches(key, [*keys, *groups], 1, 0.0)
            raise SettingError(f"{argument}: there is no setting {key!r}; did you mean {nearest[0]!r}? See conf/ for all")


def config_groups(folder: Path) -> dict[str, list[str]]:
    """Groups under conf/ and their choices."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(folder.iterdir()) if d.is_dir()}


def typed(config: DictConfig, schema: type):
    """Hydra's config as `schema`; SettingError for a wrong type or key."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise SettingError(str(error).split("\n")[0]) from None


IMPLS = ("auto", "reference", "cpu", "triton", "flex")


def _ascending(pair: list[float]) -> bool:
    return len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1


def check_train(config: TrainConfig) -> None:
    """Values that types cannot check. SettingError names setting, got, accepted."""
    rules = [
        ("policy.name", config.policy.name, config.policy.name in ("static", "entropy", "gumbel"), "static | entropy | gumbel"),
        ("policy.budget", config.policy.budget, 0 < config.policy.budget <= 1, "a fraction of the dense cost in (0, 1]"),
        ("policy.bins", config.policy.bins, config.policy.bins >= 1, "at least 1"),
        ("policy.freeze_at", config.policy.freeze_at, 0 < config.policy.freeze_at <= 1, "a share of the run in (0, 1]"),
        ("policy.tau_end", config.policy.tau_end, 0 < config.policy.tau_end <= config.policy.tau_start, "above 0, at most tau_start"),
        ("policy.warm_down", config.policy.warm_down, _ascending(config.policy.warm_down), "[from, to], shares of the run, 0 ≤ from ≤ to ≤ 1"),
        ("attention.impl", config.attention.impl, config.attention.impl in IMPLS, " | ".join(IMPLS)),
        ("data.validation_clips", config.data.validation_clips, config.data.validation_clips >= 1, "at least 1"),
        ("logger.every", config.logger.every, config.logger.every >= 1, "at least 1"),
        ("logger.validate_every", config.logger.validate_every, config.logger.validate_every >= 1, "at least 1"),
        ("optim.steps", config.optim.steps, config.optim.steps >= 1, "at least 1"),
        ("optim.batch_size", config.optim.batch_size, config.optim.batch_size >= 1, "at least 1"),
        ("model.tile", config.model.tile, len(config.model.tile) == 3 and min(config.model.tile) >= 1, "[t, h, w], each ≥ 1"),
        ("runtime.precision", config.runtime.precision, config.runtime.precision in ("auto", "fp32", "bf16"), "auto | fp32 | bf16"),
        ("logger.name", config.logger.name, config.logger.name in ("wandb", "none"), "wandb | none"),
        ("logger.mode", config.logger.mode, config.logger.mode in ("auto", "online", "offline"), "auto | online | offline"),
    ]  # fmt: skip
    for name, got, fine, accepted in rules:
        if not fine:
            raise SettingError(f"{name}: got {got}, accepted: {accepted}")
