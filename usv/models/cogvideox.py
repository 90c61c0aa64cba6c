"""CogVideoX: joint attention, text before the video and attended whole, 3-D RoPE or a table of positions added before the blocks.

    Text, image and video to video, Fun's control; 1.0 and 1.5.

It diffuses on the circle of variances, x = α·x0 + s·noise with α² + s² = 1, and predicts α·noise − s·x0. Training here is on the
flow (usv/flow.py), which is the same process in another scale: at sigma the flow's latents over √((1−sigma)² + sigma²) are CogVideoX's
at the timestep with s/α = sigma/(1−sigma), and (s−α)·x + (α+s)·prediction is the flow's velocity. Both are exact.
Packed text (`Family.inputs`): T5's rows as they are, padding included, which CogVideoX attends. Shape letters: B batch, S video
tokens, T text tokens, C width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from usv import flow
from usv.models.protocol import Attend, Blocks, Family, Processor, Text, at_positions, rotate, sides_of
from usv.sparse.grid import TokenGrid


class CogVideoXProcessor(Processor):
    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        if not isinstance(image_rotary_emb, Attend):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        attend, text = image_rotary_emb, Text(encoder_hidden_states.shape[1], before=True)
        joint = torch.cat((encoder_hidden_states, hidden_states), 1)
        if getattr(attn, "fused_projections", False):
            parts = attn.to_qkv(joint).chunk(3, -1)
        else:
            parts = (project(joint) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
        q, k = (y if norm is None else norm(y) for y, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        if attend.rotary is not None:
            cos, sin = (at_positions(table, attend.positions) for table in attend.rotary)
            q, k = (text.join(rotate(text.video(y), cos, sin), text.text(y)) for y in (q, k))
        out = attend(q, k, v, hidden_states, text).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text.num :], out[:, : text.num]


def adapt(block: nn.Module, attention: nn.Module) -> None:
    if not isinstance(attention.processor, CogVideoXProcessor):
        attention.set_processor(CogVideoXProcessor(attention.processor))


def grid(transformer, arguments) -> TokenGrid:
    """Of latents (B, T, C, H, W)."""
    t, _, h, w = arguments["hidden_states"].shape[-4:]
    p_t, p_h, p_w = sides_of(transformer.config)
    if t % p_t or h % p_h or w % p_w:
        raise ValueError(f"latents: got (T, H, W) = {(t, h, w)}, expected multiples of the patch {(p_t, p_h, p_w)}")
    return TokenGrid(t // p_t, h // p_h, w // p_w)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _levels(snr_shift: float) -> Tensor:
    """(1000,) sigma of the flow at each timestep; the last is noise alone."""
    from diffusers import CogVideoXDDIMScheduler

    kept = CogVideoXDDIMScheduler(snr_shift_scale=snr_shift, rescale_betas_zero_snr=True).alphas_cumprod.double()
    noise, data = (1 - kept).sqrt(), kept.sqrt()
    return noise / (noise + data)


def snr_shift(transformer) -> float:
    """That of the checkpoint's scheduler: the models without RoPE (2B) were trained with 3, all others with 1."""
    return 1.0 if transformer.config.use_rotary_positional_embeddings else 3.0


def own_timestep(transformer, timestep: Tensor) -> Tensor:
    """CogVideoX's timestep (B,), not an integer, of the flow's 1000 · sigma."""
    levels, sigma = _levels(snr_shift(transformer)).to(timestep.device), timestep.double() / 1000
    above = torch.searchsorted(levels, sigma).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return (above - 1 + ((sigma - low) / (high - low)).clamp(0, 1)).to(timestep.dtype)


def flow_timestep(transformer, timestep: Tensor) -> Tensor:
    """Inverse of `own_timestep`: what a plan is asked with."""
    levels = _levels(snr_shift(transformer)).to(timestep.device)
    low = timestep.double().floor().long().clamp(0, len(levels) - 2)
    return 1000 * torch.lerp(levels[low], levels[low + 1], timestep.double() - low).float()


def rotary_tables(config, tokens: TokenGrid, device) -> tuple[Tensor, Tensor] | None:
    """RoPE as CogVideoX's pipelines make it; None for a model that adds a table of positions."""
    if not config.use_rotary_positional_embeddings:
        return None
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    if config.patch_size_t is None:
        crops = get_resize_crop_region_for_grid((tokens.h, tokens.w), base[1], base[0])
        kind = {"crops_coords": crops}
    else:
        kind = {"crops_coords": None, "grid_type": "slice", "max_size": base}
    return get_3d_rotary_pos_embed(config.attention_head_dim, grid_size=(tokens.h, tokens.w), temporal_size=tokens.t, device=device, **kind)


def inputs(transformer, latents: Tensor, timestep, text, image_latents=None) -> dict:
    """image_latents: (B, C′, T, H, W), further channels: a first frame, a control video."""
    if timestep is None:
        return {"hidden_states": latents.transpose(1, 2)}
    sigma = flow.expand(timestep.float() / 1000, latents)
    x = (latents / ((1 - sigma) ** 2 + sigma**2).sqrt()).to(latents.dtype)
    if image_latents is not None:
        x = torch.cat((x, image_latents.to(x)), 1)
    call = {"hidden_states": x.transpose(1, 2), "timestep": own_timestep(transformer, timestep), "encoder_hidden_states": text}
    call["image_rotary_emb"] = rotary_tables(transformer.config, grid(transformer, call), latents.device)
    if transformer.config.ofs_embed_dim is not None:
        call["ofs"] = latents.new_full((1,), 2.0)
    return call


def outputs(transformer, sample: Tensor, arguments, **conditions) -> Tensor:
    x = arguments["hidden_states"][:, :, : sample.shape[2]]
    sigma = flow.expand(flow_timestep(transformer, arguments["timestep"]) / 1000, x)
    length = ((1 - sigma) ** 2 + sigma**2).sqrt()
    data, noise = (1 - sigma) / length, sigma / length
    return ((noise - data) * x + (noise + data) * sample).transpose(1, 2)


BLOCKS = Blocks("transformer_blocks", carrier="image_rotary_emb", returns=("hidden_states", "encoder_hidden_states"))
SHAPE_KEYS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim", "text_embed_dim", "num_layers",
    "patch_size", "patch_size_t", "ofs_embed_dim", "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
)  # fmt: skip

FAMILIES = (
    Family("cogvideox", (CogVideoXTransformer3DModel,), (BLOCKS,), grid, adapt, SHAPE_KEYS, inputs, outputs, flow_timestep, joint=True),
)  # fmt: skip
