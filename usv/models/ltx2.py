"""LTX-2 (and 2.3): the video stream's self-attention sparse, its tokens merged; the audio stream dense, whole, joined by cross-attention.

A block has six attentions. `attn1` runs over the video's tokens and is the long one; the others are over text or audio, or between
video and audio, where merged video tokens are queries and keys of their own time. Packed, row-major tokens as in LTX-Video.
Packed text and audio for training: see `inputs`. Shape letters: B batch, S video tokens, C width, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import apply_interleaved_rotary_emb, apply_split_rotary_emb
from torch import Tensor, nn

from usv.models.ltx import beside, grid, pack, unpack
from usv.models.protocol import Attend, Blocks, Family, Processor, sides_of


class LTX2Processor(Processor):
    # the names of both of diffusers' processors, with perturbation or without: each gets what it knows
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, query_rotary_emb=None, key_rotary_emb=None,
                 **perturbation):  # fmt: skip
        if not isinstance(query_rotary_emb, Attend):
            call = (attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb)
            return self.original(*call, **perturbation)
        attend = query_rotary_emb
        tables = tuple(at_tokens(table, attend.positions) for table in attend.rotary)
        turn = apply_split_rotary_emb if attn.rope_type == "split" else apply_interleaved_rotary_emb
        q, k = (turn(part, tables) for part in (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))))
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (q, k, attn.to_v(hidden_states)))
        out = attend(q, k, v, hidden_states, bias=attention_mask).transpose(1, 2)
        if attn.to_gate_logits is not None:
            out = out * (2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states)))[..., None]
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class LTX2PerturbedProcessor(LTX2Processor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, query_rotary_emb=None, key_rotary_emb=None,
                 perturbation_mask=None, all_perturbed=None):  # fmt: skip
        call = (attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb)
        return super().__call__(*call, perturbation_mask=perturbation_mask, all_perturbed=all_perturbed)


def at_tokens(table: Tensor, positions: Tensor | None) -> Tensor:
    """(B, S, D) or, split by heads, (B, H, S, D) RoPE table, or its rows at positions (B, K)."""
    if positions is None:
        return table
    index = positions.long()[..., None] if table.ndim == 3 else positions.long()[:, None, :, None]
    table = table.expand(len(positions), *table.shape[1:])
    return table.gather(-2, index.expand(*table.shape[:-2], -1, table.shape[-1]))


def rotary(tables: tuple[Tensor, Tensor], order: Tensor) -> tuple[Tensor, ...]:
    return tuple(table[..., order, :] for table in tables)


def adapt(block: nn.Module, attention: nn.Module) -> None:
    if not isinstance(attention.processor, LTX2Processor):
        attention.set_processor((LTX2PerturbedProcessor if block.perturbed_attn else LTX2Processor)(attention.processor))


def refuse(transformer, arguments: Mapping) -> str | None:
    if arguments.get("spatio_temporal_guidance_blocks"):
        return "spatio_temporal_guidance_blocks: got some, accepted beside a student: none"
    mask, num = arguments.get("video_self_attention_mask"), grid(transformer, arguments).num_tokens
    if mask is not None and not (bool((mask[:, :num, :num] == 1).all()) and bool((mask[:, :num, num:] == mask[:, :1, num:]).all())):
        return "video_self_attention_mask: got one between the video's own tokens, accepted beside a student: one of its conditions, the same for all of them"
    return None


def inputs(transformer, latents: Tensor, timestep, text, fps: float = 24.0, audio_latents: Tensor | None = None) -> dict:
    """text: (B, L, 2 · E), of each row what the connectors give the video, then the audio. audio_latents: (B, A, C), packed, as noisy as
    the video; without them the streams are kept apart (`isolate_modalities`), and only the video's is trained."""
    patch, config = sides_of(transformer.config), transformer.config
    sides = tuple(side // p for side, p in zip(latents.shape[2:], patch))
    call = {"hidden_states": pack(latents, patch)} | dict(zip(("num_frames", "height", "width"), sides))
    if timestep is None:
        return call
    words, audio_words = text.chunk(2, -1)
    mask = text.ne(0).any(-1).long()
    apart = audio_latents is None
    audio = latents.new_zeros(len(latents), 1, config.audio_in_channels) if apart else audio_latents
    return call | {
        "timestep": timestep, "sigma": timestep, "encoder_hidden_states": words, "audio_encoder_hidden_states": audio_words,
        "encoder_attention_mask": mask, "audio_encoder_attention_mask": mask, "fps": fps, "audio_hidden_states": audio,
        "audio_num_frames": audio.shape[1], "isolate_modalities": apart,
    }  # fmt: skip


def outputs(transformer, sample: Tensor, arguments, **conditions) -> Tensor:
    return unpack(sample, tuple(arguments[side] for side in ("num_frames", "height", "width")), sides_of(transformer.config))


PER_TOKEN = {"temb": (3, 1), "temb_ca_scale_shift": (3, 1), "temb_ca_gate": (3, 1), "ca_video_rotary_emb": (None, -2)}
BLOCKS = Blocks(
    "transformer_blocks", carrier="video_rotary_emb", returns=("hidden_states", "audio_hidden_states"), per_token=PER_TOKEN,
    pairwise=("self_attention_mask",), rotary=rotary,
)
SHAPE_KEYS = (
    "in_channels", "out_channels", "patch_size", "patch_size_t", "num_attention_heads", "attention_head_dim", "cross_attention_dim",
    "num_layers", "caption_channels", "audio_in_channels", "audio_num_attention_heads", "audio_attention_head_dim", "rope_type",
    "gated_attn", "cross_attn_mod",
)  # fmt: skip

# audio asks all of the video's tokens, of which a process has only its own where several share a sample
GUIDANCE = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0}  # fmt: skip

FAMILIES = (
    Family(
        "ltx2", (LTX2VideoTransformer3DModel,), (BLOCKS,), grid, adapt, SHAPE_KEYS, inputs, outputs, beside=beside, refuse=refuse,
        shared=False, guidance=GUIDANCE,
    ),
)  # fmt: skip
