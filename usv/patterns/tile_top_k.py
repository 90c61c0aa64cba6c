"""Tile top-k: the fine branch of VSA (arXiv 2505.13389) without training. Tokens in tile-major order, tile means of q and k,
and the key tiles with the highest q_c · k_c / √D for each query tile. Tile top-k with proxies also attends to the others, by their
means: exact where it matters most, approximate elsewhere, in one softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from usv_kernels import block_pool, select_top_k

from usv.patterns.protocol import Clock, PatternPlan, PatternState, Text, check_kinds, check_warm_up, require
from usv.sparse.grid import Tile, TokenGrid, tile_layout


@dataclass(frozen=True)
class TileTopK:
    """Settings. density: share of key tiles per query tile, in (0, 1], rounded up. tile: tokens along (t, h, w)."""

    density: float = 0.25
    tile: tuple[int, int, int] = (4, 4, 4)
    dense_layers: float = 0.03
    dense_steps: float = 0.2
    proxy: ClassVar[bool] = False

    def __post_init__(self):
        check_kinds(self)
        require(0 < self.density <= 1, "density", self.density, "a fraction in (0, 1]")
        tile = tuple(self.tile)
        require(len(tile) == 3 and min(tile) >= 1, "tile", tile, "three positive extents (t, h, w)")
        check_warm_up(self)

    def plan(self, q, k, v, grid: TokenGrid, state: PatternState, text: Text | None, clock: Clock) -> PatternPlan:
        """Tile-major order, pooled scores, top-k. See `Pattern`."""
        layout = tile_layout(grid, Tile(*self.tile), str(q.device))
        if text is not None:
            q, k = text.video(q), text.video(k)
        # Means over permuted tokens are means of gathered ones: pooling needs the order, attention permutes once more.
        q_c, k_c = (block_pool(x[:, :, layout.order], layout.starts, layout.sizes) for x in (q, k))
        scores = q_c.float() @ k_c.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        num_kept = max(1, math.ceil(round(self.density * layout.num_blocks, 9)))
        blocks = (layout.starts, layout.sizes)
        selection = select_top_k(scores, num_kept, *blocks, *blocks)
        clock.lap("select")
        return PatternPlan(layout.order, layout.order, selection, self.proxy)


@dataclass(frozen=True)
class TileTopKProxy(TileTopK):
    """The same settings; key tiles that are not listed are there by their mean key and value (`usv_kernels.block_proxy`)."""

    proxy: ClassVar[bool] = True
