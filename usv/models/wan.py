"""The Wan architecture: self-attention over the video alone, text (and image embeddings) by cross-attention, 3-D RoPE.

    Wan 2.1 and 2.2 (text, image, first and last frame, TI2V-5B's per-token modulation, both experts of A14B), VACE, Animate,
    SkyReels-V2, ChronoEdit: copies of one block in diffusers, told apart by what they name and by what runs between blocks.

A sparse block repeats the equations of diffusers' WanTransformerBlock with two things fused, norm with RoPE and the modulations,
which is where its time over attention went. Shape letters: B batch, S tokens, C width, D head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn
from usv_kernels import norm_rope

from usv.models.protocol import Attend, Blocks, Family, at_positions, patch_grid
from usv.sparse.grid import TokenGrid


def sparse_forward(block, x: Tensor, text: Tensor, temb: Tensor, attend: Attend) -> Tensor:
    """diffusers' WanTransformerBlock with `attend` as self-attention.

    x: (B, S, C). temb: (B, 6, C), or per token (B, S, 6, C), in SkyReels-V2 (B, 6, S, C).
    """
    modulation = temb.float()
    if modulation.ndim == 4 and modulation.shape[1] == 6 and modulation.shape[2] == x.shape[1]:
        modulation = modulation.transpose(1, 2)
    parts = (block.scale_shift_table + modulation).unbind(2) if modulation.ndim == 4 else (block.scale_shift_table + modulation).chunk(6, dim=1)
    shift, scale, gate_msa, c_shift, c_scale, c_gate = parts
    cos, sin = (table.view(-1, table.shape[-1]) for table in attend.rotary)

    hidden = torch.addcmul(shift, block.norm1(x.float()), 1 + scale).type_as(x)
    attn = block.attn1
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden).chunk(3, dim=-1)
    else:
        query, key, value = (project(hidden) for project in (attn.to_q, attn.to_k, attn.to_v))
    query, key = (_norm_rope(y, norm, cos, sin, attend.positions) for y, norm in ((query, attn.norm_q), (key, attn.norm_k)))
    value = value.unflatten(2, (attn.heads, -1)).transpose(1, 2)
    out = attend(query, key, value, hidden)
    x = torch.addcmul(x.float(), attn.to_out[0](out.transpose(1, 2).flatten(2)).float(), gate_msa).type_as(x)

    x = x + block.attn2(block.norm2(x.float()).type_as(x), text, None, None)
    hidden = torch.addcmul(c_shift, block.norm3(x.float()), 1 + c_scale).type_as(x)
    return torch.addcmul(x.float(), block.ffn(hidden).float(), c_gate).type_as(x)


def _norm_rope(y: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """(B, S, C) -> (B, H, S, D)."""
    if "forward" not in vars(norm):
        weight = norm.weight.clone()  # ZeRO-3 frees the parameter before the backward, which needs its values
        return norm_rope(y, weight, norm.eps, cos, sin, positions)
    # A hook that brings its weight onto the device wraps its forward: the weight may be read nowhere else.
    x = norm(y).unflatten(2, (-1, cos.shape[-1])).transpose(1, 2).float()
    cos, sin = at_positions(cos, positions)[..., 0::2], at_positions(sin, positions)[..., 1::2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(y)


@lru_cache(maxsize=16)
def _sparse_class(cls: type) -> type:
    """A subclass whose forward knows `Attend`, by the same name: diffusers finds repeated blocks and splits by it."""

    dense = cls.forward  # as a function: torch.compile does not look into the class, which diffusers keeps whole in its graphs

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb, *args, **kwargs):
        if not isinstance(rotary_emb, Attend):
            return dense(self, hidden_states, encoder_hidden_states, temb, rotary_emb, *args, **kwargs)
        return sparse_forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)

    def vace_forward(self, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb):
        if not isinstance(rotary_emb, Attend):
            return dense(self, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb)
        control = control_hidden_states
        if self.proj_in is not None:
            control = self.proj_in(control) + hidden_states
        control = sparse_forward(self, control, encoder_hidden_states, temb, rotary_emb)
        return None if self.proj_out is None else self.proj_out(control), control

    vace = "control_hidden_states" in cls.forward.__code__.co_varnames
    body = {"forward": vace_forward if vace else forward, "__module__": cls.__module__, "__doc__": cls.__doc__, "_usv": True}
    return type(cls.__name__, (cls,), body)


def adapt(block: nn.Module, attention: nn.Module) -> None:
    # The block's class and not what calls it: hooks that bring its weights onto the device wrap the block's forward.
    if not getattr(block, "_usv", False):
        if getattr(vars(block).get("forward"), "__func__", None) is type(block).forward:
            del block.forward  # what a hook that was taken off again leaves: the class's own, which would hide the new one's
        block.__class__ = _sparse_class(type(block))


def rotary(tables: tuple[Tensor, Tensor], order: Tensor) -> tuple[Tensor, ...]:
    """(1, S, 1, D) cos and sin in another order; in fp32, since fp64 tables would make q and k fp64."""
    return tuple(table[:, order].float() for table in tables)


def grid(transformer, arguments) -> TokenGrid:
    return patch_grid(arguments["hidden_states"], transformer.config.patch_size)


def conditions(transformer) -> tuple[str, ...]:
    """Of image to video: its channels beside the latents', and in Wan 2.1 CLIP's embeddings. TI2V-5B has neither and serves both."""
    config = transformer.config
    further = config.in_channels > (config.out_channels or config.in_channels)
    return ("image_latents",) * further + ("image_embeds",) * (config.image_dim is not None)


def inputs(transformer, latents: Tensor, timestep, text, image_latents=None, image_embeds=None) -> dict:
    """What WanImageToVideoPipeline calls the transformer with; without images what WanPipeline does.

    image_latents: (B, C′, T, H, W), further channels, the mask and the padded clip of the given frames; or, for a transformer that has
    none (TI2V-5B), (B, C, 1, H, W), the first frame in place of the latents' own, at timestep 0. image_embeds: (B, n, N, D), of the n
    given frames. ValueError without what the transformer has to be given.
    """
    if timestep is None:
        return {"hidden_states": latents}
    given = {"image_latents": image_latents, "image_embeds": image_embeds}
    if latents.shape[1] < transformer.config.in_channels and (missing := [name for name in conditions(transformer) if given[name] is None]):
        raise ValueError(f"{missing[0]}: got none for a transformer of {transformer.config.in_channels} channels beside latents of {latents.shape[1]}, accepted: what data/prepare.py makes of a first frame")
    if image_latents is not None and transformer.config.in_channels > latents.shape[1]:
        latents = torch.cat((latents, image_latents.to(latents)), 1)
    elif image_latents is not None:
        latents = torch.cat((image_latents.to(latents), latents[:, :, image_latents.shape[2] :]), 2)
        tokens, frames = patch_grid(latents, transformer.config.patch_size), patch_grid(image_latents, transformer.config.patch_size)
        timestep = timestep[:, None].repeat(1, tokens.num_tokens)
        timestep[:, : frames.num_tokens] = 0
    call = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
    if image_embeds is not None:
        call["encoder_hidden_states_image"] = image_embeds.flatten(0, 1)
    return call


def outputs(transformer, sample: Tensor, arguments, image_latents=None, image_embeds=None) -> Tensor:
    """Velocity; 0 in a first frame that stands in place of the latents' own, where the pipeline does not use what the transformer says."""
    if image_latents is None or transformer.config.in_channels > sample.shape[1]:
        return sample
    given = image_latents.shape[2]
    return torch.cat((torch.zeros_like(sample[:, :, :given]), sample[:, :, given:]), 2)


def _face_adapters(transformer, run) -> dict:
    """Animate's face adapters, which run between blocks on row-major tokens."""

    def adapter(module):
        return lambda hidden, motion: module(hidden if torch.is_tensor(hidden) else hidden.row_major(), motion)

    return {"face_adapter": [adapter(module) for module in transformer.face_adapter]}


def _causal(transformer, arguments) -> str | None:
    if (frames := transformer.config.num_frame_per_block) > 1:
        return f"causal_block_size: got {frames}, accepted beside a student: none, frames that attend only backwards need a mask of their own"
    return None


SHAPE_KEYS = (
    "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
    "ffn_dim", "num_layers", "image_dim", "added_kv_proj_dim",
)  # fmt: skip


def _blocks(temb: tuple[int, int] = (4, 1)) -> Blocks:
    return Blocks("blocks", carrier="rotary_emb", per_token={"temb": temb}, rotary=rotary)


VACE_BLOCKS = Blocks(
    "vace_blocks", carrier="rotary_emb", video="control_hidden_states", returns=("hint", "control_hidden_states"),
    per_token={"hidden_states": (3, 1)}, rotary=rotary, merges=False,  # a hint is of every token
)  # fmt: skip

FAMILIES = (
    Family("wan_vace", (WanVACETransformer3DModel,), (VACE_BLOCKS, _blocks()), grid, adapt, (*SHAPE_KEYS, "vace_layers"), zero_padded=True),
    Family("wan_animate", (WanAnimateTransformer3DModel,), (_blocks(),), grid, adapt, SHAPE_KEYS, view=_face_adapters, zero_padded=True),
    Family("skyreels_v2", (SkyReelsV2Transformer3DModel,), (_blocks((4, 2)),), grid, adapt, SHAPE_KEYS, refuse=_causal, zero_padded=True),
    Family("chronoedit", (ChronoEditTransformer3DModel,), (_blocks(),), grid, adapt, SHAPE_KEYS, zero_padded=True),
    Family("wan", (WanTransformer3DModel,), (_blocks(),), grid, adapt, SHAPE_KEYS, inputs, outputs, conditions=conditions, zero_padded=True),
)
