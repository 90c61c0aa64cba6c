"""The token grid of a video, and tile-major order: every 3-D tile's tokens lie in one run, so a tile is a block.

    (t, h, w) token grid, row-major  --order-->  tile by tile, row-major inside each (possibly partial) tile

Tiles at the far edges are partial when the grid is not a multiple of the tile; they carry their real size. The layout is
computed once per (grid, tile) and kept: it depends on no data.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from usv.bounds import MOST_TILE


@dataclass(frozen=True)
class TokenGrid:
    """Tokens along time, height and width, after patchify."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True)
class Tile:
    """Extent of a tile in tokens, and of the cells inside it in which tokens may merge.

    cell: (t, h, w). 1×2×2 keeps every frame to itself: three of four tokens can merge, so the sparsest rung merges all that can and
    nothing is matched. A cell over several frames has more of them than any rung merges, the nearest of which are chosen.
    """

    t: int
    h: int
    w: int
    cell: tuple[int, int, int] = (1, 2, 2)

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True, eq=False)  # compared by identity: tensors have no truth value
class TileLayout:
    """Tile-major order of one grid.

    Attributes:
        order: (S,) int64, row-major position of each token in tile-major order: x_tiled = x[order].
        inverse: (S,) int64, x = x_tiled[inverse].
        sizes, starts: (M,) int32, tokens of each tile and its first token in tile-major order.
        cells: (M, cells, tokens of a cell) int64, positions inside each tile of its cells, -1 where a partial tile has none; the first of a
            cell, the one in its middle, is the dst of token merging.
        num_src: (M,) int32, tokens of each tile that can merge into another.
    """

    grid: TokenGrid
    tile: Tile
    order: torch.Tensor
    inverse: torch.Tensor
    sizes: torch.Tensor
    starts: torch.Tensor
    cells: torch.Tensor
    num_src: torch.Tensor

    @property
    def num_blocks(self) -> int:
        return self.sizes.numel()


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # kept for training too, which cannot save inference tensors
def tile_layout(grid: TokenGrid, tile: Tile, device: str = "cpu") -> TileLayout:
    """The TileLayout of a grid. ValueError when an extent is not positive, or a tile too large."""
    if min(tile.t, tile.h, tile.w, *tile.cell) < 1 or tile.num_tokens > MOST_TILE:
        raise ValueError(f"tile: got {tile}, expected positive extents of at most {MOST_TILE} tokens together, e.g. Tile(4, 4, 4)")
    position = torch.arange(grid.num_tokens).view(grid.t, grid.h, grid.w)
    runs, cells = [], []
    most = math.prod(math.ceil(extent / cell) for extent, cell in zip((tile.t, tile.h, tile.w), tile.cell))
    for t in range(0, grid.t, tile.t):
        for h in range(0, grid.h, tile.h):
            for w in range(0, grid.w, tile.w):
                block = position[t : t + tile.t, h : h + tile.h, w : w + tile.w]
                runs.append(block.reshape(-1))
                cells.append(_cells(block.shape, tile.cell, most))
    order = torch.cat(runs)
    sizes = torch.tensor([len(run) for run in runs], dtype=torch.int32)
    starts = (sizes.cumsum(0) - sizes).to(torch.int32)
    cells = torch.stack(cells)
    num_src = (sizes - (cells >= 0).any(-1).sum(-1)).to(torch.int32)
    tensors = (order, torch.argsort(order), sizes, starts, cells, num_src)
    return TileLayout(grid, tile, *(x.to(device) for x in tensors))


@lru_cache(maxsize=64)  # a grid has few kinds of tiles and many tiles
@torch.inference_mode(False)
def _cells(shape: torch.Size, cell: tuple[int, int, int], most: int) -> torch.Tensor:
    """(most, tokens of a cell) positions inside a tile of `shape`, cell by cell, the middle one first, padded with -1."""
    position = torch.arange(math.prod(shape)).view(shape)
    cells = torch.full((most, math.prod(cell)), -1)
    corners = itertools.product(*(range(0, extent, step) for extent, step in zip(shape, cell)))
    for index, (t, h, w) in enumerate(corners):
        inside = position[t : t + cell[0], h : h + cell[1], w : w + cell[2]]
        middle = int(inside[tuple((extent - 1) // 2 for extent in inside.shape)])
        run = [middle, *(p for p in inside.flatten().tolist() if p != middle)]
        cells[index, : len(run)] = torch.tensor(run)
    return cells
