"""One reversible line on a stock diffusers pipeline:

    usv.enable(pipe, "outputs/usv_mini/student")     pipe(prompt) now runs the sparse student
    usv.enable(pipe, attention="svg2", top_p=0.9)    or, without training, a pattern (usv/sampling/patterns.py)
    usv.enable(pipe, STUDENT, attention="svg2")      or both: the student's plan says how much, the pattern which
    usv.enable(pipe, (HIGH, LOW))                    a pipeline of two experts (Wan2.2-A14B): a student of each
    usv.summary(pipe)                                what ran: plan, density, merging, forwards, seconds
    usv.disable(pipe)                                the pipeline is what it was

The student is a second transformer with its own weights; the pipeline's own is kept aside, untouched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from usv.models.forward import SparseTransformer
from usv.patterns import CallStats, Pattern
from usv.patterns.planned import PlannedPattern, planned_pattern
from usv.sampling.checkpoint import CheckpointError, Student, check_grid, load_student
from usv.sampling.patterns import (
    calls_lines,
    check_pattern,
    disable_pattern,
    enable_pattern,
    pattern_of,
    pattern_summary,
    progress_of,
    transformers_of,
)
from usv.sampling.sampler import StudentScheduler, with_shift
from usv.sparse.plan import MERGE_LADDER, SparsityPlan


@dataclass
class Record:
    """What the enabled transformer has executed since `enable` or `reset`."""

    forwards: int = 0
    seconds: float = 0.0
    densities: list[float] = field(default_factory=list)
    merged: list[float] = field(default_factory=list)
    calls: list[CallStats] = field(default_factory=list)  # of a pattern under the plan

    def reset(self) -> None:
        self.forwards, self.seconds = 0, 0.0
        for kept in (self.densities, self.merged, self.calls):
            kept.clear()

    def mean_density(self) -> float:
        """Executed block pairs / all block pairs of the tokens that merging left, mean over layers and forwards."""
        return sum(self.densities) / len(self.densities) if self.densities else 1.0

    def mean_merged(self) -> float:
        return sum(self.merged) / len(self.merged) if self.merged else 0.0


@dataclass
class Enabled:
    """State that `enable` hangs on a pipeline and `disable` removes."""

    originals: dict[str, torch.nn.Module]  # by their places in the pipeline
    original_class: type
    students: tuple[Student, ...]
    record: Record  # of all students together
    scheduler: object  # the pipeline's own; a few-step student brings its timesteps
    pattern: Pattern | None = None  # chooses the blocks at the plan's densities

    @property
    def student(self) -> Student:
        """The only one, or that for high noise."""
        return self.students[0]


EXPERTS = ("high", "low")  # as a pipeline of two orders them


def enable(
    pipe: WanPipeline,
    checkpoint: str | Path | Student | Sequence[str | Path | Student] | None = None,
    impl: str = "auto",
    attention: str | None = None,
    **options,
) -> WanPipeline:
    """Let `pipe` run a sparse student, or with `attention` a training-free pattern, or with both the student's plan with the
    blocks of the pattern (`usv.patterns.planned`). Returns the same pipeline.

    Guidance is folded into the student: `pipe(prompt)` then defaults to guidance_scale 1 and to the size, steps and text
    length of the checkpoint; asking for guidance is refused.

    checkpoint: of a pipeline of two experts two, the one for high noise first.

    Raises CheckpointError: a missing, damaged or foreign checkpoint, or one made for another model; ValueError: neither
    checkpoint nor attention, wrong options of a pattern (see `usv.sampling.patterns.enable_pattern`), or a pattern that the
    student's plan cannot use. Enabling twice replaces.
    """
    if checkpoint is None and attention is None:
        raise ValueError("enable: got neither of checkpoint and attention, accepted: one of them, or both: a student's plan "
                         "with the blocks of a pattern")  # fmt: skip
    if checkpoint is None:
        check_pattern(pipe, attention, impl, **options)  # refuses before it changes
        return enable_pattern(disable(pipe), attention, impl, **options)
    if options and attention is None:
        raise ValueError(f"{next(iter(options))}: got an option of a pattern, accepted: only together with attention=…")
    if not isinstance(pipe, WanPipeline):
        raise CheckpointError(f"enable: got a {type(pipe).__name__}, accepted: a diffusers WanPipeline")
    students = _students(pipe, checkpoint)
    record, pattern, fine = Record(), None, [None] * len(students)
    if attention is not None:
        recall_rows = options.pop("recall_rows", 0)
        for i, student in enumerate(students):
            model, chosen = student.model, planned_pattern(attention, student.plan, **options)
            pattern = pattern or chosen
            fine[i] = PlannedPattern(chosen, model.num_layers, model.tile, progress_of(pipe), record.calls.append, impl, recall_rows)
    disable(pipe)  # only now: what cannot be loaded leaves the pipeline as it was
    originals = transformers_of(pipe)
    state = Enabled(originals, type(pipe), students, record, pipe.scheduler, pattern)
    if students[0].sampling.get("student_timesteps"):
        pipe.scheduler = StudentScheduler(students[0].sampling["student_timesteps"])
    elif "flow_shift" in students[0].sampling:  # the noise levels that it was trained for
        pipe.scheduler = with_shift(pipe.scheduler, students[0].sampling["flow_shift"])
    for place, student, chosen in zip(originals, students, fine):
        setattr(pipe, place, planned(student.model, student.plan, record, impl, chosen))
    pipe.__class__ = _student_pipeline(type(pipe), students[0].sampling)
    pipe._usv = state
    return pipe


def _students(pipe: WanPipeline, checkpoint) -> tuple[Student, ...]:
    """A student for every transformer of the pipeline. CheckpointError where number or experts differ."""
    before = getattr(pipe, "_usv", None)
    bases = list((before.originals if isinstance(before, Enabled) else transformers_of(pipe)).values())
    given = checkpoint if isinstance(checkpoint, (tuple, list)) else [checkpoint]
    if len(given) != len(bases):
        wanted = "two, (HIGH, LOW), for a pipeline of two experts" if len(bases) == 2 else "one, for a pipeline of one transformer"
        raise CheckpointError(f"enable: got {len(given)} checkpoint(s), accepted: {wanted}")
    students = tuple(c if isinstance(c, Student) else load_student(c, base) for c, base in zip(given, bases))
    for student, expert in zip(students, EXPERTS if len(bases) == 2 else (None,)):
        if (found := student.sampling.get("expert")) != expert:
            raise CheckpointError(f"enable: got a student of the expert {found} for the expert {expert}, accepted: one of its own")
    if len(bases) == 2:
        boundaries = [pipe.config.boundary_ratio, *(student.sampling.get("boundary") for student in students)]
        sizes = [[student.sampling.get(key) for key in ("height", "width", "num_frames")] for student in students]
        if len(set(boundaries)) > 1 or sizes[0] != sizes[1]:
            raise CheckpointError(
                f"enable: got boundaries {boundaries} of pipeline and students, sizes {sizes}; accepted: one boundary, one size"
            )
    return students


def disable(pipe: WanPipeline) -> WanPipeline:
    """Undo `enable`; harmless when nothing is enabled."""
    state = getattr(pipe, "_usv", None)
    if not isinstance(state, Enabled):
        return disable_pattern(pipe)
    pipe.__class__ = state.original_class
    for student, (place, original) in zip(state.students, state.originals.items()):
        del student.model.transformer.forward  # the instance's override, not the class's method
        setattr(pipe, place, original)
    pipe.scheduler = state.scheduler
    del pipe._usv
    return pipe


def summary(pipe: WanPipeline) -> str:
    """A few lines that a person can read: what is enabled and what it has executed."""
    state = getattr(pipe, "_usv", None)
    if not isinstance(state, Enabled):
        state = pattern_of(pipe)
        return "usv: not enabled; the pipeline runs its own dense transformer" if state is None else pattern_summary(state)
    plans, record = [student.plan for student in state.students], state.record
    bins = sum(len(plan.edges) for plan in plans)
    merged = sum(plan.merged() * len(plan.edges) for plan in plans) / bins
    lines = [
        f"usv: sparse student, {plans[0].num_layers} layers × {bins} timestep bins, {merged:.0%} of tokens merged by plan"
        + ("" if state.pattern is None else f"\nblocks by {state.pattern} at the plan's densities"),
        f"executed: {record.forwards} forwards, {record.seconds:.2f} s in the transformer, attention density "
        f"{record.mean_density():.3f} of the tokens left, {record.mean_merged():.0%} merged",
        *(calls_lines(record.calls) if state.pattern is not None else ()),
        "timestep   density rung by layer",
    ]
    for student in reversed(state.students):  # ascending timesteps
        for edge, row in zip(student.plan.edges, student.plan.rungs):
            cells = " ".join(f"1/{2**r.density}{'' if not r.merge else f'·{MERGE_LADDER[r.merge]:.2f}m'}" for r in row)
            lines.append(f"  ≤ {edge:5.0f}  {cells}")
    return "\n".join(lines)


def planned(
    model: SparseTransformer, plan: SparsityPlan | None, record: Record, impl: str = "auto", fine: PlannedPattern | None = None
) -> torch.nn.Module:
    """`model.transformer` with its forward replaced by the sparse one under a plan (None: dense), as a pipeline calls it.

    fine: the pattern that chooses the blocks; None is the student's own tiles.
    """
    transformer = model.transformer

    def forward(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None, return_dict=True, **_):
        begun = time.perf_counter()
        rungs = None if plan is None else plan.at(float(timestep.max()))  # per token (TI2V), given frames have 0
        if fine is not None:
            fine.begin(model.grid_of(hidden_states.shape), timestep)
        branches = None if fine is None else fine.layers
        velocity, stats = model(hidden_states, timestep, encoder_hidden_states, rungs, impl=impl, fine=branches)
        record.seconds += time.perf_counter() - begun
        record.forwards += 1
        layers = range(model.num_layers)
        record.densities += [float(stats[i].density) if i in stats else 1.0 for i in layers]
        record.merged += [0.0 if rungs is None else MERGE_LADDER[rungs[i].merge] for i in layers]
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    transformer.forward = forward
    return transformer


def _student_pipeline(base: type, sampling: dict) -> type:
    """A subclass of the pipeline whose call has the student's defaults."""

    def call(self, *args, **kwargs):
        for scale in ("guidance_scale", "guidance_scale_2"):
            if kwargs.get(scale) not in (None, 1.0):
                raise CheckpointError(f"{scale}: got {kwargs[scale]}, accepted: 1.0; guidance is folded into the student's weights")
        defaults = {"guidance_scale": 1.0}
        for key in ("height", "width", "num_inference_steps", "max_sequence_length"):
            if sampling.get(key) is not None:
                defaults[key] = sampling[key]
        if sampling.get("num_frames") is not None:
            defaults["num_frames"] = frames_argument(self, sampling["num_frames"])
        kwargs = {**defaults, **kwargs}
        if sampling.get("num_frames") is not None:
            frames = frames_result(self, kwargs["num_frames"])
            check_grid(sampling, kwargs.get("height"), kwargs.get("width"), frames)
        return base.__call__(self, *args, **kwargs)

    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


def frames_result(pipe: WanPipeline, num_frames: int) -> int:
    """Frames that `pipe(num_frames=…)` really makes: diffusers rounds to k · factor + 1, also at factor 1."""
    factor = pipe.vae_scale_factor_temporal
    return num_frames if num_frames % factor == 1 else num_frames // factor * factor + 1


def frames_argument(pipe: WanPipeline, num_frames: int) -> int:
    """The argument that makes `num_frames` frames."""
    return num_frames - 1 if pipe.vae_scale_factor_temporal == 1 else num_frames
