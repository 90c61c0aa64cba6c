"""Patterns inside stock diffusers transformers, through their own attention processors: Wan, CogVideoX, HunyuanVideo.

    undo = attach(transformer, SVG2(), progress, record)      every self-attention now runs `attend`
    undo()                                                    the transformer has its own processors again

The weights are not touched. A forward pre-hook notes the token grid and the step; each processor knows its layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from usv.patterns.protocol import CallStats, Pattern, PatternState, Text, attend, require
from usv.sparse.grid import TokenGrid

# (step, number of steps, the schedule itself: another object means another video) at a timestep
Progress = Callable[[Tensor], tuple[int, int, object]]


class PatternRun:
    """Where the forward of one transformer is, and what its attention calls share.

    Args:
        pattern: settings. num_layers: self-attentions of the transformer. progress: see `Progress`.
        record: called with the statistics of every attention call. impl: how the kernel runs.
        recall_rows: query rows on which attention recall is measured, 0 for none.
    """

    def __init__(self, pattern: Pattern, num_layers: int, progress: Progress, record, impl="auto", recall_rows=0):
        self.pattern, self.num_layers, self.progress = pattern, num_layers, progress
        self.record, self.impl, self.recall_rows = record, impl, recall_rows
        self.grid: TokenGrid | None = None
        self.schedule: object = None
        self.state = PatternState()

    def begin(self, grid: TokenGrid, timestep: Tensor) -> None:
        """Notes a new forward. A new schedule, or a step back, is a new video: cached centroids are dropped."""
        step, num_steps, schedule = self.progress(timestep)
        state = self.state
        if self.grid is None or schedule is not self.schedule or step < state.step or grid != self.grid:
            self.state = PatternState(num_layers=self.num_layers, recall_rows=self.recall_rows)
            self.state.step, self.state.num_steps = step, num_steps
        else:
            state.branch = state.branch + 1 if step == state.step else 0
            state.step = step
        self.grid, self.schedule = grid, schedule

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text: Text | None = None) -> Tensor:
        """q, k, v: (B, H, S [+ T], D) -> the same shape."""
        require(self.grid is not None, "grid", None, "a block called by its transformer, whose forward tells the grid")
        self.state.layer = layer
        out, stats = attend(q, k, v, self.grid, self.pattern, self.state, text, self.impl)
        self.record(stats)
        return out


class _Processor:
    def __init__(self, run: PatternRun, layer: int):
        self.run, self.layer = run, layer


class WanProcessor(_Processor):
    """Self-attention of a Wan block; the equations of diffusers' WanAttnProcessor."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        require(attention_mask is None, "attention_mask", "a tensor", "None in self-attention of Wan")
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        q, k = (_rotate(x, *rotary_emb) for x in (q, k))
        out = self.run.attend(self.layer, *(x.transpose(1, 2) for x in (q, k, v)))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channel pairs; tables repeat each value twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class CogVideoXProcessor(_Processor):
    """Joint attention of a CogVideoX block, text before video."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        require(attention_mask is None, "attention_mask", "a tensor", "None: CogVideoX attends to all text tokens")
        num_text = encoder_hidden_states.shape[1]
        x = torch.cat((encoder_hidden_states, hidden_states), 1)
        q, k, v = (p(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
        q, k = (y if norm is None else norm(y) for y, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        if image_rotary_emb is not None:
            q, k = (
                torch.cat((y[:, :, :num_text], apply_rotary_emb(y[:, :, num_text:], image_rotary_emb)), 2) for y in (q, k)
            )
        out = self.run.attend(self.layer, q, k, v, Text(num_text, before=True))
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return out[:, num_text:], out[:, :num_text]


class HunyuanVideoProcessor(_Processor):
    """Joint attention of a HunyuanVideo block, double (text has its own projections) or single; text after video."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        num_video, num_text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        q, k, v = self._project(attn, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), hidden_states)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        double = attn.add_q_proj is not None
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if double else (attn.to_q, attn.to_k, attn.to_v)
        norms = (attn.norm_added_q, attn.norm_added_k) if double else (attn.norm_q, attn.norm_k)
        text_qkv = self._project(attn, projections, norms, encoder_hidden_states)
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip((q, k, v), text_qkv))
        # (B, 1, 1, S + T), True for real tokens; the video is all real, padding ends the text
        valid = None if attention_mask is None else attention_mask[:, 0, 0, num_video:].sum(-1)
        out = self.run.attend(self.layer, q, k, v, Text(num_text, False, valid)).transpose(1, 2).flatten(2)
        video, text = out[:, :num_video], out[:, num_video:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text

    @staticmethod
    def _project(attn, projections, norms, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (project(x).unflatten(2, (attn.heads, -1)) for project in projections)
        q, k = (y if norm is None else norm(y) for y, norm in zip((q, k), norms))
        return q, k, v


def attach(
    transformer: nn.Module,
    pattern: Pattern,
    progress: Progress,
    record: Callable[[CallStats], None],
    impl: str = "auto",
    recall_rows: int = 0,
) -> Callable[[], None]:
    """Lets every self-attention of `transformer` run under `pattern`; returns the function that undoes it.

    Raises ValueError: a transformer of another family.
    """
    kinds = {WanTransformer3DModel: WanProcessor, CogVideoXTransformer3DModel: CogVideoXProcessor,
             HunyuanVideoTransformer3DModel: HunyuanVideoProcessor}  # fmt: skip
    kind = next((kinds[cls] for cls in type(transformer).__mro__ if cls in kinds), None)
    require(kind is not None, "transformer", type(transformer).__name__, ", ".join(cls.__name__ for cls in kinds))
    attentions = _attentions(transformer)
    run = PatternRun(pattern, len(attentions), progress, record, impl, recall_rows)
    originals = [attention.processor for attention in attentions]
    for layer, attention in enumerate(attentions):
        attention.set_processor(kind(run, layer))

    def note(module, args, kwargs):
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        position = 2 if kind is CogVideoXProcessor else 1
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[position]
        run.begin(token_grid(transformer, latents), timestep)

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)

    def undo() -> None:
        hook.remove()
        for attention, original in zip(attentions, originals):
            attention.set_processor(original)

    return undo


def _attentions(transformer: nn.Module) -> list[nn.Module]:
    """The self-attention of each block, in the order of execution."""
    if isinstance(transformer, WanTransformer3DModel):
        return [block.attn1 for block in transformer.blocks]
    if isinstance(transformer, CogVideoXTransformer3DModel):
        return [block.attn1 for block in transformer.transformer_blocks]
    return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]


def token_grid(transformer: nn.Module, latents: Tensor) -> TokenGrid:
    """The grid of latents (B, C, T, H, W), CogVideoX (B, T, C, H, W), after patchify. ValueError where patches do not fit."""
    patch, config = transformer.config.patch_size, transformer.config
    if isinstance(transformer, CogVideoXTransformer3DModel):
        latents = latents.transpose(1, 2)
    if isinstance(patch, int):
        patch = (config.patch_size_t or 1, patch, patch)
    sides = tuple(latents.shape[-3:])
    require(not any(side % p for side, p in zip(sides, patch)), "latents", f"(T, H, W) = {sides}",
            f"multiples of the patch {tuple(patch)}")  # fmt: skip
    return TokenGrid(*(side // p for side, p in zip(sides, patch)))
