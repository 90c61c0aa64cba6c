"""A training-free pattern on processes that share each video: tokens and, in attention, heads divided as a student's are (Ulysses).

    usv.enable(pipe, attention="svg2"); share_pattern(pipe, group)      on every process of the group; usv.disable(pipe) undoes both

The transformer's forward is then the sparse one of `usv.models.forward` with every layer dense and the pattern in place of dense attention.
A pattern decides by head, so each process decides for its own; what is recorded of a call is the mean over the group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import nn

from usv.config import SettingError
from usv.models.families import family_of, family_or_none
from usv.models.forward import run_forward
from usv.patterns.processors import Attached, attached_to, unwrap
from usv.patterns.protocol import CallStats
from usv.sampling.held import signature_of
from usv.sampling.patterns import attending
from usv.sparse.grid import Tile
from usv.sparse.sequence_parallel import SequenceGroup


def share_pattern(pipe: DiffusionPipeline, group: SequenceGroup) -> None:
    """Let the processes of `group` share every forward of a pipeline whose pattern is enabled; all make the same calls.

    SettingError, which changes nothing, for a pipeline of whose transformers one cannot be shared. In the first call ShardError
    where its heads or rows of tokens cannot be divided over so many.
    """
    modules = attending(pipe)
    for module in modules:
        _check(unwrap(module))
    for module in modules:
        _share(attached_to(module), group)


def _check(transformer: nn.Module) -> None:
    family, attached = family_or_none(transformer), attached_to(transformer)
    accepted = "1, or the pattern on a transformer of a family in usv.models.families whose samples processes can share"
    if attached is None or family is None or not family.shared:
        raise SettingError(f"sequence_parallel: got a {type(transformer).__name__} under {'a pattern' if attached else 'no pattern'}, accepted: {accepted}")
    if attached.called is not transformer:
        raise SettingError(f"sequence_parallel: got a compiled {type(transformer).__name__}, accepted: one that is not compiled")
    own = {id(attention) for attention in attached.attentions}
    if {id(blocks.attention(block)) for blocks, block in family.layers(transformer)} != own:
        raise SettingError(f"sequence_parallel: got a {type(transformer).__name__} whose pattern and forward know different attentions, accepted: {accepted}")


@dataclass
class _Shared:
    """What `share_pattern` did to a transformer; `remove`, as of the hooks beside it in `Attached.handles`, takes it back."""

    attached: Attached
    classes: Sequence[tuple[nn.Module, type]]
    record: Callable[[CallStats], None]

    def remove(self) -> None:
        attached = self.attached
        vars(attached.transformer).pop("forward", None)
        for block, kind in self.classes:
            block.__class__ = kind
        for attention, original in zip(attached.attentions, attached.originals):
            attention.processor = original
        attached.run.record, attached.shared = self.record, False


def _share(attached: Attached, group: SequenceGroup) -> None:
    transformer, run = attached.transformer, attached.run
    family, places = family_of(transformer), {id(attention): place for place, attention in enumerate(attached.attentions)}
    layers = family.layers(transformer)
    attached.handles.append(_Shared(attached, [(block, type(block)) for _, block in layers], run.record))
    for attention, original in zip(attached.attentions, attached.originals):
        attention.processor = original  # the forward's own, which is taught what to do beside
    run.record, attached.shared = partial(_record_mean, run.record, group), True
    branches = [partial(run.attend, places[id(blocks.attention(block))]) for blocks, block in layers]
    transformer.forward = MethodType(partial(_forward, branches=branches, group=group), transformer)


def _forward(transformer, *args, branches: Sequence[Callable], group: SequenceGroup, **kwargs):
    arguments: Mapping = dict(signature_of(type(transformer)).bind(*args, **kwargs).arguments)
    rows = Tile(1, 1, family_of(transformer).grid(transformer, arguments).w, cell=(1, 1, 2))  # tiles in the order of the pattern: row by row
    return run_forward(transformer, [None] * len(branches), rows, arguments, group=group, dense=branches)[0]


def _record_mean(record: Callable[[CallStats], None], group: SequenceGroup, call: CallStats) -> None:
    """Density and recall over all heads."""
    seen = torch.tensor([call.density, call.recall or 0.0], dtype=torch.float64)
    dist.all_reduce(seen, group=group.group)
    density, recall = (seen / group.size).tolist()
    record(replace(call, density=density, recall=None if call.recall is None else recall))
