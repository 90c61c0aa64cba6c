"""Static patterns: one mask for all heads, layers and steps, from the token grid alone.

Radial (arXiv 2506.19852): attention energy decays with the distance of frames, so the spatial window halves each time that
distance doubles. Sliding tile (STA, arXiv 2502.04507): every tile attends to a window of tiles around it, kept inside the
grid at its borders so that all rows cost the same.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from usv_kernels import BlockSelection

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
from usv.sparse.grid import Tile, TokenGrid, tile_layout


@dataclass(frozen=True)
class Radial:
    """Settings. decay: scales the windows, 1 is the paper's. density: if given, decay is the largest that executes at most
    this density of the video (the first frame's keys and the diagonal are the least there is). block: tokens of a block."""

    decay: float = 1.0
    density: float | None = None
    block: int = 128
    dense_layers: float = 0.03
    dense_steps: float = 0.2

    def __post_init__(self):
        check_kinds(self)
        require(self.decay > 0, "decay", self.decay, "a positive factor")
        require(self.density is None or 0 < self.density <= 1, "density", self.density, "a fraction in (0, 1]")
        require(self.block >= 1, "block", self.block, "tokens of a block, e.g. 64 or 128")
        check_warm_up(self)

    def plan(self, q, k, v, grid: TokenGrid, state: PatternState, text: Text | None, clock: Clock) -> PatternPlan:
        """The mask of the grid; row-major order. See `Pattern`."""
        decay = self.decay if self.density is None else radial_decay(grid, self.block, self.density)
        selection = _for_all_heads(radial_mask(grid, self.block, decay), block_sizes(grid.num_tokens, self.block), q)
        clock.lap("select")
        return PatternPlan(None, None, selection)


@dataclass(frozen=True)
class SlidingTile:
    """Settings. tile: tokens of a tile along (t, h, w). window: tiles along (t, h, w); more than the grid has means all.
    density: if given, the window is the one that executes the most token pairs within this density, the most even one of
    equals."""

    tile: tuple[int, int, int] = (4, 4, 4)
    window: tuple[int, int, int] = (3, 3, 3)
    density: float | None = None
    dense_layers: float = 0.03
    dense_steps: float = 0.2

    def __post_init__(self):
        check_kinds(self)
        for name in ("tile", "window"):
            value = tuple(getattr(self, name))
            require(len(value) == 3 and min(value) >= 1, name, value, "three positive extents (t, h, w)")
        require(self.density is None or 0 < self.density <= 1, "density", self.density, "a fraction in (0, 1]")
        check_warm_up(self)

    def plan(self, q, k, v, grid: TokenGrid, state: PatternState, text: Text | None, clock: Clock) -> PatternPlan:
        """Tile-major order and the window's mask. See `Pattern`."""
        layout = tile_layout(grid, Tile(*self.tile), str(q.device))
        counts = tile_counts(grid, layout.tile)
        window = tuple(self.window) if self.density is None else window_for_density(counts, self.density, tile_sides(grid, layout.tile))
        selection = _for_all_heads(sliding_mask(counts, window), layout.sizes.cpu(), q)
        clock.lap("select")
        return PatternPlan(layout.order, layout.order, selection)


def _for_all_heads(mask: Tensor, sizes: Tensor, q: Tensor) -> BlockSelection:
    """One (M, M) mask as the selection of every batch entry and head, without a copy of the lists for each."""
    one = BlockSelection.from_mask(mask[None, None], sizes, sizes, int(mask.sum(-1).max())).to(q.device)
    counts, lists = one.kv_num_blocks, one.kv_indices
    counts, lists = counts.expand(*q.shape[:2], -1), lists.expand(*q.shape[:2], -1, -1)
    return BlockSelection(counts, lists, one.q_starts, one.q_sizes, one.kv_starts, one.kv_sizes, one.q_max, one.kv_max)


@lru_cache(maxsize=16)
def radial_mask(grid: TokenGrid, block: int, decay: float) -> Tensor:
    """(M, M) bool: block pairs that hold a token pair of the radial mask.

    Tokens at places x and y of frames i and j attend when |x − y| + 1 ≤ s / 2^g with g = ⌊log2 max(|i − j|, 1)⌋ and
    s = decay · tokens of a frame; where that window is below one token, only x = y in every ⌈2^g / s⌉-th frame. The first
    frame's keys are attended by all.
    """
    place = grid.h * grid.w
    count = math.ceil(grid.num_tokens / block)
    mask = torch.zeros(count, count, dtype=torch.bool)
    mask[:, : math.ceil(place / block)] = True
    frames = []
    for frame in range(grid.t):
        first, last = frame * place // block, ((frame + 1) * place - 1) // block
        blocks = torch.arange(first, last + 1)
        low = (blocks * block - frame * place).clamp(min=0)
        high = ((blocks + 1) * block - 1 - frame * place).clamp(max=place - 1)
        frames.append((first, last + 1, low, high))
    for (i, rows), (j, columns) in itertools.product(enumerate(frames), repeat=2):
        spread = 2 ** int(math.log2(max(abs(i - j), 1)))
        window = decay * place / spread
        if window < 1 and abs(i - j) % math.ceil(1 / window):
            continue
        nearest = torch.maximum(columns[2] - rows[3][:, None], rows[2][:, None] - columns[3]).clamp(min=0)
        mask[rows[0] : rows[1], columns[0] : columns[1]] |= nearest + 1 <= max(window, 1)
    return mask


def mask_density(mask: Tensor, sizes: Tensor) -> float:
    """Token pairs of an (M, M) block mask / all pairs."""
    sizes = sizes.double()
    return float(sizes @ mask.double() @ sizes / sizes.sum() ** 2)


@lru_cache(maxsize=16)
def radial_decay(grid: TokenGrid, block: int, density: float) -> float:
    """The largest decay, to 1%, whose mask has at most this density.

    Raises ValueError: even the narrowest mask (diagonal and first frame) is denser.
    """
    sizes = block_sizes(grid.num_tokens, block)
    low, high = 1 / (grid.h * grid.w), 2.0 * grid.t
    least = mask_density(radial_mask(grid, block, low), sizes)
    require(least <= density, "density", density, f"at least {least:.4f}, the diagonal and the first frame of {grid}")
    if mask_density(radial_mask(grid, block, high), sizes) <= density:
        return high
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        fits = mask_density(radial_mask(grid, block, middle), sizes) <= density
        low, high = (middle, high) if fits else (low, middle)
    return low


def tile_counts(grid: TokenGrid, tile: Tile) -> tuple[int, int, int]:
    """Tiles along (t, h, w), partial ones included."""
    return tuple(math.ceil(side / extent) for side, extent in ((grid.t, tile.t), (grid.h, tile.h), (grid.w, tile.w)))


def tile_sides(grid: TokenGrid, tile: Tile) -> tuple[tuple[int, ...], ...]:
    """Tokens of the tiles along t, h and w, the last one of an axis partial."""
    sides = ((grid.t, tile.t), (grid.h, tile.h), (grid.w, tile.w))
    return tuple(tuple(min(extent, side - first) for first in range(0, side, extent)) for side, extent in sides)


def _windows(count: int, extent: int) -> Tensor:
    """(count, count) bool: the tiles of an axis that each tile attends to, a window of fixed length shifted inwards at borders."""
    extent, position = min(extent, count), torch.arange(count)
    first = (position - extent // 2).clamp(0, count - extent)[:, None]
    return (position >= first) & (position < first + extent)


@lru_cache(maxsize=16)
def sliding_mask(counts: tuple[int, int, int], window: tuple[int, int, int]) -> Tensor:
    """(M, M) bool over tiles in tile-major order: along each axis a window of fixed length, shifted inwards at borders."""
    t, h, w = (_windows(count, extent) for count, extent in zip(counts, window))
    mask = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    return mask.reshape(math.prod(counts), math.prod(counts))


@lru_cache(maxsize=64)
def window_for_density(
    counts: tuple[int, int, int], density: float, sides: tuple[tuple[int, ...], ...] | None = None
) -> tuple[int, int, int]:
    """The window that executes the most token pairs within density · all pairs, the most even one of equals.

    sides: tokens of the tiles along each axis (`tile_sides`): a partial tile is cheaper than the whole ones that nearly all rows list, so
    a share of the tiles is a larger share of the pairs. None: tiles of one size.

    Raises ValueError: one tile is more than the density.
    """
    shares = []  # of an axis, by the length of the window; the mask's density is the product over the axes
    for count, side in zip(counts, sides or tuple((1,) * count for count in counts)):
        sizes = torch.tensor(side)
        shares.append([mask_density(_windows(count, extent), sizes) for extent in range(1, count + 1)])
    executed = lambda w: round(math.prod(share[extent - 1] for share, extent in zip(shares, w)), 12)  # noqa: E731
    least = executed((1, 1, 1))
    require(least <= density + 1e-9, "density", density, f"at least {least:.4f}, one of {math.prod(counts)} tiles")
    windows = itertools.product(*(range(1, count + 1) for count in counts))
    fitting = (window for window in windows if executed(window) <= density + 1e-9)
    return max(fitting, key=lambda w: (executed(w), min(a / b for a, b in zip(w, counts))))
