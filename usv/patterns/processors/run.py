"""Where the forward of one transformer is, and what its attention calls share; the base of the families' processors."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from usv.patterns.protocol import CallStats, Pattern, PatternState, Text, attend, require
from usv.sparse.grid import TokenGrid

# (step, number of steps, the schedule itself: another object means another video) at a timestep
Progress = Callable[[Tensor], tuple[int, int, object]]

_RUNS: weakref.WeakValueDictionary[int, PatternRun] = weakref.WeakValueDictionary()  # of `pattern_attention`
_NUMBERS = itertools.count()


class PatternRun:
    """Where the forward of one transformer is, and what its attention calls share.

    Args:
        pattern: settings. num_layers: self-attentions of the transformer. progress: see `Progress`.
        record: called with the statistics of every attention call. impl: how the kernel runs.
        recall_rows: query rows on which attention recall is measured, 0 for none.
    """

    def __init__(
        self, pattern: Pattern, num_layers: int, progress: Progress, record: Callable[[CallStats], None],
        impl: str = "auto", recall_rows: int = 0,
    ):  # fmt: skip
        self.pattern, self.num_layers, self.progress = pattern, num_layers, progress
        self.record, self.impl, self.recall_rows = record, impl, recall_rows
        self.grid: TokenGrid | None = None
        self.schedule: object = None
        self.before = True
        self.state = PatternState()
        # (run, layer) of each attention. A tensor, since a compiled block is compiled anew for every integer it meets.
        self.places = [torch.tensor([0, layer]) for layer in range(num_layers)]
        self._number_places()

    def _number_places(self) -> None:
        number = next(_NUMBERS)
        _RUNS[number] = self
        for place in self.places:
            place[0] = number

    def __deepcopy__(self, memo: dict) -> PatternRun:
        twin = memo[id(self)] = object.__new__(PatternRun)
        # The schedule is compared by identity, and what a video has cached so far is none of the copy's.
        fresh = {"schedule": None, "state": PatternState(), "grid": None, "pattern": self.pattern}
        for name, value in vars(self).items():
            setattr(twin, name, fresh[name] if name in fresh else copy.deepcopy(value, memo))
        twin._number_places()
        return twin

    def begin(self, grid: TokenGrid, timestep: Tensor, before: bool = True) -> None:
        """Notes a new forward; before: tokens that are not of the grid stand before the video. A new schedule, or a step back, is a new video: cached centroids are dropped."""
        step, num_steps, schedule = self.progress(timestep)
        state = self.state
        if self.grid is None or schedule is not self.schedule or step < state.step or grid != self.grid:
            self.state = PatternState(num_layers=self.num_layers, recall_rows=self.recall_rows)
            self.state.step, self.state.num_steps = step, num_steps
        else:
            state.branch = state.branch + 1 if step == state.step else 0
            state.step = step
        self.grid, self.schedule, self.before = grid, schedule, before

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text: Text | None = None) -> Tensor:
        """q, k, v: (B, H, S [+ T], D) -> the same shape."""
        require(self.grid is not None, "grid", None, "a block called by its transformer, whose forward tells the grid")
        self.state.layer = layer
        # A checkpoint that runs again must choose the blocks of its first run: with gradients no call leaves anything for another.
        state = replace(self.state, centroids={}) if torch.is_grad_enabled() else self.state
        out, stats = attend(q, k, v, self.grid, self.pattern, state, text, self.impl)
        self.record(stats)
        return out


@torch.library.custom_op("usv::pattern_attention", mutates_args=())
def pattern_attention(
    q: Tensor, k: Tensor, v: Tensor, place: Tensor, num_text: int, before: bool, valid: Tensor | None
) -> Tensor:
    """`PatternRun.attend` inside a compiled block, where its clock and its record are seen by no compiler. place: (2,) int64, the
    run's number and the layer. num_text: -1 without text."""
    number, layer = place.tolist()
    text = None if num_text < 0 else Text(num_text, before, valid)
    return _RUNS[number].attend(layer, q, k, v, text).contiguous()


@pattern_attention.register_fake
def _(q, k, v, place, num_text, before, valid):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class Processor:
    """An attention processor: the equations of diffusers' own up to q, k, v, then the pattern."""

    def __init__(self, run: PatternRun, layer: int):
        self.run, self.layer, self.place = run, layer, run.places[layer]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, text: Text | None = None) -> Tensor:
        """q, k, v: (B, S [+ T], H, D) as diffusers has them -> (B, S [+ T], H · D) in the dtype of the values."""
        # Under autocast norms leave queries and keys in fp32, and diffusers' attention casts them.
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        if torch.compiler.is_compiling():
            num, before, valid = (-1, False, None) if text is None else (text.num, text.before, text.valid)
            out = pattern_attention(q, k, v, self.place, num, before, valid)
        else:
            out = self.run.attend(self.layer, q, k, v, text)
        return out.transpose(1, 2).flatten(2)

    def beside(self, q: Tensor) -> Text | None:
        """The tokens of (B, S, H, D) that are not of the grid, conditions or history, as text: dense in rows and columns."""
        require(self.run.grid is not None, "grid", None, "a block called by its transformer, whose forward tells the grid")
        num = q.shape[1] - self.run.grid.num_tokens
        return Text(num, self.run.before) if num > 0 else None


def project(attn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, S, H · D) of one projection or of three."""
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(x).chunk(3, dim=-1)
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def heads(attn, *tensors: Tensor) -> list[Tensor]:
    """(B, S, H · D) -> (B, S, H, D)."""
    return [x.unflatten(2, (attn.heads, -1)) for x in tensors]


def norm(module, x: Tensor) -> Tensor:
    return x if module is None else module(x)


def project_out(attn, x: Tensor) -> Tensor:
    """The output projection and its dropout; a block without one projects later."""
    out = getattr(attn, "to_out", None)
    return x if out is None else out[1](out[0](x))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channel pairs; tables repeat each value twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def refuse_mask(attention_mask, what: str) -> None:
    require(attention_mask is None, "attention_mask", "a tensor", f"None: {what}")
