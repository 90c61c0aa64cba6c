"""LTX-Video: self-attention over packed, row-major tokens of whole latent pixels, text by cross-attention, 3-D RoPE across all heads.

Text to video; image to video by a timestep for each token; images and videos at other frames, and what is known of a window of a long
video, by tokens beside the grid with coordinates and timesteps of their own. Shape letters: B batch, S tokens, C width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from usv.models.protocol import Attend, Blocks, Family, Processor, rotate, sides_of
from usv.sparse.grid import TokenGrid
from usv.sparse.packed import conditions_before, packed_grid


class LTXProcessor(Processor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if not isinstance(image_rotary_emb, Attend):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        attend = image_rotary_emb
        tables = [rows_at(table, attend.positions) for table in attend.rotary]
        parts = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        parts = (*(rotate(part, *tables) for part in parts), attn.to_v(hidden_states))
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
        out = attend(q, k, v, hidden_states).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def rows_at(table: Tensor, positions: Tensor | None) -> Tensor:
    """(1 or B, S, D) RoPE table, or its rows at the tokens that merging leaves: positions (B, K) -> (B, K, D)."""
    if positions is None:
        return table
    return table.expand(len(positions), -1, -1).gather(1, positions.long()[..., None].expand(-1, -1, table.shape[-1]))


def rotary(tables: tuple[Tensor, Tensor], order: Tensor) -> tuple[Tensor, ...]:
    """(1 or B, S, D) cos and sin in another order."""
    return tuple(table[:, order] for table in tables)


def adapt(block: nn.Module, attention: nn.Module) -> None:
    if not isinstance(attention.processor, LTXProcessor):
        attention.set_processor(LTXProcessor(attention.processor))


def grid(transformer, arguments: Mapping) -> TokenGrid:
    return packed_grid(arguments)


def beside(transformer, arguments: Mapping) -> bool:
    return conditions_before(arguments)


def pack(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) -> (B, S, C · patch), tokens row-major."""
    p_t, p_h, p_w = patch
    x = latents.unflatten(4, (-1, p_w)).unflatten(3, (-1, p_h)).unflatten(2, (-1, p_t))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def unpack(tokens: Tensor, sides: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Inverse of `pack`; sides: tokens along (t, h, w)."""
    x = tokens.unflatten(2, (-1, *patch)).unflatten(1, sides)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def inputs(transformer, latents: Tensor, timestep, text, fps: float = 25.0, first_frame: Tensor | None = None) -> dict:
    """fps: of the clips, which LTX's RoPE counts in seconds. first_frame: (B, C, 1, H, W), given: its tokens have timestep 0."""
    patch = sides_of(transformer.config)
    sides = tuple(side // p for side, p in zip(latents.shape[2:], patch))
    if first_frame is not None:
        latents = torch.cat((first_frame.to(latents), latents[:, :, first_frame.shape[2] :]), 2)
    call = {"hidden_states": pack(latents, patch)} | dict(zip(("num_frames", "height", "width"), sides))
    if timestep is None:
        return call
    if first_frame is not None:
        rows = first_frame.shape[2] // patch[0] * sides[1] * sides[2]
        timestep = timestep[:, None].repeat(1, call["hidden_states"].shape[1])
        timestep[:, :rows] = 0
    return call | {
        "timestep": timestep, "encoder_hidden_states": text, "encoder_attention_mask": text.ne(0).any(-1).long(),
        "rope_interpolation_scale": (8 / fps, 32, 32),
    }  # fmt: skip


def outputs(transformer, sample: Tensor, arguments, **conditions) -> Tensor:
    return unpack(sample, tuple(arguments[side] for side in ("num_frames", "height", "width")), sides_of(transformer.config))


BLOCKS = Blocks("transformer_blocks", carrier="image_rotary_emb", per_token={"temb": (3, 1)}, rotary=rotary)
SHAPE_KEYS = (
    "in_channels", "out_channels", "patch_size", "patch_size_t", "num_attention_heads", "attention_head_dim", "cross_attention_dim",
    "num_layers", "caption_channels",
)  # fmt: skip

FAMILIES = (
    Family("ltx", (LTXVideoTransformer3DModel,), (BLOCKS,), grid, adapt, SHAPE_KEYS, inputs, outputs, beside=beside),
)  # fmt: skip
