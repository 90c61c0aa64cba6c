"""Training-free patterns on a stock diffusers pipeline, by the same line as a trained student:

    usv.enable(pipe, attention="svg2", top_p=0.9)     pipe(prompt) now runs SVG2 in every self-attention
    usv.summary(pipe)                                 executed density, recall, seconds by stage
    usv.disable(pipe)                                 the pipeline is what it was

Call, defaults, guidance and weights of the pipeline stay its own. Both transformers of Wan2.2 are enabled.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline

from usv.patterns import CallStats, Pattern, make_pattern
from usv.patterns.processors import attach
from usv.patterns.protocol import STAGES, require


@dataclass
class PatternRecord:
    """What the enabled transformers have executed since `enable` or `reset`; sums over attention calls."""

    forwards: int = 0
    seconds: float = 0.0
    calls: list[CallStats] = field(default_factory=list)

    def reset(self) -> None:
        self.forwards, self.seconds = 0, 0.0
        self.calls.clear()

    def mean_density(self) -> float:
        """Executed token pairs / all token pairs, mean over attention calls, the dense warm-up included."""
        return _mean([call.density for call in self.calls], 1.0)

    def sparse_density(self) -> float:
        """The same without the warm-up calls."""
        return _mean([call.density for call in self.calls if not call.dense], 1.0)

    def mean_recall(self) -> float | None:
        """Share of dense attention mass kept by the sparse calls; None if it was not measured."""
        return mean_recall(self.calls)

    def mean_merged(self) -> float:
        """Patterns merge no tokens."""
        return 0.0

    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage, of the sparse calls."""
        return stage_seconds(self.calls)


@dataclass
class EnabledPattern:
    """State that `enable_pattern` hangs on a pipeline and `disable_pattern` removes."""

    name: str
    pattern: Pattern
    record: PatternRecord
    undo: list[Callable[[], None]]


def transformers_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by their places in it; of two experts that for high noise first."""
    places = ("transformer", "transformer_2")
    return {place: getattr(pipe, place) for place in places if getattr(pipe, place, None) is not None}


def enable_pattern(
    pipe: DiffusionPipeline, attention: str, impl: str = "auto", recall_rows: int = 0, **options
) -> DiffusionPipeline:
    """Let every self-attention of `pipe` run under a training-free pattern. Returns the same pipeline.

    Args:
        pipe: a diffusers pipeline whose transformer is Wan, CogVideoX or HunyuanVideo.
        attention: svg | svg2 | radial | sliding_tile | tile_top_k.
        impl: how the kernel runs. recall_rows: query rows for measuring attention recall, 0 for none (it costs time).
        options: settings of the pattern, see its class in `usv.patterns`.

    Raises ValueError: another kind of transformer, an unknown pattern or option (with the nearest one), a value out of
    range. Settings that do not fit the token grid, such as more clusters than tokens, show in the first call.
    """
    pattern = make_pattern(attention, **options)
    record = PatternRecord()
    transformers = transformers_of(pipe)
    require(bool(transformers), "pipe", f"a {type(pipe).__name__}", "a pipeline with a Wan, CogVideoX or HunyuanVideo transformer")
    undo: list[Callable[[], None]] = []
    for transformer in transformers.values():
        undo.append(attach(transformer, pattern, progress_of(pipe), record.calls.append, impl, recall_rows))
        undo.append(_count_forwards(transformer, record))
    pipe._usv = EnabledPattern(attention, pattern, record, undo)
    return pipe


def disable_pattern(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo `enable_pattern`."""
    for undo in pipe._usv.undo:
        undo()
    del pipe._usv
    return pipe


def stage_seconds(calls: list[CallStats]) -> dict[str, float]:
    """Seconds by stage, of the sparse calls."""
    total = Counter(dict.fromkeys(STAGES, 0.0))
    for call in calls:
        if not call.dense:
            total.update(call.seconds)
    return dict(total)


def mean_recall(calls: list[CallStats]) -> float | None:
    """Share of dense attention mass kept by the sparse calls; None if it was not measured."""
    return _mean([call.recall for call in calls if not call.dense and call.recall is not None], None)


def calls_report(calls: list[CallStats]) -> dict:
    """What a run reports of its attention calls, for JSON: executed density with and without the dense warm-up, recall of the
    sparse calls (None: not measured), seconds by stage, and the calls of either kind."""
    sparse = [call for call in calls if not call.dense]
    recall = mean_recall(calls)
    return {
        "sparse_density": round(_mean([call.density for call in sparse], 1.0), 4),
        "recall": None if recall is None else round(recall, 4),
        "pattern_seconds": {stage: round(seconds, 6) for stage, seconds in stage_seconds(calls).items()},
        "dense_attention_seconds": round(sum(call.seconds["attention"] for call in calls if call.dense), 6),
        "attention_calls": {"dense": len(calls) - len(sparse), "sparse": len(sparse)},
    }


def calls_lines(calls: list[CallStats]) -> list[str]:
    """Seconds and recall as lines of a summary."""
    lines = ["seconds of the sparse calls: " + ", ".join(f"{stage} {s:.2f}" for stage, s in stage_seconds(calls).items())]
    if (recall := mean_recall(calls)) is not None:
        lines.append(f"attention recall of the sparse calls: {recall:.3f}")
    return lines


def pattern_summary(state: EnabledPattern) -> str:
    """A few lines that a person can read."""
    record = state.record
    sparse = sum(not call.dense for call in record.calls)
    return "\n".join([
        f"usv: training-free {state.pattern}",
        f"executed: {record.forwards} forwards, {record.seconds:.2f} s in the transformer, attention density "
        f"{record.mean_density():.3f}; {sparse} of {len(record.calls)} attention calls sparse, at {record.sparse_density():.3f}",
        *calls_lines(record.calls),
    ])  # fmt: skip


def progress_of(pipe: DiffusionPipeline):
    """`Progress` of a pipeline: its scheduler knows the step."""

    def progress(timestep: torch.Tensor) -> tuple[int, int, object]:
        timesteps = pipe.scheduler.timesteps
        if hasattr(pipe.scheduler, "step_index"):
            step = pipe.scheduler.step_index or 0  # None before the first step
        else:
            # Per-token timesteps (image to video) are zero where the image is: the largest is the step's.
            step = int((timesteps.float() - timestep.float().max().to(timesteps.device)).abs().argmin())
        return step, len(timesteps), timesteps

    return progress


def _count_forwards(transformer: torch.nn.Module, record: PatternRecord) -> Callable[[], None]:
    begun = [math.nan]

    def before(*_):
        begun[0] = time.perf_counter()

    def after(*_):
        record.forwards += 1
        record.seconds += time.perf_counter() - begun[0]

    hooks = (transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after))

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def _mean(values: list[float], empty):
    return sum(values) / len(values) if values else empty
