"""Training-free patterns on a stock diffusers pipeline, by the same line as a trained student:

    usv.enable(pipe, attention="svg2", top_p=0.9)     pipe(prompt) now runs SVG2 in every self-attention
    usv.summary(pipe)                                 executed density, recall, seconds by stage
    usv.disable(pipe)                                 the pipeline is what it was

Call, defaults, guidance and weights of the pipeline stay its own. Both transformers of Wan2.2 are enabled.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline

from usv.config import IMPLS
from usv.patterns import PATTERNS, CallStats, Pattern, make_pattern
from usv.patterns.processors import Attached, attach, attached_to, check, family_of, refusal, unwrap
from usv.patterns.protocol import STAGES, require

KEPT_CALLS = 8192  # of the latest attention calls: two videos of a 14B model with 50 steps


class Calls(deque):
    """Attention calls: sums over all of them, and the latest one by one, so that their size does not grow with the videos made.

    totals: of each kind, "dense" (warm-up) and "sparse", the calls and their densities; of the sparse ones seconds by stage and
    recall where it was "measured".
    """

    def __init__(self, calls: Iterable[CallStats] = (), maxlen: int = KEPT_CALLS):
        super().__init__(maxlen=maxlen)
        self.totals: Counter = Counter()
        for call in calls:
            self.append(call)

    def append(self, call: CallStats) -> None:
        super().append(call)
        kind = "dense" if call.dense else "sparse"
        self.totals.update({kind: 1, f"{kind} density": call.density})
        if call.dense:
            self.totals["dense seconds"] += call.seconds["attention"]
        else:
            self.totals.update(call.seconds)
            if call.recall is not None:
                self.totals.update({"measured": 1, "recall": call.recall})

    def clear(self) -> None:
        super().clear()
        self.totals.clear()

    def mean_density(self) -> float:
        """Executed token pairs / all token pairs, mean over all calls, the dense warm-up included."""
        total = self.totals
        return _ratio(total["dense density"] + total["sparse density"], total["dense"] + total["sparse"], 1.0)

    def sparse_density(self) -> float:
        """The same without the warm-up calls."""
        return _ratio(self.totals["sparse density"], self.totals["sparse"], 1.0)

    def mean_recall(self) -> float | None:
        """Share of dense attention mass kept by the sparse calls; None if it was not measured."""
        return _ratio(self.totals["recall"], self.totals["measured"], None)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage, of the sparse calls."""
        return {stage: float(self.totals[stage]) for stage in STAGES}


@dataclass
class PatternRecord:
    """What the enabled transformers have executed since `enable` or `reset`."""

    forwards: int = 0
    seconds: float = 0.0
    calls: Calls = field(default_factory=Calls)

    def add(self, call: CallStats) -> None:
        """Counts one attention call."""
        self.calls.append(call)

    def reset(self) -> None:
        self.forwards, self.seconds = 0, 0.0
        self.calls.clear()

    def mean_density(self) -> float:
        """See `Calls`, as the next three."""
        return self.calls.mean_density()

    def sparse_density(self) -> float:
        return self.calls.sparse_density()

    def mean_recall(self) -> float | None:
        return self.calls.mean_recall()

    def stage_seconds(self) -> dict[str, float]:
        return self.calls.stage_seconds()

    def mean_merged(self) -> float:
        """Patterns merge no tokens."""
        return 0.0


@dataclass
class EnabledPattern:
    """What a pipeline runs under: the pattern of its transformers, what they executed, and the way back."""

    name: str
    pattern: Pattern
    record: PatternRecord
    attached: list[Attached]


class PipelineProgress:
    """`Progress` of a pipeline: its scheduler knows the step. A deep copy of a pipeline asks the copy's scheduler; a copy of
    the transformer alone goes on asking the pipeline's."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    def __deepcopy__(self, memo: dict) -> PipelineProgress:
        return PipelineProgress(memo.get(id(self.pipe), self.pipe))

    def __call__(self, timestep: torch.Tensor) -> tuple[int, int, object]:
        scheduler = self.pipe.scheduler
        timesteps = scheduler.timesteps
        step = getattr(scheduler, "step_index", None)
        if step is None:  # before the first step, which need not be the schedule's first (video to video)
            step = getattr(scheduler, "begin_index", None)
        if step is not None and step >= len(timesteps):
            raise ValueError("scheduler: got a forward after the last step of the enabled pipeline's, accepted: usv.enable of the pipeline that is called, which has a scheduler of its own")
        if step is None:
            # Per-token timesteps (image to video) are zero where the image is: the largest is the step's.
            now = timestep.float().max().to(timesteps.device)
            gaps = (timesteps.float() - now).abs()
            step = int(gaps.argmin())
            # A model that is called with another unit of time (Cosmos: sigma) says nothing until its scheduler has stepped.
            if hasattr(scheduler, "step_index") and float(gaps[step]) > 1e-3 * float(timesteps[step].abs()):
                step = 0
        return step, len(timesteps), timesteps


progress_of = PipelineProgress


def transformers_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by their places in it; of two experts that for high noise first."""
    places = ("transformer", "transformer_2")
    return {place: getattr(pipe, place) for place in places if getattr(pipe, place, None) is not None}


def attending(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    """What of a pipeline runs a pattern: its transformers, and a control branch beside them whose attention is known."""
    branch = getattr(pipe, "controlnet", None)
    known = branch is not None and family_of(unwrap(branch)) is not None
    return [*transformers_of(pipe).values(), *([branch] if known else [])]


def check_pattern(pipe: DiffusionPipeline, attention: str, impl: str = "auto", recall_rows: int = 0, **options) -> Pattern:
    """The settings that `enable_pattern` would run; changes nothing.

    Raises ValueError: a pipeline without a transformer that is known, an unknown pattern, option or impl (with the nearest
    one), a value out of range.
    """
    pattern = make_pattern(attention, **options)
    require(impl in IMPLS, "impl", repr(impl), ", ".join(IMPLS))
    require(recall_rows >= 0, "recall_rows", recall_rows, "query rows, 0 for no measurement")
    transformers = transformers_of(pipe)
    if not transformers:
        denoiser = getattr(pipe, "unet", None)
        why = "it has no denoising transformer" if denoiser is None else refusal(type(denoiser).__name__)
        require(False, "pipe", f"a {type(pipe).__name__}: {why}", "a pipeline of the table that python -m usv.models prints")
    for module in attending(pipe):
        check(module)
    return pattern


def enable_pattern(
    pipe: DiffusionPipeline, attention: str, impl: str = "auto", recall_rows: int = 0, **options
) -> DiffusionPipeline:
    """Let every long self-attention of `pipe` run under a training-free pattern. Returns the same pipeline.

    The pattern is the transformers': pipelines that share them (`from_pipe`) run it too, and any of them may disable it.
    Enabling a second time replaces.

    Args:
        pipe: a diffusers pipeline whose transformer is of a family in `usv.patterns.processors.FAMILIES`.
        attention: svg | svg2 | radial | sliding_tile | tile_top_k.
        impl: how the kernel runs. recall_rows: query rows for measuring attention recall, 0 for none (it costs time).
        options: settings of the pattern, see its class in `usv.patterns`.

    Raises ValueError: see `check_pattern`; what was enabled before stays. Settings that do not fit the token grid, such as
    more clusters than tokens, show in the first call.
    """
    pattern = check_pattern(pipe, attention, impl, recall_rows, **options)
    record, progress = PatternRecord(), PipelineProgress(pipe)
    attached = [attach(module, pattern, progress, record, impl, recall_rows) for module in attending(pipe)]
    pipe._usv = EnabledPattern(attention, pattern, record, attached)
    return pipe


def disable_pattern(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo `enable_pattern`, also where another pipeline enabled the transformers of this one; harmless when nothing is."""
    for module in attending(pipe):
        if (attached := attached_to(module)) is not None:
            attached.undo()
    if isinstance(state := pipe.__dict__.pop("_usv", None), EnabledPattern):
        for attached in state.attached:  # of transformers that were taken out since
            attached.undo()
    return pipe


def pattern_of(pipe: DiffusionPipeline) -> EnabledPattern | None:
    """The pattern under which the transformers of a pipeline are now, whichever pipeline enabled it."""
    attached = [found for module in attending(pipe) if (found := attached_to(module)) is not None]
    if not attached:
        return None
    pattern = attached[0].run.pattern
    name = next(name for name, kind in PATTERNS.items() if type(pattern) is kind)
    return EnabledPattern(name, pattern, attached[0].record, attached)


def calls_report(calls: Calls) -> dict:
    """What a run reports of its attention calls, for JSON: executed density with and without the dense warm-up, recall of the
    sparse calls (None: not measured), seconds by stage, and the calls of either kind."""
    recall = calls.mean_recall()
    return {
        "sparse_density": round(calls.sparse_density(), 4),
        "recall": None if recall is None else round(recall, 4),
        "pattern_seconds": {stage: round(seconds, 6) for stage, seconds in calls.stage_seconds().items()},
        "dense_attention_seconds": round(calls.totals["dense seconds"], 6),
        "attention_calls": {"dense": calls.totals["dense"], "sparse": calls.totals["sparse"]},
    }


def calls_lines(calls: Calls) -> list[str]:
    """Seconds and recall as lines of a summary."""
    lines = ["seconds of the sparse calls: " + ", ".join(f"{stage} {s:.2f}" for stage, s in calls.stage_seconds().items())]
    if (recall := calls.mean_recall()) is not None:
        lines.append(f"attention recall of the sparse calls: {recall:.3f}")
    return lines


def pattern_summary(state: EnabledPattern) -> str:
    """A few lines that a person can read."""
    record = state.record
    sparse, dense = (record.calls.totals[kind] for kind in ("sparse", "dense"))
    return "\n".join([
        f"usv: training-free {state.pattern}",
        f"executed: {record.forwards} forwards, {record.seconds:.2f} s in the transformer, attention density "
        f"{record.mean_density():.3f}; {sparse} of {sparse + dense} attention calls sparse, at {record.sparse_density():.3f}",
        *calls_lines(record.calls),
    ])  # fmt: skip


def _ratio(total: float, count: int, empty):
    return total / count if count else empty
