"""Mochi: joint attention, text behind the video, its padding left out; a learned RoPE with frequencies for each head.

The example of docs/adding_a_model.md. Mochi counts time from the noise: its timestep is 1000 at the clean video, its prediction is
x0 − noise. Packed text (`Family.inputs`): T5's rows of the valid tokens. Shape letters: B batch, S video tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from diffusers import MochiTransformer3DModel
from torch import Tensor, nn

from usv.models.protocol import Attend, Blocks, Family, Processor, Text, patch_grid, sides_of
from usv.sparse.grid import TokenGrid


class MochiProcessor(Processor):
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None):
        if not isinstance(image_rotary_emb, Attend):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        attend, text = image_rotary_emb, Text(encoder_hidden_states.shape[1], before=False, valid=attention_mask.bool().sum(1))
        video = [project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)]
        words = [project(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        norms = (attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k)
        tables = [table[None] if attend.positions is None else table[attend.positions] for table in attend.rotary]
        for i, (norm, added) in enumerate(norms):
            video[i] = turned(video[i] if norm is None else norm(video[i]), *tables)
            words[i] = words[i] if added is None else added(words[i])
        out = attend(*(text.join(x.transpose(1, 2), y.transpose(1, 2)) for x, y in zip(video, words)), hidden_states, text)
        hidden, context = (part.transpose(1, 2).flatten(2) for part in (text.video(out), text.text(out)))
        hidden = attn.to_out[1](attn.to_out[0](hidden))
        return hidden, attn.to_add_out(context) if hasattr(attn, "to_add_out") else context


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (B, S, H, D) with cos, sin (1 or B, S, H, D/2) of neighbouring pairs."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(((even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)), -1).flatten(-2)


def adapt(block: nn.Module, attention: nn.Module) -> None:
    if not isinstance(attention.processor, MochiProcessor):
        attention.processor = MochiProcessor(attention.processor)


def grid(transformer, arguments) -> TokenGrid:
    return patch_grid(arguments["hidden_states"], sides_of(transformer.config))


def other_end(transformer, timestep: Tensor) -> Tensor:
    """Mochi's timestep of the flow's, and the reverse."""
    return 1000 - timestep


def inputs(transformer, latents: Tensor, timestep, text) -> dict:
    if timestep is None:
        return {"hidden_states": latents}
    mask = text.ne(0).any(-1)
    return {"hidden_states": latents, "timestep": 1000 - timestep, "encoder_hidden_states": text, "encoder_attention_mask": mask}


def outputs(transformer, sample: Tensor, arguments, **conditions) -> Tensor:
    return -sample


BLOCKS = Blocks("transformer_blocks", carrier="image_rotary_emb", returns=("hidden_states", "encoder_hidden_states"))
SHAPE_KEYS = (
    "patch_size", "num_attention_heads", "attention_head_dim", "num_layers", "pooled_projection_dim", "in_channels", "out_channels",
    "text_embed_dim", "time_embed_dim",
)  # fmt: skip

FAMILIES = (Family("mochi", (MochiTransformer3DModel,), (BLOCKS,), grid, adapt, SHAPE_KEYS, inputs, outputs, other_end, joint=True),)
