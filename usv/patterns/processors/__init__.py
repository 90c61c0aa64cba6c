"""Patterns inside stock diffusers transformers, through their own attention processors.

    attached = attach(transformer, SVG2(), progress, record)    every long self-attention now runs `attend`
    attached.undo()                                             the transformer has its own processors again

The weights are not touched. A forward pre-hook notes the token grid and the step; each processor knows its layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import nn

from usv.patterns.processors.families import FAMILIES as FAMILIES
from usv.patterns.processors.families import REFUSED as REFUSED
from usv.patterns.processors.families import Family, call_arguments, family_of, refusal
from usv.patterns.processors.families import token_grid as token_grid
from usv.patterns.processors.run import PatternRun as PatternRun
from usv.patterns.processors.run import Processor, Progress
from usv.patterns.protocol import Pattern, require
from usv.sparse.packed import conditions_before

MARK = "_usv_pattern"  # where a transformer keeps its `Attached`: pipelines share transformers


@dataclass
class Attached:
    """A transformer under a pattern. It refers to no pipeline and holds no closures, so a deep copy of the transformer has a
    copy of this whose `undo` is its own.

    called: what the pipeline calls, the transformer or its compiled wrapper. record: see `attach`. shared: whether processes share
    the forward (`usv.sampling.shared_pattern`), which then runs by other means than the processors.
    """

    transformer: nn.Module
    called: nn.Module
    attentions: list[nn.Module]
    originals: list[object]
    run: PatternRun
    record: object
    handles: list = field(default_factory=list)
    shared: bool = False
    begun: float = 0.0

    @torch.compiler.disable  # it looks at the scheduler and at the clock
    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Notes the grid and the step of a forward."""
        self.begun = time.perf_counter()
        family = family_of(self.transformer)
        ours = self.shared or all(self._installed(attention.processor) for attention in self.attentions)
        require(ours, "attention processors", "ones that were set after the pattern was enabled",
                "the pattern's own; usv.enable again after fuse_qkv_projections or set_attn_processor")  # fmt: skip
        check_parallel(self.transformer)
        call = call_arguments(self.transformer, args, kwargs)
        self.run.begin(family.grid(self.transformer.config, call), call["timestep"], conditions_before(call))

    @torch.compiler.disable
    def after(self, *_) -> None:
        """Counts a forward, with its control branch's as one."""
        self.record.forwards += not family_of(self.transformer).branch
        self.record.seconds += time.perf_counter() - self.begun

    def _installed(self, processor: object) -> bool:
        """Whether a processor is one that `attach` set with this."""
        return isinstance(processor, Processor) and processor.run is self.run

    def undo(self) -> None:
        """The transformer has its own processors again; harmless a second time."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.run.grid = None  # a processor that somebody kept and sets again refuses to run
        if self.transformer.__dict__.get(MARK) is not self:
            return
        for attention, original in zip(self.attentions, self.originals):
            if isinstance(attention.processor, Processor):  # one that was set since is the user's
                _set(attention, original)
        # CogVideoX's fuse_qkv_projections keeps those it found for unfuse_qkv_projections
        kept = vars(self.transformer).get("original_attn_processors") or {}
        kept.update({name: self.originals[own.layer] for name, own in kept.items() if self._installed(own)})
        delattr(self.transformer, MARK)


def _set(attention: nn.Module, processor: object) -> None:
    if hasattr(attention, "set_processor"):
        attention.set_processor(processor)
    else:  # Mochi's
        attention.processor = processor


def check_parallel(transformer: nn.Module) -> None:
    """ValueError where diffusers splits the sequence over ranks: a pattern needs all of it."""
    parallel = getattr(transformer, "_parallel_config", None)
    context = None if parallel is None else getattr(parallel, "context_parallel_config", None)
    require(context is None, "transformer", "one with context parallelism (enable_parallelism)",
            "one whose every rank holds the whole sequence: a pattern chooses among all tokens")  # fmt: skip


def check(transformer: nn.Module) -> Family:
    """The family of a transformer (or of its compiled wrapper). ValueError: not known, refused, or split over ranks."""
    transformer = unwrap(transformer)
    family, name = family_of(transformer), type(transformer).__name__
    require(family is not None, "transformer", f"{name}: {refusal(name)}", f"{', '.join(FAMILIES)}; see python -m usv.models")
    check_parallel(transformer)
    return family


def unwrap(transformer: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper."""
    return getattr(transformer, "_orig_mod", transformer)


def attach(
    transformer: nn.Module,
    pattern: Pattern,
    progress: Progress,
    record: object,
    impl: str = "auto",
    recall_rows: int = 0,
) -> Attached:
    """Lets every long self-attention of `transformer` run under `pattern`. `undo` of what it returns takes it back.

    record: has `forwards`, `seconds` and `add(CallStats)`. Raises ValueError: see `check`; nothing has changed then.
    """
    family, called, transformer = check(transformer), transformer, unwrap(transformer)
    if (before := attached_to(transformer)) is not None:
        before.undo()
    attentions = family.attentions(transformer)
    require(bool(attentions), "transformer", "one without blocks", "at least one block")
    run = PatternRun(pattern, len(attentions), progress, record.add, impl, recall_rows)
    attached = Attached(transformer, called, attentions, [a.processor for a in attentions], run, record)
    for layer, attention in enumerate(attentions):
        _set(attention, family.processor(run, layer))
    # On the compiled wrapper hooks run before the compiler looks.
    attached.handles += [
        called.register_forward_pre_hook(attached.before, with_kwargs=True), called.register_forward_hook(attached.after)
    ]  # fmt: skip
    setattr(transformer, MARK, attached)
    return attached


def attached_to(transformer: nn.Module | None) -> Attached | None:
    """What `attach` left on a transformer that is under a pattern now."""
    return None if transformer is None else unwrap(transformer).__dict__.get(MARK)
