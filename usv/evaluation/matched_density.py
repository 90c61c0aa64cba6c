"""Settings under which a training-free pattern executes a wanted share of the attention, so that patterns can be compared.

    radial, sliding tile, tile top-k    from the token grid alone: the finest knob whose executed density is nearest
    svg                                 from the grid and the share of temporal heads, which a few prompts tell
    svg2                                top_p by interval search, each point measured on a few prompts

Executed density is that of the sparse calls; the dense warm-up comes on top for all alike. A block that is too coarse to meet the
density is made smaller until one does: `BLOCKS`, `TILES`, the first that is within the tolerance, else the nearest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch

from usv.patterns.protocol import block_sizes
from usv.patterns.static import mask_density, radial_mask, sliding_mask, tile_counts
from usv.patterns.svg import band_masks, band_width
from usv.sparse.grid import Tile, TokenGrid, tile_layout

BLOCKS = (48, 36, 24, 16, 12, 8)
TILES = ((3, 4, 4), (3, 3, 4), (3, 2, 4), (1, 4, 4), (3, 2, 2), (1, 2, 4), (1, 2, 2))
TOLERANCE = 0.05  # of the wanted density

# options of a pattern -> executed density of its sparse calls and share of temporal heads (svg), measured
Measure = Callable[[dict], tuple[float, float]]


def settings_for(name: str, density: float, grid: TokenGrid, measure: Measure, options: dict | None = None) -> dict:
    """Options of pattern `name` for an executed density in (0, 1).

    grid: of the video. measure: runs a few prompts, used by svg and svg2 only. options: further ones, kept, e.g. clusters.
    """
    kept = dict(options or {})
    if name == "svg2":
        return kept | {"top_p": search_top_p(density, lambda p: measure(kept | {"top_p": p})[0])}
    if name != "svg":
        return kept | nearest(_candidates(name, grid, density), density)
    # Half the heads of either kind to begin with; what is measured there decides.
    chosen = nearest(svg_candidates(grid, density, 0.5), density)
    for _ in range(2):
        executed, temporal = measure(kept | chosen)
        if abs(executed / density - 1) <= TOLERANCE / 2:
            break
        chosen = nearest(svg_candidates(grid, density, temporal), density)
    return kept | chosen


def nearest(candidates: Iterator[tuple[dict, float]], density: float) -> dict:
    """The first of (options, executed density) within the tolerance, else the nearest."""
    best, error = {}, math.inf
    for options, executed in candidates:
        here = abs(executed / density - 1)
        if here < error:
            best, error = options, here
        if error <= TOLERANCE * 0.9:
            break
    return best


def _candidates(name: str, grid: TokenGrid, density: float) -> Iterator[tuple[dict, float]]:
    """For each block size, from coarse to fine, the nearest setting and the density it executes."""
    if name == "radial":
        for block in BLOCKS:
            sizes = block_sizes(grid.num_tokens, block)
            decays = torch.logspace(math.log10(1 / (grid.h * grid.w)), math.log10(2 * grid.t), 100).tolist()
            executed = [mask_density(radial_mask(grid, block, decay), sizes) for decay in decays]
            index = min(range(len(decays)), key=lambda i: abs(executed[i] - density))
            yield {"decay": decays[index], "block": block}, executed[index]
        return
    for tile in TILES:
        counts = tile_counts(grid, Tile(*tile))
        total = math.prod(counts)
        if name in ("tile_top_k", "tile_top_k_proxy"):
            kept = max(1, round(density * total))
            yield {"density": kept / total, "tile": list(tile)}, kept / total
            continue
        windows = itertools.product(*(range(1, count + 1) for count in counts))
        # Of equals the most even: no axis is cut more than another.
        window = min(windows, key=lambda w: (abs(math.prod(w) / total - density), -min(a / b for a, b in zip(w, counts))))
        sizes = tile_layout(grid, Tile(*tile)).sizes
        yield {"window": list(window), "tile": list(tile)}, mask_density(sliding_mask(counts, window), sizes)


def svg_candidates(grid: TokenGrid, density: float, temporal: float) -> Iterator[tuple[dict, float]]:
    """For each block size the band nearest to `density` where a share `temporal` of the heads is temporal."""
    length = grid.num_tokens
    for block in BLOCKS:
        best = None
        for band in range(1, math.ceil(length / block)):
            width = (band - 0.5) * block  # any width of this band's number of blocks
            own = 1 - (1 - width / length) ** 2
            spatial, band_only = svg_densities(grid, own, block)
            executed = temporal * band_only + (1 - temporal) * spatial
            if best is None or abs(executed - density) < abs(best[1] - density):
                best = ({"density": own, "block": block}, executed)
        if best is not None:
            yield best


def svg_densities(grid: TokenGrid, density: float, block: int) -> tuple[float, float]:
    """Executed density of a spatial and of a temporal head at SVG's own density s."""
    sizes = block_sizes(grid.num_tokens, block)
    masks = band_masks(grid, band_width(density, grid.num_tokens), block, True)
    return tuple(mask_density(mask, sizes) for mask in masks)


def search_top_p(density: float, executed: Callable[[float], float], rounds: int = 10) -> float:
    """The p in (0, 1) with executed(p), which grows with p, nearest to `density`.

    Concentrated attention executes little until p is within a hair of 1: the search is over the nines of p, u = −log10(1 − p),
    by turns at the false position and in the middle of what is left.
    """
    low, high = (0.0, 0.0), (6.0, 1.0)
    best = (math.inf, 0.5)
    for turn in range(rounds):
        share = (density - low[1]) / max(high[1] - low[1], 1e-9) if turn % 2 == 0 else 0.5
        u = low[0] + (high[0] - low[0]) * min(max(share, 0.1), 0.9)
        p = round(1 - 10**-u, 7)
        value = executed(p)
        best = min(best, (abs(value / density - 1), p))
        if best[0] <= TOLERANCE / 4:
            break
        low, high = ((u, value), high) if value < density else (low, (u, value))
    return best[1]
