"""The range of every number among the settings. What is not finite, or would ask for more than any machine has, is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import get_args, get_type_hints

NUMBER_WORDS = ("null", "nan", "inf", "true", "false")  # that a number may be given as; what they mean is checked later
MOST_TILE = 4096  # tokens of a tile: a block's scores, quadratic in them, must fit a device


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; `above`: without `least` itself, `below`: without `most`."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def holds(self, value) -> bool:
        """Of a number; NaN and infinity are in no range."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (value > self.least if self.above else value >= self.least) and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        begin = f"above {self.least:g}" if self.above else f"from {self.least:g}"
        return f"{begin} {'to below' if self.below else 'to'} {self.most:g}"


SHARE, ABOVE_ZERO, FROM_ZERO = Range(0, 1), Range(0, 1e30, above=True), Range(0, 1e30)
COUNT, SIZE, SOME = Range(1, 1_000_000_000), Range(1, 16_384), Range(1, 1000)

# by the last word of a setting; by all of it where one word has two meanings
RANGES = {
    # the model
    "height": SIZE, "width": SIZE, "num_frames": Range(1, 100_000), "max_sequence_length": Range(1, 65_536), "num_inference_steps": SOME,
    "guidance_scale": Range(0, 1000), "flow_shift": Range(0, 1000, above=True), "experts": Range(1, 2), "boundary": Range(0, 1, above=True, below=True),
    "fps": SOME, "num_layers": Range(0, 1000), "num_attention_heads": Range(0, 1024), "attention_head_dim": Range(2, 1024), "ffn_dim": Range(0, 1 << 20),
    "in_channels": Range(1, 4096), "out_channels": Range(1, 4096), "text_dim": Range(1, 65_536), "image_dim": Range(1, 65_536), "added_kv_proj_dim": Range(1, 65_536), "freq_dim": Range(2, 65_536), "z_dim": Range(1, 4096),
    "base_dim": Range(1, 65_536), "decoder_base_dim": Range(1, 65_536), "codec.patch_size": Range(1, 64), "image_channels": Range(1, 4096),
    "scale_spatial": Range(1, 64), "scale_temporal": Range(1, 64),
    # how sparsity is decided
    "jump_every": COUNT, "most_density": Range(0, 1, above=True), "merge_layers": Range(0, 1000), "budget": Range(0, 1, above=True), "speedup": Range(1, 1e6), "bins": SOME,
    "probes": Range(0, 1000), "gamma": ABOVE_ZERO,
    "freeze_at": Range(0, 1, above=True),
    # what is learned
    "solver_steps": SOME, "reuse": COUNT, "base_weight": FROM_ZERO, "matching_weight": FROM_ZERO, "adversarial_weight": FROM_ZERO, "critic_warmup": Range(0, 1_000_000), "critic_lr": ABOVE_ZERO, "critic_updates": SOME,
    "drop_text": SHARE, "validation_clips": Range(1, 100_000),
    "optim.steps": COUNT, "batch_size": Range(1, 1_000_000), "accumulate": Range(1, 1_000_000), "optim.lr": ABOVE_ZERO, "warmup": Range(0, 1_000_000_000), "weight_decay": FROM_ZERO,
    "grad_clip": ABOVE_ZERO, "ema": Range(0, 1, below=True), "rank": Range(0, 65_536), "alpha": ABOVE_ZERO,
    # how it runs
    "zero3_persist": Range(0, 1 << 62), "sequence_parallel": SOME, "checkpoint_seconds": FROM_ZERO, "keep": Range(0, 1_000_000), "max_skipped": COUNT,
    "threads": Range(1, 65_536), "every": COUNT, "validate_every": COUNT, "seed": Range(0, (1 << 32) - 1), "seeds": Range(1, 1_000_000),
    "dry_run_devices": Range(1, 1_000_000), "dry_run_utilisation": Range(0, 1, above=True),
}  # fmt: skip
# of lists: the range of each, the least and the most of them
LISTS = {"betas": (Range(0, 1, below=True), 2, 2), "tile": (Range(1, MOST_TILE), 3, 3), "patch_size": (Range(1, 64), 3, 3), "student_timesteps": (Range(0, 1000, above=True), 0, 1000), "warm_down": (SHARE, 2, 2), "budgets": (Range(0, 1, above=True), 0, 2), "cell": (Range(1, MOST_TILE), 3, 3), "mix": (ABOVE_ZERO, 0, 10_000)}  # fmt: skip
TEXTS = {"path", "output_dir", "resume", "project"}  # never empty


def range_of(name: str, table: dict = RANGES):
    """The entry of a dotted setting: by its last two words, else by its last; None where there is none."""
    words = name.split(".")
    return table.get(".".join(words[-2:])) or table.get(words[-1])


def leaves(config, prefix: str = ""):
    """(dotted name, value) of every setting of a dataclass."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def problem_of(name: str, value) -> str | None:
    """What would be accepted, where a setting's value is not."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        wanted = range_of(name)
        return None if wanted is not None and wanted.holds(value) else str(wanted or "a finite number")
    if isinstance(value, str):
        return "a name, not nothing" if name.split(".")[-1] in TEXTS and (not value.strip() or "\0" in value) else None
    if (entry := range_of(name, LISTS)) is None:
        return None
    wanted, least, most = entry
    numbers = list(value.values()) if isinstance(value, dict) else list(value)
    if not (least <= len(numbers) <= most and all(map(wanted.holds, numbers))):
        return f"{least if least == most else f'{least} to {most}'} numbers {wanted}"
    if name.endswith("tile") and math.prod(numbers) > MOST_TILE:
        return f"tiles of at most {MOST_TILE} tokens"
    return None


def out_of_range(config) -> str | None:
    """A line about the first setting that is out of its range; None where all are inside."""
    for name, value in leaves(config):
        if (accepted := problem_of(name, value)) is not None:
            return f"{name}: got {value}, accepted: {accepted}"
    return None


def number_keys(schema: type, prefix: str = "") -> set[str]:
    """The dotted keys whose values are numbers, or numbers or null."""
    found = set()
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            found |= number_keys(kind, f"{prefix}{name}.")
        elif {kind, *get_args(kind)} - {NoneType} <= {int, float, int | None, float | None}:
            found.add(prefix + name)
    return found
