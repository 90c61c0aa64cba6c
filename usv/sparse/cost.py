"""The cost model: FLOPs of one forward under a plan, from shapes alone.

A block over S tokens of width d with L text tokens (multiply-add = 2 FLOPs); in joint attention the text has its own rows instead
of the cross-attention, 4·(2·S·L + L²)·d + 8·L·d² + 4·L·d·d_ff:

    self-attention   4·S²·d·density + 8·S·d²        cross-attention  4·S·d² + 4·L·d² + 4·S·L·d        FFN  4·S·d·d_ff

Merged tokens leave S in everything that merging wraps, which is the whole block; attention then falls quadratically.
"""

from __future__ import annotations

from dataclasses import dataclass

from usv.sparse.grid import TileLayout
from usv.sparse.plan import RUNGS, LayerPlan, Rung, SparsityPlan, layer_plan, merged_tokens

IMAGE_TOKENS = 257  # of CLIP ViT-H/14


@dataclass(frozen=True)
class ModelShape:
    """What the cost depends on. dim d, num_heads, ffn_dim d_ff, num_layers, text_length L."""

    dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    text_length: int
    joint: bool = False

    @classmethod
    def of(cls, config, text_length: int, joint: bool = False) -> ModelShape:
        """From the config of a transformer, an object or a dict; without ffn_dim it is mlp_ratio, else 4, times the width."""
        config = dict(config) if isinstance(config, dict) else dict(vars(config))
        heads = config["num_attention_heads"]
        dim = heads * config["attention_head_dim"]
        ffn = config.get("ffn_dim") or int(dim * (config.get("mlp_ratio") or 4))
        if config.get("image_dim"):  # image embeddings are attended beside the text
            text_length += config.get("pos_embed_seq_len") or IMAGE_TOKENS
        return cls(dim, heads, ffn, config["num_layers"] + (config.get("num_single_layers") or 0), text_length, joint)


def block_flops(shape: ModelShape, num_tokens: float, density: float = 1.0) -> dict[str, float]:
    """FLOPs of one block by component, `num_tokens` being those left by merging."""
    s, d, text = num_tokens, shape.dim, shape.text_length
    if shape.joint:
        words = 4 * (2 * s * text + text * text) * d + 8 * text * d * d + 4 * text * d * shape.ffn_dim
    else:
        words = 4 * s * d * d + 4 * text * d * d + 4 * s * text * d
    return {
        "attention": 4 * s * s * d * density,
        "projections": 8 * s * d * d,
        "cross_attention": words,
        "ffn": 4 * s * d * shape.ffn_dim,
    }


def rung_flops(shape: ModelShape, layout: TileLayout, rung: Rung | LayerPlan) -> float:
    """FLOPs of one block at a rung or LayerPlan, with the coarse branch that a sparse block adds."""
    plan = layer_plan(rung, layout.num_blocks)
    num_tokens = layout.grid.num_tokens - sum(merged_tokens(plan, layout))
    density = 1.0 if plan is None else plan.num_kept / layout.num_blocks
    flops = sum(block_flops(shape, num_tokens, density).values())
    if plan is not None:
        flops += 4 * layout.num_blocks**2 * shape.dim + 2 * num_tokens * shape.dim * shape.num_heads
    return flops


def rung_costs(shape: ModelShape, layout: TileLayout) -> list[float]:
    """Cost of every rung of `plan.RUNGS` as a fraction of the dense block."""
    dense = rung_flops(shape, layout, Rung())
    return [rung_flops(shape, layout, rung) / dense for rung in RUNGS]


def plan_cost(plan: SparsityPlan, shape: ModelShape, layout: TileLayout) -> float:
    """FLOPs of a mean forward that runs under the plan, as a fraction of dense."""
    costs = dict(zip(RUNGS, rung_costs(shape, layout)))
    rungs = [rung for row in plan.running() for rung in row]
    return sum(costs[rung] for rung in rungs) / len(rungs)


def dense_flops(shape: ModelShape, num_tokens: int) -> float:
    """FLOPs of all blocks of one dense forward."""
    return shape.num_layers * sum(block_flops(shape, num_tokens).values())
