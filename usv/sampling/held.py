"""A student as a pipeline holds it: a model of diffusers' own class, with gates and plan inside, that diffusers can move.

    held = hold(student, record)      isinstance(held, WanTransformer3DModel), called as one, and moved, cast, offloaded, compiled as one

Its modules are its own, their tensors the student's, and the coarse gates (`usv_gates`) are a part of it, so that hooks, casts, offloads
and adapters put on it before or after reach all that it runs, and nothing else. What cannot work with a student is refused where it is switched on.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType

import torch
from diffusers import DiffusionPipeline
from torch import nn

from usv.models import lora
from usv.models.attend import merged_share
from usv.models.families import family_of
from usv.models.forward import run_forward, uncompiled
from usv.patterns.planned import PlannedPattern
from usv.sampling.checkpoint import CheckpointError, Student, twin
from usv.sampling.sampler import StudentScheduler
from usv.sparse.grid import Tile, tile_layout
from usv.sparse.plan import MERGE_LADDER, Rung, SparsityPlan
from usv.sparse.sequence_parallel import SequenceGroup


@dataclass
class Planned:
    """What a held student runs by: plan (None: dense), tile, the record of what it executed, who chooses the blocks.

    text_length: of the text that it was trained with, where the architecture attends its padding; None: any. folded: whether
    guidance is folded into the weights. shared: whether others may have the same tensors. group: processes that share each video.
    timesteps: of a few-step student, which knows no others. sampler: its scheduler, which is told what the student is asked with.
    """

    plan: SparsityPlan | None
    tile: Tile
    record: object
    impl: str = "auto"
    fine: PlannedPattern | None = None
    text_length: int | None = None
    folded: bool = True
    shared: bool = False
    group: SequenceGroup | None = None
    timesteps: tuple[float, ...] = ()
    sampler: StudentScheduler | None = None
    called: bool = False
    latest: tuple | None = None


NEAR = 4.0  # of 1000: timesteps in bf16 are that coarse


# ---- what a held student does in place of its class's methods ---------------------------------------------------------------------------


@uncompiled
def _forward(self, *args, **kwargs):
    begun, planned = time.perf_counter(), self._planned
    if self._compiled_call_impl is not None or any(block._compiled_call_impl is not None for _, block in family_of(self).layers(self)):
        lora.scales_as_tensors(self)
    arguments = dict(signature_of(type(self)).bind(*args, **kwargs).arguments)
    if planned.text_length is not None:
        arguments["encoder_hidden_states"] = fit_text(arguments["encoder_hidden_states"], planned.text_length)
    timestep = torch.as_tensor(arguments["timestep"])
    if planned.sampler is not None:
        planned.sampler.asked(timestep)
    now = float(family_of(self).flow_timestep(self, timestep).max())  # per token (TI2V), given frames have 0
    if planned.timesteps and min(abs(now - t) for t in planned.timesteps) > NEAR:
        raise CheckpointError(f"scheduler: got the timestep {now:g}, accepted: {list(planned.timesteps)}, the few-step student's own; its scheduler is the one that usv.enable brings")
    if planned.folded and not planned.called and not torch.compiler.is_compiling():
        check_unguided(planned, arguments)
    rungs = None if planned.plan is None else planned.plan.at(now)
    if planned.fine is not None:
        planned.fine.begin(family_of(self).grid(self, arguments), timestep)
    branches = None if planned.fine is None else planned.fine.layers
    out, stats = run_forward(self, self.usv_gates, planned.tile, arguments, rungs, None, planned.impl, branches, planned.group)
    layers = range(len(self.usv_gates))
    planned.record.add(
        time.perf_counter() - begun, [float(stats[i].density) if i in stats else 1.0 for i in layers],
        merged_shares(self, arguments, rungs),
    )  # fmt: skip
    return out


def merged_shares(transformer: nn.Module, arguments: dict, rungs: Sequence[Rung] | None) -> list[float]:
    """What each layer merges of the grid's tokens in a forward with these arguments."""
    family = family_of(transformer)
    lists = [blocks for blocks, _ in family.layers(transformer)]
    if rungs is None or not any(rung.merge for rung in rungs):
        return [0.0] * len(lists)
    layout = tile_layout(family.grid(transformer, arguments), transformer._planned.tile)
    return [merged_share(layout, MERGE_LADDER[rung.merge]) if rung.merge and blocks.merges else 0.0 for blocks, rung in zip(lists, rungs)]


def check_unguided(planned: Planned, arguments: dict) -> None:
    """CheckpointError where a pipeline that was made of an enabled one (from_pipe) asks for guidance: the same latents with two texts, at once or one after the other."""
    pipe = calling_pipeline()
    if pipe is None or not getattr(pipe, "do_classifier_free_guidance", True):
        return
    x, text, half = arguments["hidden_states"], arguments["encoder_hidden_states"], len(arguments["hidden_states"]) // 2
    twice = half and len(x) == 2 * half and torch.equal(x[:half], x[half:]) and not torch.equal(text[:half], text[half:])
    before, planned.latest = planned.latest, (x, text)
    if twice or before is not None and before[0] is x and not torch.equal(before[1], text):
        raise CheckpointError("guidance: got two texts for the same latents, accepted: guidance_scale=1.0; guidance is folded into the student's weights")


def calling_pipeline() -> DiffusionPipeline | None:
    """The pipeline whose call has led here; None for a loop of somebody's own, which may give the same latents to two prompts."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(pipe := frame.f_locals.get("self"), DiffusionPipeline):
            return pipe
        frame = frame.f_back
    return None


@contextmanager
def _cache_context(self, name: str, **kwargs):
    if name in ("uncond", "pred_uncond") and self._planned.folded:  # also a pipeline that was made of an enabled one (from_pipe) comes by here
        raise CheckpointError(f"guidance: got a second forward a step ({name}), accepted: guidance_scale=1.0; guidance is folded into the student's weights")
    with type(self).cache_context(self, name, **kwargs):
        yield


def _enable_cache(self, config) -> None:
    raise CheckpointError(f"enable_cache: got {type(config).__name__}, accepted beside a student: none; a plan says already what each step computes. usv.disable(pipe) first")


def _enable_parallelism(self, **_) -> None:
    raise CheckpointError("enable_parallelism: got a student, accepted: a dense transformer; a student chooses among all tokens of a clip")


def _save_pretrained(self, save_directory, *_, **__) -> None:
    raise CheckpointError(f"save_pretrained: got a student for {save_directory}, accepted: python -m usv.export, whose folder says what it is, or usv.disable(pipe) first")


def _fuse_lora(self, *args, **kwargs) -> None:
    if self._planned.shared:
        lora.own_weights(self)
    type(self).fuse_lora(self, *args, **kwargs)


METHODS = {
    "forward": _forward, "cache_context": _cache_context, "enable_cache": _enable_cache, "enable_parallelism": _enable_parallelism,
    "save_pretrained": _save_pretrained, "fuse_lora": _fuse_lora,
}  # fmt: skip


@lru_cache(maxsize=32)
def signature_of(base: type) -> inspect.Signature:
    """Of a transformer's forward, without self."""
    signature = inspect.signature(base.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def hold(student: Student, record, impl: str = "auto", fine: PlannedPattern | None = None, folded: bool = True, shared: bool = True) -> nn.Module:
    """The model that a pipeline is given in place of its transformer.

    Every call makes one of its own, so that one student may run in several pipelines. It shares the student's tensors; shared: whether
    somebody else may use them, so that fusing an adapter has to copy what it writes.
    """
    model, transformer = student.model, student.model.transformer
    held = twin(transformer)
    held.__dict__["_modules"]["usv_gates"] = twin(model.gates)
    if shared:  # casts, moves and offloads write into parameters: somebody else has these
        for module in held.modules():
            own = {n: nn.Parameter(p.detach(), requires_grad=False) for n, p in module._parameters.items() if type(p) is nn.Parameter}
            module._parameters.update(own)
    # Of the very class: from_pipe compares types, a pipeline's config names them. So what it does differently is its own, not its class's.
    held.__dict__.update({name: MethodType(function, held) for name, function in METHODS.items()})
    length = student.sampling.get("max_sequence_length") if model.family.zero_padded else None
    held.__dict__["_planned"] = Planned(student.plan, model.tile, record, impl, fine, length, folded, shared, timesteps=tuple(student.sampling.get("student_timesteps") or ()))
    return held


def fit_text(text: torch.Tensor, length: int) -> torch.Tensor:
    """Text (B, L, E), zeros behind it, at the length that the student was trained with. CheckpointError where it is longer."""
    if text.shape[1] <= length:
        return torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))
    if bool(text[:, length:].any()):
        raise CheckpointError(
            f"prompt_embeds: got text of more than {length} tokens, accepted: {length}, which the student was trained with; "
            f"pipe.encode_prompt(…, max_sequence_length={length})"
        )
    return text[:, :length]
