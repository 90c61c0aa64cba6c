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

import inspect
import logging
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from usv.models import lora
from usv.models.families import family_or_none
from usv.patterns import Pattern
from usv.patterns.planned import PlannedPattern, planned_pattern
from usv.patterns.processors import unwrap
from usv.sampling.checkpoint import CheckpointError, Student, check_fits, load_student
from usv.sampling.fingerprint import quantised
from usv.sampling.held import hold
from usv.sampling.patterns import (
    KEPT_CALLS,
    Calls,
    calls_lines,
    check_pattern,
    disable_pattern,
    enable_pattern,
    pattern_of,
    pattern_summary,
    progress_of,
    transformers_of,
)
from usv.sampling.pipeline_class import folded, student_pipeline
from usv.sampling.sampler import StudentScheduler, with_shift
from usv.sampling.styles import check_unloaded, fused_loras, set_fused
from usv.sparse.plan import MERGE_LADDER

logger = logging.getLogger("usv")


@dataclass
class Record:
    """What the enabled transformer has executed since `enable` or `reset`: sums over all, and the latest one by one (densities and
    merged fractions by layer, calls of a pattern under the plan), so that its size does not grow with the videos made."""

    forwards: int = 0
    seconds: float = 0.0
    densities: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))
    merged: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))
    calls: Calls = field(default_factory=Calls)  # of a pattern under the plan
    layers: int = 0
    total_density: float = 0.0
    total_merged: float = 0.0

    def add(self, seconds: float, densities: Sequence[float], merged: Sequence[float]) -> None:
        """Counts one forward."""
        self.forwards, self.seconds, self.layers = self.forwards + 1, self.seconds + seconds, self.layers + len(densities)
        self.total_density, self.total_merged = self.total_density + sum(densities), self.total_merged + sum(merged)
        self.densities.extend(densities)
        self.merged.extend(merged)

    def reset(self) -> None:
        self.forwards, self.seconds, self.layers, self.total_density, self.total_merged = 0, 0.0, 0, 0.0, 0.0
        for kept in (self.densities, self.merged, self.calls):
            kept.clear()

    def mean_density(self) -> float:
        """Executed block pairs / all block pairs of the tokens that merging left, mean over layers and forwards."""
        return self.total_density / self.layers if self.layers else 1.0

    def mean_merged(self) -> float:
        return self.total_merged / self.layers if self.layers else 0.0


@dataclass
class Enabled:
    """State that `enable` hangs on a pipeline and `disable` removes."""

    originals: dict[str, torch.nn.Module]  # by their places in the pipeline
    original_class: type
    students: tuple[Student, ...]
    record: Record  # of all students together
    scheduler: object  # the pipeline's own; a few-step student brings its timesteps
    pattern: Pattern | None = None  # chooses the blocks at the plan's densities
    kinds: dict[str, tuple] = field(default_factory=dict)  # dtype and device of the held students as they were put in
    fused: set[str] = field(default_factory=set)  # LoRAs fused into the originals

    @property
    def student(self) -> Student:
        """The only one, or that for high noise."""
        return self.students[0]

    def brought_along(self, pipe: DiffusionPipeline, place: str, moved: bool = True) -> torch.nn.Module:
        """The pipeline's own transformer in the dtype, and where `moved` on the device, that were asked of the student since: they hold for it, too."""
        original, held = self.originals[place], getattr(pipe, place)
        dtype, device = self.kinds[place]
        if held.dtype != dtype:
            unwrap(original).to(held.dtype)
        if moved and held.device not in (device, torch.device("meta")):
            unwrap(original).to(held.device)
            device = held.device
        self.kinds[place] = (held.dtype, device)
        return original


EXPERTS = ("high", "low")  # as a pipeline of two orders them
# pipelines that cannot run the steps of a few-step student, and why
OWN_LADDERS = {
    "LTXI2VLongMultiPromptPipeline": "leaves out the last of a scheduler's timesteps",
    "LTX2DFRTemporalRefinePipeline": "runs LTXEulerAncestralRFScheduler alone",
}


def enable(
    pipe: DiffusionPipeline,
    checkpoint: str | Path | Student | Sequence[str | Path | Student] | None = None,
    impl: str = "auto",
    attention: str | None = None,
    **options,
) -> DiffusionPipeline:
    """Let `pipe` run a sparse student, or with `attention` a training-free pattern, or with both the student's plan with the
    blocks of the pattern (`usv.patterns.planned`). Returns the same pipeline.

    Guidance is folded into the student: `pipe(prompt)` then defaults to guidance_scale 1 and to the size, steps and text
    length of the checkpoint; asking for guidance is refused. A router's student (optim.train=router) is guided as the base is.

    checkpoint: of a pipeline of two experts two, the one for high noise first.

    Raises CheckpointError: a missing, damaged or foreign checkpoint, or one made for another model; ValueError: neither
    checkpoint nor attention, wrong options of a pattern (see `usv.sampling.patterns.enable_pattern`), or a pattern that the
    student's plan cannot use. Enabling twice replaces.
    """
    if checkpoint is None and attention is None:
        raise ValueError("enable: got neither of checkpoint and attention, accepted: one of them, or both: a student's plan "
                         "with the blocks of a pattern")  # fmt: skip
    if checkpoint is None:
        check_own(pipe)
        check_pattern(pipe, attention, impl, **options)  # refuses before it changes
        return enable_pattern(disable(pipe), attention, impl, **options)
    if options and attention is None:
        raise ValueError(f"{next(iter(options))}: got an option of a pattern, accepted: only together with attention=…")
    check_pipeline(pipe)
    with offload_kept(pipe):
        students = _students(pipe, checkpoint)
        now, fused = {place: unwrap(transformer) for place, transformer in transformers_of(pipe).items()}, fused_loras(pipe)
        record, pattern, fine = Record(), None, [None] * len(students)
        if attention is not None:
            recall_rows = options.pop("recall_rows", 0)
            family = students[0].model.family
            if family.joint:
                raise CheckpointError(f"attention: got {attention!r} beside a student of {family.name}, whose attention is over video and text together, accepted: the student's own blocks, or the pattern alone")
            for i, student in enumerate(students):
                model, chosen = student.model, planned_pattern(attention, student.plan, **options)
                pattern = pattern or chosen
                fine[i] = PlannedPattern(chosen, model.num_layers, model.tile, progress_of(pipe), record.calls.append, impl, recall_rows)
        disable(pipe)  # only now: what cannot be loaded leaves the pipeline as it was
        state = Enabled(transformers_of(pipe), type(pipe), students, record, pipe.scheduler, pattern, fused=fused_loras(pipe))
        if students[0].sampling.get("student_timesteps"):
            pipe.scheduler = StudentScheduler(students[0].sampling["student_timesteps"])
        elif "flow_shift" in students[0].sampling:  # the noise levels that it was trained for
            pipe.scheduler = with_shift(pipe.scheduler, students[0].sampling["flow_shift"])
        given = checkpoint if isinstance(checkpoint, (tuple, list)) else [checkpoint]
        for (place, original), student, chosen, one in zip(state.originals.items(), students, fine, given):
            shared = one is student or student.router and quantised(unwrap(original)) is not None  # with the caller, or with the base
            held = hold(student, record, impl, chosen, folded(student.sampling), shared=shared)
            held._planned.sampler = pipe.scheduler if isinstance(pipe.scheduler, StudentScheduler) else None
            lora.carry(now[place], held, shared=shared)
            setattr(pipe, place, held)
            _same_storage(unwrap(original), held)
            state.kinds[place] = (held.dtype, held.device)
            if original is not unwrap(original) or any(getattr(module, "_compiled_call_impl", None) for module in original.modules()):
                logger.warning("usv: %s was compiled; the student runs uncompiled until pipe.%s.compile_repeated_blocks()", place, place)
            if (kind := quantised(unwrap(original))) is not None and quantised(held) is None:
                logger.warning("usv: %s is quantised (%s), its student is in full precision; quantise pipe.%s again", place, kind, place)
        pipe.__class__ = student_pipeline(type(pipe), students[0].sampling, students[0].model.family.guidance, students[1].sampling if len(students) == 2 else None)
        pipe._usv = state
        set_fused(pipe, fused)
    return pipe


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """CheckpointError for a pipeline whose transformers have no student here, or are in a state that a student cannot take over."""
    known = "a diffusers pipeline with a transformer of a family in usv.models.families"
    before = getattr(pipe, "_usv", None)
    if not isinstance(pipe, DiffusionPipeline):
        raise CheckpointError(f"enable: got a {type(pipe).__name__}, accepted: {known}")
    originals = before.originals if isinstance(before, Enabled) else transformers_of(pipe)
    check_own(pipe)
    for transformer in map(unwrap, originals.values()):
        name = f"enable: got a {type(pipe).__name__} with a {type(transformer).__name__}"
        if family_or_none(transformer) is None:
            raise CheckpointError(f"{name}, accepted: {known}")
        if getattr(transformer, "is_cache_enabled", False):
            raise CheckpointError(f"{name} whose cache is enabled, accepted: disable_cache() first; a plan says already what each step computes")
        if getattr(transformer, "_parallel_config", None) is not None:
            raise CheckpointError(f"{name} that is spread over processes (enable_parallelism), accepted: one that is whole; a student chooses among all tokens")
    if not originals:
        raise CheckpointError(f"enable: got a {type(pipe).__name__} without a transformer, accepted: {known}")


def student_of_another(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline runs the student of one that it was made of (from_pipe)."""
    return not isinstance(getattr(pipe, "_usv", None), Enabled) and any(hasattr(unwrap(transformer), "_planned") for transformer in transformers_of(pipe).values())


def check_own(pipe: DiffusionPipeline) -> None:
    """CheckpointError for a pipeline that runs another's student."""
    if student_of_another(pipe):
        raise CheckpointError(f"enable, disable: got a {type(pipe).__name__} that was made (from_pipe) of an enabled pipeline and runs its student, accepted: that pipeline, or from_pipe again after usv.disable of it")


@contextmanager
def offload_kept(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, the pipeline is without the hooks of its CPU offload, if it has any; they are put on again at the end, on what is there then."""
    again = None
    if getattr(pipe, "_all_hooks", None):
        again = "enable_model_cpu_offload"
    elif any(hasattr(module, "_hf_hook") for module in pipe.components.values() if isinstance(module, torch.nn.Module)):
        again = "enable_sequential_cpu_offload"
    if again is not None and not hasattr(pipe, "_offload_device"):
        if any(hasattr(unwrap(transformer), "_hf_hook") for transformer in transformers_of(pipe).values()):
            raise CheckpointError(
                f"enable, disable: got a {type(pipe).__name__} whose transformer another pipeline offloads, accepted: its own enable_model_cpu_offload() or "
                "enable_sequential_cpu_offload() first"
            )
        again = None  # only parts that are shared with another pipeline
    if again is None:
        yield
        return
    device = pipe._offload_device
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        getattr(pipe, again)(device=device)


def _same_storage(original: torch.nn.Module, held: torch.nn.Module) -> None:
    """Layerwise casting and group offload of the original on the student."""
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    for module in original.modules():
        hook = module._diffusers_hook.get_hook("layerwise_casting") if hasattr(module, "_diffusers_hook") else None
        if hook is not None:
            held.enable_layerwise_casting(hook.storage_dtype, hook.compute_dtype, non_blocking=hook.non_blocking)
            break
    if (hook := _get_top_level_group_offload_hook(original)) is not None:
        c = hook.config
        held.enable_group_offload(
            c.onload_device, c.offload_device, c.offload_type.value, c.num_blocks_per_group, c.non_blocking, c.stream is not None,
            c.record_stream, c.low_cpu_mem_usage, None if c.offload_to_disk_path is None else tempfile.mkdtemp(prefix="usv-", dir=c.offload_to_disk_path),
        )  # fmt: skip


@contextmanager
def read_back(bases: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, weights that group offload has put on the disk are in memory."""
    registries = [module._diffusers_hook for base in bases for module in base.modules() if hasattr(module, "_diffusers_hook")]
    groups = {id(hook.group): hook.group for registry in registries if (hook := registry.get_hook("group_offloading")) is not None and hook.group.offload_to_disk_path}
    for group in groups.values():
        group.onload_()
    try:
        yield
    finally:
        for group in groups.values():
            group.offload_()


def _students(pipe: DiffusionPipeline, checkpoint) -> tuple[Student, ...]:
    """A student for every transformer of the pipeline. CheckpointError where number or experts differ."""
    before = getattr(pipe, "_usv", None)
    bases = list((before.originals if isinstance(before, Enabled) else transformers_of(pipe)).values())
    given = checkpoint if isinstance(checkpoint, (tuple, list)) else [checkpoint]
    if len(given) != len(bases):
        wanted = "two, (HIGH, LOW), for a pipeline of two experts" if len(bases) == 2 else "one, for a pipeline of one transformer"
        raise CheckpointError(f"enable: got {len(given)} checkpoint(s), accepted: {wanted}")
    bases = [unwrap(base) for base in bases]
    with read_back(bases):
        students = tuple(c if isinstance(c, Student) else load_student(c, base) for c, base in zip(given, bases))
    fused = before.fused if isinstance(before, Enabled) else fused_loras(pipe)
    check_unloaded(pipe, [unwrap(t) for t in transformers_of(pipe).values()], fused, whole=not all(student.on_base for student in students))
    for student, base in zip(students, bases):
        check_fits("enable", student.model.family.name, student.model.config, base)
        if student.sampling.get("student_timesteps") and not student.model.family.flows:
            raise CheckpointError(
                f"enable: got a few-step student of {student.model.family.name}, whose pipelines' timesteps and predictions are not the flow's "
                "that its steps lie on, accepted: a student of the teacher's steps (objective=velocity)"
            )
    for student, expert in zip(students, EXPERTS if len(bases) == 2 else (None,)):
        if (found := student.sampling.get("expert")) != expert:
            raise CheckpointError(f"enable: got a student of the expert {found} for the expert {expert}, accepted: one of its own")
    own = before.original_class if isinstance(before, Enabled) else type(pipe)
    if students[0].sampling.get("student_timesteps") and (why := OWN_LADDERS.get(own.__name__)):
        raise CheckpointError(f"enable: got a few-step student for a {own.__name__}, which {why}, accepted: a student of the teacher's steps (objective=velocity)")
    takes, words = "image" in inspect.signature(own.__call__).parameters, ("text to video", "image to video")
    for student in students:  # of one transformer that serves both (TI2V-5B); others differ in their channels
        if (found := student.sampling.get("image")) not in (None, takes):
            raise CheckpointError(f"enable: got a student of {words[bool(found)]} for a {own.__name__}, accepted: one of {words[takes]}, with which it was trained")
    if len(bases) == 2:
        boundaries = [pipe.config.boundary_ratio, *(student.sampling.get("boundary") for student in students)]
        sizes = [[student.sampling.get(key) for key in ("height", "width", "num_frames")] for student in students]
        for name in ("student_timesteps", "flow_shift"):
            if (found := [student.sampling.get(name) for student in students])[0] != found[1]:
                raise CheckpointError(f"enable: got students of the {name} {found}, accepted: one for both experts")
        if len({folded(student.sampling) for student in students}) > 1:
            raise CheckpointError("enable: got a student with guidance folded in and one of a router (optim.train=router), which has it not, accepted: two of a kind")
        if len(set(boundaries)) > 1 or sizes[0] != sizes[1]:
            raise CheckpointError(
                f"enable: got boundaries {boundaries} of pipeline and students, sizes {sizes}; accepted: one boundary, one size"
            )
    return students


def disable(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo `enable`; harmless when nothing is enabled."""
    state = getattr(pipe, "_usv", None)
    if not isinstance(state, Enabled):
        check_own(pipe)
        return disable_pattern(pipe)
    with offload_kept(pipe):
        pipe.__class__ = state.original_class
        for place in state.originals:
            setattr(pipe, place, state.brought_along(pipe, place))
        pipe.scheduler = state.scheduler
        set_fused(pipe, state.fused)
        del pipe._usv
    return pipe


def summary(pipe: DiffusionPipeline) -> str:
    """A few lines that a person can read: what is enabled and what it has executed."""
    state = getattr(pipe, "_usv", None)
    if not isinstance(state, Enabled):
        if student_of_another(pipe):
            return "usv: not enabled; the pipeline was made of an enabled one and runs its student"
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
