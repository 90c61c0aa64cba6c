"""Whether a run's settings can be met at its size: known from numbers alone, so a dry run says it too."""

from __future__ import annotations

import math
from collections.abc import Sequence

from usv.config import ModelConfig, SettingError, TrainConfig
from usv.models.protocol import Family
from usv.sparse.plan import executed_densities


def check_size(m: ModelConfig, space: int, time: int, patch: Sequence[int]) -> None:
    """SettingError where codec and patches do not divide a clip. space, time: the codec's factors."""
    for name, value, step in (("height", m.height, space * patch[1]), ("width", m.width, space * patch[2])):
        if value % step or value < step:
            raise SettingError(f"model.{name}: got {value}, accepted: multiples of {step}, e.g. {max(step, round(value / step) * step)}")
    if (m.num_frames - 1) % time or m.num_frames < 1:
        nearest = max(0, m.num_frames - 1) // time * time + 1
        raise SettingError(f"model.num_frames: got {m.num_frames}, accepted: multiples of {time} plus 1, e.g. {nearest}")


def check_density(config: TrainConfig, num_blocks: int) -> None:
    """SettingError where no plan is as sparse as policy.most_density wants: of few blocks the last rung computes one, of many 1/32."""
    p, least = config.policy, executed_densities(num_blocks)[-1]
    if p.name == "gumbel" and "density" in p.axes and p.most_density < least:
        lowest = math.ceil(1000 * least) / 1000
        raise SettingError(
            f"policy.most_density: got {p.most_density}, but the sparsest plan still computes {lowest:.3f} of the {num_blocks} × {num_blocks} blocks at "
            f"this size and tile; accepted: {lowest:.3f} to 1"
        )


def check_sharing(config: TrainConfig, family: Family) -> None:
    """SettingError where processes are to share samples of a family that they cannot share."""
    if config.runtime.sequence_parallel > 1 and not family.shared:
        raise SettingError(
            f"runtime.sequence_parallel: got {config.runtime.sequence_parallel} for a model of {family.name}, accepted: 1; its audio asks all of the video's "
            "tokens, of which a process has its own alone"
        )
