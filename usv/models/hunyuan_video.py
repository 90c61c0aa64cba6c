"""HunyuanVideo: double-stream, then single-stream joint attention, text behind the video, its padding masked; 3-D RoPE.

    Text to video, image to video by more channels (`latent_concat`) or by a given first frame (`token_replace`), SkyReels; FramePack,
    whose history is tokens before the video's, at three resolutions.

Blocks of a given first frame modulate its tokens otherwise than the rest, and find them by their number at the head of the
sequence; tile-major they lie elsewhere, so these blocks are called with the equations of diffusers and a mask.
Packed text (`Family.inputs`): row 0 is CLIP's pooled vector, zeros behind it, the others are LLaMA's of the valid tokens.
Shape letters: B batch, S video tokens, T text tokens, C width, D head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel, HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from usv.models.protocol import (
    Attend,
    Blocks,
    Family,
    Processor,
    Text,
    at_positions,
    order_pair,
    patch_grid,
    rotate,
    sides_of,
)
from usv.sparse.grid import TokenGrid


class HunyuanProcessor(Processor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if not isinstance(image_rotary_emb, Attend):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        attend, num = image_rotary_emb, encoder_hidden_states.shape[1]
        valid = None if attention_mask is None else attention_mask.flatten(1)[:, -num:].sum(1)
        text = Text(num, before=False, valid=valid)
        q, k, v = (_heads(attn, project, hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        if attn.add_q_proj is None:  # single stream: one projection for both
            words = tuple(_heads(attn, project, encoder_hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
            norms = attn.norm_q, attn.norm_k
        else:
            words = tuple(_heads(attn, project, encoder_hidden_states) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            norms = attn.norm_added_q, attn.norm_added_k
        cos, sin = (at_positions(table, attend.positions) for table in attend.rotary)
        q, k = (rotate(y if norm is None else norm(y), cos, sin) for y, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        words = (*(y if norm is None else norm(y) for y, norm in zip(words, norms)), words[2])
        out = attend(*(text.join(x, y) for x, y in zip((q, k, v), words)), hidden_states, text)
        video, words = (part.transpose(1, 2).flatten(2) for part in (text.video(out), text.text(out)))
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            words = attn.to_add_out(words)
        return video, words


def _heads(attn, project: nn.Module, x: Tensor) -> Tensor:
    """(B, S, C) -> (B, H, S, D)."""
    return project(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)


class Placed(tuple):
    """RoPE tables with the row-major number of each token, by which a block knows the first frame's."""

    order: Tensor


def rotary(tables: tuple[Tensor, Tensor], order: Tensor) -> Placed:
    placed = Placed(order_pair(tables, order))
    placed.order = order
    return placed


def _first(freqs, num: int) -> Tensor:
    """(1 or B, S, 1) bool, which tokens of a call are of the first frame."""
    attend = freqs if isinstance(freqs, Attend) else None
    first = (freqs if attend is None else attend.rotary).order < num
    return (first[None] if attend is None or attend.positions is None else first[attend.positions])[..., None]


def _modulation(norm: nn.Module, temb: Tensor, replaced: Tensor, first: Tensor, parts: int) -> tuple[Tensor, ...]:
    """`parts` of (B, S, C): shift, scale, gate, … of every token."""
    other, own = (norm.linear(norm.silu(x))[:, None] for x in (replaced, temb))
    return tuple(torch.where(first, a, b) for a, b in zip(other.chunk(parts, -1), own.chunk(parts, -1)))


def _double(block, x: Tensor, text: Tensor, temb: Tensor, mask, freqs, replaced: Tensor, num: int):
    """HunyuanVideoTokenReplaceTransformerBlock on tokens in any order."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = _modulation(block.norm1, temb, replaced, _first(freqs, num), 6)
    words, c_gate, c_shift, c_scale, c_ff_gate = block.norm1_context(text, emb=temb)
    hidden = block.norm1.norm(x) * (1 + scale) + shift
    out, words = block.attn(hidden_states=hidden, encoder_hidden_states=words, attention_mask=mask, image_rotary_emb=freqs)
    x, text = x + out * gate, text + words * c_gate.unsqueeze(1)
    words = block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None]
    x = x + block.ff(block.norm2(x) * (1 + ff_scale) + ff_shift) * ff_gate
    return x, text + c_ff_gate.unsqueeze(1) * block.ff_context(words)


def _single(block, x: Tensor, text: Tensor, temb: Tensor, mask, freqs, replaced: Tensor, num: int):
    """HunyuanVideoTokenReplaceSingleTransformerBlock on tokens in any order."""
    first = _first(freqs, num).expand(len(x), -1, -1)
    first = torch.cat((first, first.new_zeros(len(x), text.shape[1], 1)), 1)
    joint, length = torch.cat((x, text), 1), x.shape[1]
    shift, scale, gate = _modulation(block.norm, temb, replaced, first, 3)
    hidden = block.norm.norm(joint) * (1 + scale) + shift
    mlp = block.act_mlp(block.proj_mlp(hidden))
    parts = block.attn(
        hidden_states=hidden[:, :length], encoder_hidden_states=hidden[:, length:], attention_mask=mask, image_rotary_emb=freqs
    )
    joint = joint + block.proj_out(torch.cat((torch.cat(parts, 1), mlp), 2)) * gate
    return joint[:, :length], joint[:, length:]


@lru_cache(maxsize=2)
def _sparse_class(cls: type, single: bool) -> type:
    """A subclass by the same name whose forward finds the first frame's tokens where they lie."""
    equations = _single if single else _double

    def forward(self, hidden_states, encoder_hidden_states, temb, attention_mask=None, freqs_cis=None, token_replace_emb=None,
                num_tokens=None, image_rotary_emb=None):  # fmt: skip
        freqs = freqs_cis if image_rotary_emb is None else image_rotary_emb
        call = (hidden_states, encoder_hidden_states, temb, attention_mask, freqs, token_replace_emb, num_tokens)
        return equations(self, *call) if isinstance(freqs, (Attend, Placed)) else cls.forward(self, *call)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__, "_usv": True})


def adapt(block: nn.Module, attention: nn.Module) -> None:
    if not isinstance(attention.processor, HunyuanProcessor):
        attention.set_processor(HunyuanProcessor(attention.processor))
    if "TokenReplace" in type(block).__name__ and not getattr(block, "_usv", False):
        block.__class__ = _sparse_class(type(block), "Single" in type(block).__name__)


def grid(transformer, arguments) -> TokenGrid:
    return patch_grid(arguments["hidden_states"], sides_of(transformer.config))


def inputs(transformer, latents: Tensor, timestep, text, guidance: float = 6.0, image_latents=None) -> dict:
    """guidance: the embedded one of the distilled checkpoint, not that of two forwards. image_latents: (B, C′, T, H, W), further
    channels of `latent_concat`."""
    if image_latents is not None:
        latents = torch.cat((latents, image_latents.to(latents)), 1)
    call = {"hidden_states": latents, "timestep": timestep}
    if text is None:
        return call
    words = text[:, 1:]
    return call | {
        "encoder_hidden_states": words,
        "encoder_attention_mask": words.ne(0).any(-1).long(),
        "pooled_projections": text[:, 0, : transformer.config.pooled_projection_dim],
        "guidance": latents.new_full((len(latents),), 1000 * guidance) if transformer.config.guidance_embeds else None,
    }


def framepack_inputs(transformer, latents: Tensor, timestep, text, guidance: float = 6.0, **history) -> dict:
    """history: `image_embeds`, latents (B, C, T, H, W) of what came before and their `indices_`, by diffusers' names."""
    return inputs(transformer, latents, timestep, text, guidance) | history


def _attn(block: nn.Module) -> nn.Module:
    return block.attn


KINDS = {"returns": ("hidden_states", "encoder_hidden_states"), "rotary": rotary, "attention": _attn}
DOUBLE = Blocks("transformer_blocks", carrier="freqs_cis", **KINDS)
SINGLE = Blocks("single_transformer_blocks", carrier="image_rotary_emb", **KINDS)
SHAPE_KEYS = (
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers", "num_single_layers", "mlp_ratio",
    "patch_size", "patch_size_t", "text_embed_dim", "pooled_projection_dim", "image_condition_type", "guidance_embeds",
)  # fmt: skip

FAMILIES = (
    Family(
        "hunyuan_video", (HunyuanVideoTransformer3DModel,), (DOUBLE, SINGLE), grid, adapt, SHAPE_KEYS, inputs,
        guidance={"true_cfg_scale": 1.0},  # guidance_scale is an input of the model, which runs once
        joint=True,
    ),
    Family(
        "hunyuan_video_framepack", (HunyuanVideoFramepackTransformer3DModel,), (DOUBLE, SINGLE), grid, adapt,
        (*SHAPE_KEYS, "has_image_proj", "has_clean_x_embedder"), framepack_inputs, guidance={"true_cfg_scale": 1.0}, joint=True,
        shared=False, beside=lambda transformer, arguments: True,
    ),
)  # fmt: skip
