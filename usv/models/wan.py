"""Wan with an explicit plan: diffusers' own WanTransformer3DModel, its blocks run dense, sparse or merged.

    tokens --tile order--> [block under its rung] × L --inverse order--> velocity

A layer at the first rung is diffusers' own block, so plan None is the teacher to rounding. A sparse layer runs the same weights
through `usv.sparse.attention`; a merging layer runs the whole block on the merged tokens and unmerges its *update*, so every token
keeps its own residual. Consecutive layers of one merge rung share one match: between them unmerging and merging again would
give the same states, so the merged tokens stay merged until the run ends. With a `sequence_group` several processes share a
sample, each with whole tiles of its tokens (`usv.sparse.sequence_parallel`); heads are exchanged around attention. Shape letters: B batch, S tokens, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from usv_kernels import norm_rope
from usv_kernels.selection import known_bound
from usv_kernels.token_merge import MergeLayout, MergeMap, gather_kept, match, merge, unmerge

from usv.sparse.attention import AttentionStats, Fine, sparse_attention
from usv.sparse.grid import Tile, TileLayout, TokenGrid, tile_layout
from usv.sparse.plan import LayerPlan, Rung, layer_plan, merged_tokens
from usv.sparse.sequence_parallel import SequenceGroup, Shards, gather, lengths_of, shards_of, to_heads, to_tokens


@dataclass(frozen=True)
class Probe:
    """A layer that runs two rungs and mixes their updates, so that a decision has a gradient.

    update = (1 − mix) · update(rung) + mix · update(other). With mix = 1/2 the derivative of the loss with respect to mix
    equals loss(other) − loss(rung) for a loss quadratic in the update; at an end of the segment it would miss the
    quadratic term, which is all there is near a minimum.
    """

    other: Rung
    mix: torch.Tensor


@dataclass
class Sequence3D:
    """What the blocks of one forward share: layout, RoPE tables (S, D) fp32 in tile-major order, text, modulation."""

    layout: TileLayout
    cos: torch.Tensor
    sin: torch.Tensor
    text: torch.Tensor
    modulation: torch.Tensor  # (B, 6, C), or (B, S, 6, C) per token (Wan2.2 TI2V)
    fine: Mapping[nn.Module, Fine] | None = None  # by block
    shards: Shards | None = None  # where processes share the sample: RoPE tables and modulation are then of one's own tokens

    @property
    def own(self) -> TileLayout:
        """The tiles of this process."""
        return self.layout if self.shards is None else self.shards.layout


@dataclass(frozen=True)
class Tokens:
    """Hidden states between two layers: of all tokens, or merged while a run of layers shares one match.

    x: (B, S, C), as the run began where it is merged. begun, kept: (B, K, C), the merged states then and now.
    """

    x: torch.Tensor
    begun: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    merge_map: MergeMap | None = None
    fraction: float = 0.0

    def all(self) -> torch.Tensor:
        """(B, S, C): every token with its own residual and its dst's update."""
        return self.x if self.merge_map is None else self.x + unmerge(self.kept - self.begun, self.merge_map)


class SparseWan(nn.Module):
    """A WanTransformer3DModel and the coarse gates of its layers.

    Args:
        transformer: the network; its weights are used, not copied.
        tile: tokens of a tile along (t, h, w); a tile is a block of attention.

    `sequence_group`, None at first: the processes that share a sample; all of them make the same calls.
    """

    def __init__(self, transformer: WanTransformer3DModel, tile: Tile):
        super().__init__()
        self.transformer, self.tile = transformer, tile
        self.sequence_group: SequenceGroup | None = None
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        kind = {"dtype": transformer.dtype, "device": transformer.device}
        self.gates = nn.ModuleList(nn.Linear(dim, config.num_attention_heads, **kind) for _ in transformer.blocks)
        for gate in self.gates:
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)

    @property
    def config(self):
        return self.transformer.config

    @property
    def num_layers(self) -> int:
        return len(self.transformer.blocks)

    def grid_of(self, latents_shape: Sequence[int]) -> TokenGrid:
        """The token grid of latents (B, C, T, H, W). ValueError where the patch does not divide them."""
        sides, patch = tuple(latents_shape[-3:]), tuple(self.config.patch_size)
        if any(side % p for side, p in zip(sides, patch)):
            raise ValueError(f"latents: got (T, H, W) = {sides}, expected multiples of the patch {patch}")
        return TokenGrid(*(side // p for side, p in zip(sides, patch)))

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        rungs: Sequence[Rung | LayerPlan] | None = None,
        probes: Mapping[int, Probe] | None = None,
        impl: str = "auto",
        fine: Sequence[Fine] | None = None,
    ) -> tuple[torch.Tensor, dict[int, AttentionStats]]:
        """Velocity at (latents, timestep).

        Args:
            latents: (B, C, T, H, W). timestep: (B,) or per token (B, S). text: (B, L, text_dim).
            rungs: one for each layer, a Rung or the integers themselves; None is dense.
            probes: layer -> Probe, in training.
            impl: how the attention kernel runs.
            fine: one for each layer, in place of the fine branch of the sparse ones: who chooses the blocks
                (`usv.patterns.planned`); None is the student's own tiles.

        Returns:
            (B, C, T, H, W) and the statistics of the sparse layers.
        """
        model = self.transformer
        rungs = (Rung(),) * self.num_layers if rungs is None else tuple(rungs)
        if len(rungs) != self.num_layers:
            raise ValueError(f"rungs: got {len(rungs)}, expected one for each of the {self.num_layers} layers")
        layout = tile_layout(self.grid_of(latents.shape), self.tile, str(latents.device))
        shards = None if self.sequence_group is None else self._shards(layout, fine)
        own = layout if shards is None else shards.layout
        x = model.patch_embedding(latents).flatten(2).transpose(1, 2)[:, own.order]
        temb, sequence = self._condition(latents, timestep, text, layout, shards)
        if fine is not None:
            sequence = replace(sequence, fine=dict(zip(model.blocks, fine, strict=True)))
        stats: dict[int, AttentionStats] = {}
        tokens = Tokens(x)
        for index, block in enumerate(model.blocks):
            probe = None if probes is None else probes.get(index)
            args = (block, self.gates[index], tokens, sequence, rungs[index], probe, impl)
            if torch.is_grad_enabled() and model.gradient_checkpointing:
                tokens, layer_stats = torch.utils.checkpoint.checkpoint(_run_layer, *args, use_reentrant=False)
            else:
                tokens, layer_stats = _run_layer(*args)
            if layer_stats is not None:
                stats[index] = layer_stats
        if shards is None:
            patches = self._head(tokens.all()[:, layout.inverse], temb)
        else:
            temb = temb[:, own.order] if temb.ndim == 3 else temb
            patches = gather(self._head(tokens.all(), temb), _lengths(layout, 0.0, shards.group.size), shards.group)
            patches = patches[:, layout.inverse]
        return self._unpatchify(patches, latents.shape), stats

    def _shards(self, layout: TileLayout, fine) -> Shards:
        if fine is not None:
            raise ValueError("fine: another fine branch does not run with a sequence_group; accepted: None")
        self.sequence_group.check(self.config.num_attention_heads, layout.num_blocks)
        return shards_of(layout, self.sequence_group)

    def _condition(self, latents, timestep, text, layout: TileLayout, shards: Shards | None) -> tuple[torch.Tensor, Sequence3D]:
        """Time embedding (per token: row-major) and everything the blocks share, which is in tile-major order."""
        model, length = self.transformer, None
        if timestep.ndim == 2:
            length = timestep.shape[1]
            timestep = timestep.flatten()
        temb, modulation, text, _ = model.condition_embedder(timestep, text, None, timestep_seq_len=length)
        modulation = modulation.unflatten(-1, (6, -1))
        if length is not None:
            modulation = modulation[:, layout.order if shards is None else shards.layout.order]
        cos, sin = _rope_tables(model.rope, latents, layout)
        if shards is not None:
            cos, sin = cos[shards.begin : shards.end], sin[shards.begin : shards.end]
        return temb, Sequence3D(layout, cos, sin, text, modulation, shards=shards)

    def _head(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """(B, S, C) -> (B, S, values of a patch), token by token."""
        model = self.transformer
        table = model.scale_shift_table.to(temb.device)
        if temb.ndim == 3:
            shift, scale = (table[None] + temb[:, :, None]).unbind(2)
        else:
            shift, scale = (table + temb[:, None]).chunk(2, dim=1)
        return model.proj_out((model.norm_out(x.float()) * (1 + scale) + shift).type_as(x))

    def _unpatchify(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        p_t, p_h, p_w = self.config.patch_size
        batch, _, frames, height, width = shape
        x = x.view(batch, frames // p_t, height // p_h, width // p_w, p_t, p_h, p_w, -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames, height, width)


@torch.inference_mode(False)
@torch.no_grad()
def _rope_tables(rope: nn.Module, latents: torch.Tensor, layout: TileLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, D) fp32 cos and sin in tile-major order, from diffusers' own rope; fp64 tables would make q and k fp64."""
    key = (layout.grid, layout.tile, str(latents.device))
    cache = rope.__dict__.setdefault("_usv_tables", {})
    if key not in cache:
        cos, sin = rope(latents)
        cache[key] = tuple(t.reshape(t.shape[1], t.shape[3])[layout.order].float() for t in (cos, sin))
    return cache[key]


def _run_layer(block, gate, tokens: Tokens, sequence: Sequence3D, rung: Rung | LayerPlan, probe: Probe | None, impl: str):
    """One block under its rung, or under two rungs mixed."""
    out, stats = _run_rung(block, gate, tokens, sequence, rung, impl)
    if probe is not None:
        other, _ = _run_rung(block, gate, tokens, sequence, probe.other, impl)
        out = _mix(out, other, probe.mix.to(out.x.dtype))
    return out, stats


def _mix(out: Tokens, other: Tokens, mix: torch.Tensor) -> Tokens:
    if out.merge_map is other.merge_map:
        if out.merge_map is None:
            return Tokens(out.x + mix * (other.x - out.x))
        return replace(out, kept=out.kept + mix * (other.kept - out.kept))
    states = out.all()
    return Tokens(states + mix * (other.all() - states))


def _run_rung(
    block, gate, tokens: Tokens, sequence: Sequence3D, rung: Rung | LayerPlan, impl: str
) -> tuple[Tokens, AttentionStats | None]:
    layout = sequence.layout
    plan = layer_plan(rung, layout.num_blocks)
    if plan is None and sequence.shards is not None:
        x, _ = _sparse_block(block, gate, tokens.all(), sequence, plan, None, None, impl)
        return Tokens(x), None
    if plan is None:
        rotary = (sequence.cos[None, :, None], sequence.sin[None, :, None])
        return Tokens(block(tokens.all(), sequence.text, sequence.modulation, rotary)), None
    if plan.merged_fraction == 0:
        x, stats = _sparse_block(block, gate, tokens.all(), sequence, plan, (layout.starts, layout.sizes), None, impl)
        return Tokens(x), stats
    if tokens.merge_map is None or tokens.fraction != plan.merged_fraction:
        tokens = _merged(block, tokens.all(), sequence.own, plan.merged_fraction)
    whole = _merge_layout(layout, plan.merged_fraction)
    blocks = (whole.kept_starts, whole.kept_sizes)
    kept, stats = _sparse_block(block, gate, tokens.kept, sequence, plan, blocks, tokens.merge_map, impl)
    return replace(tokens, kept=kept), stats


def _merged(block, x: torch.Tensor, layout: TileLayout, fraction: float) -> Tokens:
    """The tokens as a run of merging layers begins."""
    # Descriptor: the block's normalised input. The paper takes the mean key, which would cost a key projection of all
    # tokens before any is merged; a merge must pay for itself (docs/log.md).
    merge_map = match(block.norm1(x.float()), _merge_layout(layout, fraction))
    kept = merge(x, merge_map)
    return Tokens(x, kept, kept, merge_map, fraction)


@lru_cache(maxsize=64)
def _largest_tile(layout: TileLayout) -> int:
    return known_bound(layout.sizes.cpu())


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _merge_layout(layout: TileLayout, fraction: float) -> MergeLayout:
    counts = merged_tokens(LayerPlan(1, fraction), layout)
    return MergeLayout.build(layout.cells.cpu(), layout.sizes.cpu(), counts, device=layout.order.device)


@lru_cache(maxsize=64)
def _lengths(layout: TileLayout, fraction: float, size: int) -> tuple[int, ...]:
    """Tokens of each of `size` processes, merged by this fraction."""
    return lengths_of(_merge_layout(layout, fraction).kept_sizes if fraction else layout.sizes, size)


def _sparse_block(
    block, gate, x, sequence: Sequence3D, plan: LayerPlan | None, blocks, merge_map: MergeMap | None, impl: str
) -> tuple[torch.Tensor, AttentionStats | None]:
    """The equations of diffusers' WanTransformerBlock with sparse self-attention, on original or merged tokens; plan None: dense."""
    modulation = block.scale_shift_table + sequence.modulation.float()
    if modulation.ndim == 4:
        if merge_map is not None:
            modulation = gather_kept(modulation, merge_map)
        shift, scale, gate_msa, c_shift, c_scale, c_gate = modulation.unbind(2)
    else:
        shift, scale, gate_msa, c_shift, c_scale, c_gate = modulation.chunk(6, dim=1)
    positions = None if merge_map is None else merge_map.kept_index
    key_bias = None if merge_map is None else merge_map.log_sizes()[:, None]

    hidden = torch.addcmul(shift, block.norm1(x.float()), 1 + scale).type_as(x)
    attn = block.attn1
    query, key = (
        norm_rope(project(hidden), norm.weight, norm.eps, sequence.cos, sequence.sin, positions)
        for project, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
    )
    value = attn.to_v(hidden).unflatten(2, (attn.heads, -1)).transpose(1, 2)
    coarse_gate = None if plan is None else gate(hidden).transpose(1, 2)[..., None]
    fine = None if sequence.fine is None else sequence.fine[block]
    attend = _attention if sequence.shards is None else _shared_attention
    out, stats = attend(query, key, value, coarse_gate, key_bias, sequence, plan, blocks, impl, fine)
    x = torch.addcmul(x.float(), attn.to_out[0](out.transpose(1, 2).flatten(2)).float(), gate_msa).type_as(x)

    x = x + block.attn2(block.norm2(x.float()).type_as(x), sequence.text, None, None)
    hidden = torch.addcmul(c_shift, block.norm3(x.float()), 1 + c_scale).type_as(x)
    x = torch.addcmul(x.float(), block.ffn(hidden).float(), c_gate).type_as(x)
    return x, stats


def _attention(query, key, value, coarse_gate, key_bias, sequence: Sequence3D, plan: LayerPlan | None, blocks, impl: str, fine=None):
    """(B, H, S, D) and statistics: sparse under a plan, else dense."""
    if plan is None:
        return nn.functional.scaled_dot_product_attention(query, key, value), None
    layout, fraction = sequence.layout, plan.merged_fraction
    largest = _merge_layout(layout, fraction).kept_max if fraction else _largest_tile(layout)
    return sparse_attention(query, key, value, *blocks, plan.num_kept, coarse_gate, key_bias, impl, fine, largest, plan.mass)


def _shared_attention(query, key, value, coarse_gate, key_bias, sequence: Sequence3D, plan: LayerPlan | None, blocks, impl: str, fine):
    """`_attention` over all tokens, this process with its share of the heads; what comes in and goes out is of its own tokens."""
    group = sequence.shards.group
    lengths = _lengths(sequence.layout, 0.0 if plan is None else plan.merged_fraction, group.size)
    tensors = (query, key, value) if plan is None else (query, key, value, coarse_gate.to(value.dtype))
    query, key, value, *gates = to_heads(tensors, lengths, group)
    if key_bias is not None:
        key_bias = gather(key_bias.transpose(1, 2), lengths, group).transpose(1, 2)
    coarse_gate = gates[0] if gates else None
    out, stats = _attention(query, key, value, coarse_gate, key_bias, sequence, plan, blocks, impl)
    return to_tokens(out, lengths, group), stats
