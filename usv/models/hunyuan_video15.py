"""HunyuanVideo-1.5: double-stream joint attention, text behind the video in the order image, byT5, MLLM, their padding last; 3-D RoPE.

diffusers' forward sorts the text so that what is real comes first, so one number of valid tokens a sample says it all.
Packed text (`Family.inputs`): the MLLM's valid rows, then byT5's, the last column telling them apart (1 and 2; 0 is padding).
Shape letters: B batch, S video tokens, T text tokens, E width of the packed text.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import Tensor, nn

from usv.models.hunyuan_video import HunyuanProcessor, grid
from usv.models.protocol import Attend, Blocks, Family

MLLM, BYT5 = 1, 2  # tags of packed text


class HunyuanVideo15Processor(HunyuanProcessor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if not isinstance(image_rotary_emb, Attend):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def adapt(block: nn.Module, attention: nn.Module) -> None:
    if not isinstance(attention.processor, HunyuanVideo15Processor):
        attention.set_processor(HunyuanVideo15Processor(attention.processor))


def unpacked(text: Tensor, tag: int, width: int) -> tuple[Tensor, Tensor]:
    """(B, L, E) packed text -> the rows with this tag, (B, n, width), first ones first, and their mask (B, n); n at least 1."""
    mine = text[..., -1].round() == tag
    order = torch.argsort(mine.logical_not().to(torch.uint8), dim=1, stable=True)
    rows = text.gather(1, order[..., None].expand_as(text))[..., :width]
    mask = mine.gather(1, order)
    longest = max(1, int(mine.sum(1).max()))
    return (rows * mask[..., None])[:, :longest], mask[:, :longest].long()


def inputs(transformer, latents: Tensor, timestep, text, image_latents=None, image_embeds=None) -> dict:
    """image_latents: (B, C + 1, T, H, W), the given first frame and its mask; image_embeds: (B, N, D). Zeros for text to video."""
    config = transformer.config
    channels = latents.shape[1]
    if config.in_channels > channels:
        more = latents.new_zeros(len(latents), config.in_channels - channels, *latents.shape[2:]) if image_latents is None else image_latents
        latents = torch.cat((latents, more.to(latents)), 1)
    if text is None:
        return {"hidden_states": latents}
    words, mask = unpacked(text, MLLM, config.text_embed_dim)
    glyphs, glyph_mask = unpacked(text, BYT5, config.text_embed_2_dim)
    return {
        "hidden_states": latents, "timestep": timestep, "encoder_hidden_states": words, "encoder_attention_mask": mask,
        "encoder_hidden_states_2": glyphs, "encoder_attention_mask_2": glyph_mask,
        "image_embeds": words.new_zeros(len(words), 1, config.image_embed_dim) if image_embeds is None else image_embeds,
    }  # fmt: skip


def _attn(block: nn.Module) -> nn.Module:
    return block.attn


BLOCKS = Blocks("transformer_blocks", carrier="freqs_cis", returns=("hidden_states", "encoder_hidden_states"), attention=_attn)
SHAPE_KEYS = (
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers", "mlp_ratio", "patch_size", "patch_size_t",
    "text_embed_dim", "text_embed_2_dim", "image_embed_dim", "use_meanflow",
)  # fmt: skip

FAMILIES = (Family("hunyuan_video15", (HunyuanVideo15Transformer3DModel,), (BLOCKS,), grid, adapt, SHAPE_KEYS, inputs, joint=True),)
