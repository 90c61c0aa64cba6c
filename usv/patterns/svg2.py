"""SVG2, Sparse VideoGen2 (arXiv 2505.18875): blocks are clusters of similar tokens, not runs of positions.

    cluster   k-means of queries and of keys apart, per layer and head, on post-RoPE vectors: 50 iterations at first, then 2
              from the centroids of the previous step; an empty cluster keeps its centroid
    permute   tokens so that clusters are contiguous: argsort of the assignment, stable
    score     c_q · c_k / √D + log(size of the key cluster), the log of size-weighted centroid attention
    choose    top-p: clusters in descending order up to and including the one that crosses p, at least `floor` of them
    attend    exactly, over variable-size blocks: nothing is padded

Under a learned plan, or to compare patterns at equal density, the choice is by `num_kept` clusters or by `density` instead:
top-p with the p of each head that executes that density. On merged tokens (a plan that merges) size is the sum of the sizes
that the tokens stand for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from usv_kernels import BlockSelection, Clusters, kmeans, select_top_k, select_top_p

from usv.patterns.protocol import Clock, PatternPlan, PatternState, Text, check_kinds, check_warm_up, require
from usv.sparse.grid import TokenGrid


@dataclass(frozen=True)
class SVG2:
    """Settings. Exactly one of three choices is active: num_kept if given, else density if given, else top_p.

    q_clusters, k_clusters: clusters of queries and of keys, at most the tokens; published 100–400 and 500–1000.
    top_p: share of the centroid attention's mass, in (0, 1]. floor: least share of key clusters listed, in [0, 1].
    num_kept: key clusters per query cluster, 1..k_clusters.
    density: executed token pairs / all, of every head, in (0, 1]; at least one cluster for each query cluster.
    first_iters, iters: k-means iterations without and with cached centroids.
    proxy: blocks that are not listed are there by their means, which is no part of the published method.
    dense_layers, dense_steps: fractions of the first layers and steps that stay dense.
    """

    top_p: float = 0.9
    q_clusters: int = 100
    k_clusters: int = 500
    floor: float = 0.1
    num_kept: int | None = None
    density: float | None = None
    first_iters: int = 50
    iters: int = 2
    proxy: bool = False
    dense_layers: float = 0.03
    dense_steps: float = 0.2

    def __post_init__(self):
        check_kinds(self)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a fraction in (0, 1]")
        require(0 <= self.floor <= 1, "floor", self.floor, "a fraction in [0, 1]")
        for name in ("q_clusters", "k_clusters", "first_iters", "iters"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer from 1")
        require(self.num_kept is None or 1 <= self.num_kept <= self.k_clusters, "num_kept", self.num_kept,
                f"an integer in 1..{self.k_clusters} (k_clusters)")  # fmt: skip
        require(self.density is None or 0 < self.density <= 1, "density", self.density, "a fraction in (0, 1]")
        require(self.num_kept is None or self.density is None, "density", self.density, "None where num_kept is given")
        check_warm_up(self)

    def plan(
        self, q, k, v, grid: TokenGrid, state: PatternState, text: Text | None, clock: Clock, key_bias: Tensor | None = None
    ) -> PatternPlan:
        """Clusters of this call, from the cached centroids where there are any, and the choice. See `Pattern`.

        key_bias: (B, 1 or H, S), the logarithm of what each key stands for, as in `attend`.
        """
        if text is not None:
            q, k = text.video(q), text.video(k)
        q_clusters, k_clusters = self._cluster(q, k, state)
        clock.lap("cluster")
        selection = self.select(q_clusters, k_clusters, key_bias)
        q_order, kv_order = (c.assignment.argsort(dim=-1, stable=True) for c in (q_clusters, k_clusters))
        clock.lap("select")
        return PatternPlan(q_order, kv_order, selection, self.proxy)

    def _cluster(self, q: Tensor, k: Tensor, state: PatternState) -> tuple[Clusters, Clusters]:
        for name in ("q_clusters", "k_clusters"):
            require(getattr(self, name) <= q.shape[2], name, getattr(self, name), f"1..{q.shape[2]}, the video tokens")
        key = (state.layer, state.branch)
        shapes = tuple((*q.shape[:2], count, q.shape[3]) for count in (self.q_clusters, self.k_clusters))
        cached = state.centroids.get(key)
        # Centroids of another batch or number of clusters are of no use: such a call is a first one.
        known = cached is not None and tuple(tuple(c.shape) for c in cached) == shapes
        init, iters = (cached, self.iters) if known else ((None, None), self.first_iters)
        q_clusters = kmeans(q, self.q_clusters, iters, init[0])
        k_clusters = kmeans(k, self.k_clusters, iters, init[1])
        # The last step has no successor: centroids of 40 layers, 40 heads and two branches are a gigabyte.
        state.centroids.pop(key, None)
        if state.step + 1 < state.num_steps:
            state.centroids[key] = (q_clusters.centroids, k_clusters.centroids)
        return q_clusters, k_clusters

    def select(self, q_clusters: Clusters, k_clusters: Clusters, key_bias: Tensor | None = None) -> BlockSelection:
        """BlockSelection over the tokens in cluster order; empty key clusters are never listed."""
        scores = centroid_scores(q_clusters.centroids, k_clusters, key_bias)
        layout = (*_runs(q_clusters.counts), *_runs(k_clusters.counts))
        if self.num_kept is not None:
            return select_top_k(scores, self.num_kept, *layout)
        if self.density is not None:
            return select_density(scores, self.density, q_clusters.counts, k_clusters.counts)
        return select_top_p(scores, self.top_p, self.floor, *layout)


def centroid_scores(q_centroids: Tensor, k_clusters: Clusters, key_bias: Tensor | None = None) -> Tensor:
    """(B, H, Cq, Ck) fp32: c_q · c_k / √D + log Σ exp(key_bias), the log size without it; -inf for an empty key cluster."""
    scores = q_centroids @ k_clusters.centroids.transpose(-1, -2) / math.sqrt(q_centroids.shape[-1])
    sizes = k_clusters.counts.float()
    if key_bias is not None:
        weights = key_bias.float().exp().expand(k_clusters.assignment.shape)
        sizes = torch.zeros_like(sizes).scatter_add_(-1, k_clusters.assignment, weights)
    return scores.float() + sizes.log().unsqueeze(-2)


def _runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and sizes (B, H, C) int32 of consecutive clusters."""
    return (counts.cumsum(-1) - counts).to(torch.int32), counts.to(torch.int32)


def select_density(scores: Tensor, density: float, q_sizes: Tensor, kv_sizes: Tensor) -> BlockSelection:
    """Top-p with the largest p, of each batch entry and head, that executes at most density of its token pairs.

    A cluster is listed if less than p of its row's mass lies before it. So all pairs of clusters in the order of that mass,
    as far as their token pairs fit: rows with scattered attention get more than rows with concentrated. The best cluster of
    each row is always listed.

    scores: (B, H, Cq, Ck). q_sizes: (B, H, Cq), kv_sizes: (B, H, Ck) integers.
    """
    mass, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = torch.cat((torch.zeros_like(mass[..., :1]), mass.cumsum(-1)[..., :-1]), -1)
    sizes = kv_sizes.unsqueeze(-2).expand(scores.shape).gather(-1, order)
    # Stable: of equals the lower row, and inside a row, where the mass has run out of bits, the better cluster.
    rank = before.flatten(2).argsort(dim=-1, stable=True)
    pairs = (sizes * q_sizes.unsqueeze(-1)).flatten(2).gather(-1, rank)
    budget = density * (q_sizes.sum(-1) * kv_sizes.sum(-1)).double()
    fits = pairs.cumsum(-1) <= budget.unsqueeze(-1) * (1 + 1e-12)
    kept = torch.zeros_like(fits).scatter_(-1, rank, fits).view(scores.shape)
    kept[..., 0] = True
    mask = torch.zeros_like(kept).scatter_(-1, order, kept & (sizes > 0))
    return BlockSelection.from_mask(mask, q_sizes, kv_sizes)
