"""SVG, Sparse VideoGen (arXiv 2502.01776): every head is spatial or temporal, found out online from a few query rows.

    spatial   a band around the diagonal in frame-major order, and the first frame's keys (attention sink)
    temporal  the same band in token-major order: token f·P + p of F frames moves to p·F + f
    width     of the band, from the kept fraction s: w = S (1 − √(1 − s′)), s′ = s − 2T/S with T text tokens among S
    class     the mask whose output on the sampled rows is nearer to full attention (mean squared error)

The band is laid out in blocks: block pairs with |m − n| ≤ ⌈w / block⌉, which is what the published kernel computes (it
rounds w up to a multiple of its block). Letters as in protocol.py; R sampled rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from usv_kernels import BlockSelection, inverse_permutation

from usv.patterns.protocol import (
    Clock,
    PatternPlan,
    PatternState,
    Text,
    block_sizes,
    check_kinds,
    check_warm_up,
    require,
)
from usv.sparse.grid import TokenGrid


@dataclass(frozen=True)
class SVG:
    """Settings.

    density: kept fraction s of the score matrix, in (0, 1]; the sink comes on top of it.
    rows: query rows of the profiling: a number, or a fraction of the video tokens below 1.
    block: tokens of a block. sink: keep the first frame's keys in spatial heads. seed: of the sampled rows.
    proxy: blocks that are not listed are there by their means, which is no part of the published method.
    dense_layers, dense_steps: fractions of the first layers and steps that stay dense.
    """

    density: float = 0.25
    rows: float = 64
    block: int = 128
    sink: bool = True
    seed: int = 0
    proxy: bool = False
    dense_layers: float = 0.03
    dense_steps: float = 0.2

    def __post_init__(self):
        check_kinds(self)
        require(0 < self.density <= 1, "density", self.density, "a fraction in (0, 1]")
        require(self.rows > 0, "rows", self.rows, "a number of rows, e.g. 64, or a fraction of them, e.g. 0.01")
        require(self.block >= 1, "block", self.block, "tokens of a block, e.g. 64 or 128")
        check_warm_up(self)

    def plan(self, q, k, v, grid: TokenGrid, state: PatternState, text: Text | None, clock: Clock) -> PatternPlan:
        """Classification, then one list per head from the two masks. See `Pattern`."""
        temporal = classify(q, k, v, grid, self, text)
        clock.lap("profile")
        selection = self._select(temporal, grid, text)
        order = None
        if bool(temporal.any()):
            rowwise = torch.arange(grid.num_tokens, device=q.device)
            order = torch.where(temporal[..., None], token_major_order(grid).to(q.device), rowwise)
        clock.lap("select")
        return PatternPlan(order, order, selection, self.proxy)

    def _select(self, temporal: Tensor, grid: TokenGrid, text: Text | None) -> BlockSelection:
        sizes = block_sizes(grid.num_tokens, self.block)
        spatial_mask, temporal_mask = self.masks(grid, 0 if text is None else text.num)
        capacity = int(torch.stack((spatial_mask.sum(-1), temporal_mask.sum(-1))).max())
        pair = [
            BlockSelection.from_mask(mask[None, None], sizes, sizes, capacity).to(temporal.device)
            for mask in (spatial_mask, temporal_mask)
        ]
        counts = torch.where(temporal[..., None], pair[1].kv_num_blocks, pair[0].kv_num_blocks)
        lists = torch.where(temporal[..., None, None], pair[1].kv_indices, pair[0].kv_indices)
        layout = (pair[0].q_starts, pair[0].q_sizes, pair[0].kv_starts, pair[0].kv_sizes)
        return BlockSelection(counts, lists, *layout, pair[0].q_max, pair[0].kv_max)

    def masks(self, grid: TokenGrid, num_text: int = 0) -> tuple[Tensor, Tensor]:
        """(M, M) bool block masks of spatial heads (frame-major order) and of temporal heads (token-major order)."""
        width = band_width(self.density, grid.num_tokens, num_text)
        return band_masks(grid, width, self.block, self.sink)


def band_width(density: float, num_tokens: int, num_text: int = 0) -> float:
    """Half width w, in tokens, of the band |i − j| ≤ w that keeps a fraction `density` of all token pairs.

    With S = num_tokens + num_text the text's rows and columns take 2 · num_text / S of the density; density 1 is full.

    Raises ValueError: the text alone exceeds the density.
    """
    length = num_tokens + num_text
    if density == 1:
        return float(length)
    video = density - 2 * num_text / length
    least = 2 * num_text / length
    require(least < 1, "density", density, f"1 alone: dense rows and columns of {num_text} text tokens among {length} exceed "
            "any smaller one; svg2, radial, sliding_tile and tile_top_k count the video's own pairs")  # fmt: skip
    require(video > 0, "density", density, f"more than {least:.4f}, which {num_text} text tokens take of {length}")
    return length * (1 - math.sqrt(1 - video))


@lru_cache(maxsize=8)
def band_masks(grid: TokenGrid, width: float, block: int, sink: bool) -> tuple[Tensor, Tensor]:
    """The two (M, M) block masks on the CPU: band with the first frame's blocks, and band alone."""
    position = torch.arange(math.ceil(grid.num_tokens / block))
    band = (position[:, None] - position).abs() <= math.ceil(width / block)
    spatial = band.clone()
    if sink:
        spatial[:, : math.ceil(grid.h * grid.w / block)] = True
    return spatial, band


def token_major_order(grid: TokenGrid) -> Tensor:
    """(S,) int64: the row-major position of each token in token-major order, all frames of a place together."""
    return torch.arange(grid.num_tokens).view(grid.t, -1).T.reshape(-1)


def sample_rows(num_tokens: int, rows: float, seed: int) -> Tensor:
    """(R,) int64 distinct token positions drawn with a seed; `rows` below 1 is a fraction."""
    count = math.ceil(rows * num_tokens) if rows < 1 else int(rows)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_tokens, generator=generator)[: min(count, num_tokens)]


@torch.no_grad()
def classify(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, settings: SVG, text: Text | None = None) -> Tensor:
    """(B, H) bool, True for temporal heads; ties are spatial. q, k, v: (B, H, S [+ T], D)."""
    spatial, temporal = profile_errors(q, k, v, grid, settings, text)
    return temporal < spatial


@torch.no_grad()
def profile_errors(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, settings: SVG, text: Text | None = None
) -> tuple[Tensor, Tensor]:
    """Mean squared errors (B, H) fp32 of spatial and of temporal attention on the sampled video rows.

    Scores of a head exist for the R rows only, (R, S + T) in fp32; text keys are in both masks, padding in none.
    """
    video = q if text is None else text.video(q)
    length, device = grid.num_tokens, q.device
    rows = sample_rows(length, settings.rows, settings.seed).to(device)
    masks = _row_masks(rows, grid, settings, 0 if text is None else text.num)
    if text is not None:
        columns = torch.ones(len(rows), text.num, dtype=torch.bool, device=device)
        masks = [torch.cat((columns, mask) if text.before else (mask, columns), 1) for mask in masks]
    real = None if text is None else text.key_mask(length)
    errors = torch.empty(2, *q.shape[:2], device=device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = video[b, h, rows].float() @ k[b, h].float().T / math.sqrt(q.shape[-1])
            if real is not None:
                scores = scores.masked_fill(~real[b], float("-inf"))
            value = v[b, h].float()
            full = scores.softmax(-1) @ value
            for i, mask in enumerate(masks):
                part = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
                errors[i, b, h] = (part - full).square().mean()
    return errors[0], errors[1]


def _row_masks(rows: Tensor, grid: TokenGrid, settings: SVG, num_text: int) -> list[Tensor]:
    """The (R, S) bool rows of both masks, keys in row-major order: what would be executed, blocks and all."""
    row_major = torch.arange(grid.num_tokens, device=rows.device)
    token_major = inverse_permutation(token_major_order(grid)).to(rows.device)
    blocks = (place // settings.block for place in (row_major, token_major))
    return [mask.to(rows.device)[block[rows]][:, block] for mask, block in zip(settings.masks(grid, num_text), blocks)]
