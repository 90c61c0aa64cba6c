"""Whether a run's settings can be met at its size: known from numbers alone, so a dry run says it too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from usv.config import ModelConfig, SettingError, TrainConfig
from usv.models.protocol import Family
from usv.policy import allowed
from usv.sparse.plan import Rung, executed_densities


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


def least_cost(config: TrainConfig, costs: Mapping[Rung, float], num_layers: int) -> float:
    """Of a forward under the sparsest plan that `policy.axes` and `policy.merge_layers` allow, as a fraction of the dense one's."""
    p = config.policy
    merging = num_layers if p.merge_layers is None or p.name not in ("gumbel", "calibration") else min(p.merge_layers, num_layers)
    least = lambda merge: min(cost for rung, cost in costs.items() if allowed(rung, p.axes) and (merge or not rung.merge))  # noqa: E731
    return (merging * least(True) + (num_layers - merging) * least(False)) / num_layers


def check_budget(config: TrainConfig, costs: Mapping[Rung, float], num_layers: int) -> None:
    """SettingError where the sparsest plan costs more than a budget. costs: of a layer's rungs, as fractions of the dense forward's."""
    p, least = config.policy, least_cost(config, costs, num_layers)
    share = p.bins if p.steps else 1  # a jumped step costs nothing, and one of them always runs
    for name, budget in [("policy.budget", p.budget), *(("policy.budgets", budget) for budget in p.budgets)]:
        if p.name != "inherit" and least / share > budget:
            lowest = math.ceil(1000 * least / share) / 1000
            raise SettingError(
                f"{name}: got {budget}, but the sparsest plan still costs {lowest:.3f} of "
                f"{'so many dense forwards as there are bins' if share > 1 else 'a dense forward'} at this size; accepted: {lowest:.3f} to 1"
            )


def check_content(config: TrainConfig, world: int) -> None:
    """SettingError where a plan made of a batch's content would be made of a part of it. world: processes that have clips of their own."""
    if config.policy.input == "content" and (world > 1 or config.optim.accumulate > 1):
        raise SettingError(
            f"policy.input: got content on {world} processes in {config.optim.accumulate} parts, accepted: none | place, or one of each; clips of "
            "other processes and parts are not seen by the network"
        )


def check_optimizer(config: TrainConfig) -> None:
    """SettingError for an optimiser of matrices or of 8 bits under a runtime that partitions tensors."""
    kind = config.optim.optimizer
    if kind != "adamw" and config.runtime.name.startswith("zero"):
        raise SettingError(f"optim.optimizer: got {kind} with runtime={config.runtime.name}, accepted: adamw there, or runtime=single | ddp")


def check_sharing(config: TrainConfig, family: Family) -> None:
    """SettingError where processes are to share samples of a family that they cannot share."""
    if config.runtime.sequence_parallel > 1 and not family.shared:
        raise SettingError(
            f"runtime.sequence_parallel: got {config.runtime.sequence_parallel} for a model of {family.name}, accepted: 1; its audio asks all of the video's "
            "tokens, of which a process has its own alone"
        )
