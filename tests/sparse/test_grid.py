"""usv/sparse/grid.py: tile-major order against a plain loop, partial tiles, cells of token merging, the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usv.sparse.grid import Tile, TokenGrid, tile_layout

SIDES = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
TILES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def tiles_by_hand(grid, tile):
    """For each tile in row-major order, its tokens (t, h, w) in row-major order."""
    tiles = {}
    for t in range(grid.t):
        for h in range(grid.h):
            for w in range(grid.w):
                tiles.setdefault((t // tile.t, h // tile.h, w // tile.w), []).append((t, h, w))
    return [tiles[key] for key in sorted(tiles)]


@settings(max_examples=40, deadline=None)
@given(SIDES, TILES)
def test_layout_is_the_loop(sides, extents):
    grid, tile = TokenGrid(*sides), Tile(*extents)
    layout, expected = tile_layout(grid, tile), tiles_by_hand(grid, tile)
    flat = [(t * grid.h + h) * grid.w + w for run in expected for t, h, w in run]
    assert layout.order.tolist() == flat
    assert layout.order[layout.inverse].tolist() == list(range(grid.num_tokens))
    assert layout.sizes.tolist() == [len(run) for run in expected]
    assert layout.starts.tolist() == [sum(len(r) for r in expected[:i]) for i in range(len(expected))]
    assert layout.num_blocks == len(expected) and layout.sizes.sum() == grid.num_tokens


@settings(max_examples=40, deadline=None)
@given(SIDES, TILES)
def test_cells_partition_every_tile(sides, extents):
    """A cell holds the tokens of one frame and one 2×2 square of the tile; together the cells hold each token once."""
    grid, tile = TokenGrid(*sides), Tile(*extents)
    layout = tile_layout(grid, tile)
    for cells, run, num_src in zip(layout.cells.tolist(), tiles_by_hand(grid, tile), layout.num_src.tolist()):
        filled = [[p for p in cell if p >= 0] for cell in cells]
        assert sorted(p for cell in filled for p in cell) == list(range(len(run)))
        corner = [min(axis) for axis in zip(*run)]
        for cell in filled:
            squares = {(t, (h - corner[1]) // 2, (w - corner[2]) // 2) for t, h, w in (run[p] for p in cell)}
            assert len(squares) <= 1
            assert cell == sorted(cell)  # the first is the dst
        assert num_src == sum(max(len(cell) - 1, 0) for cell in filled)


@pytest.mark.parametrize("cell", [(3, 2, 2), (2, 2, 2), (3, 1, 2), (1, 4, 4)])
def test_cells_may_cross_frames(cell):
    """Every token is in one cell of that extent; the dst is the one in the middle; more can merge than the sparsest rung asks for."""
    grid, tile = TokenGrid(7, 6, 8), Tile(3, 4, 4, cell=cell)
    layout = tile_layout(grid, tile)
    assert tile_layout(grid, Tile(3, 4, 4)) is not layout
    for cells, run in zip(layout.cells.tolist(), tiles_by_hand(grid, tile)):
        filled = [[run[p] for p in c if p >= 0] for c in cells if c[0] >= 0]
        assert sorted(token for c in filled for token in c) == sorted(run)
        for tokens in filled:
            extents = [[min(axis), max(axis)] for axis in zip(*tokens)]
            assert all(high - low < most for (low, high), most in zip(extents, cell))
            assert tokens[0] == tuple((low + high) // 2 for low, high in extents)
    whole = layout.sizes == 48
    assert whole.any() and (layout.num_src[whole] > 36).all()


def test_wan_480p():
    layout = tile_layout(TokenGrid(21, 30, 52), Tile(4, 4, 4))
    assert layout.grid.num_tokens == 32_760
    assert layout.num_blocks == 6 * 8 * 13
    assert sorted(set(layout.sizes.tolist())) == [8, 16, 32, 64]


@pytest.mark.parametrize("extents", [(0, 4, 4), (4, -1, 4), (4, 4, 0)])
def test_a_tile_needs_extent(extents):
    with pytest.raises(ValueError, match=r"tile: got .*expected positive"):
        tile_layout(TokenGrid(4, 4, 4), Tile(*extents))


def test_layouts_are_cached_and_hashable():
    """Made once for a grid; as the key of another cache a layout compares by identity, never by its tensors."""
    grid, tile = TokenGrid(2, 4, 6), Tile(2, 2, 2)
    layout = tile_layout(grid, tile)
    assert tile_layout(TokenGrid(2, 4, 6), Tile(2, 2, 2)) is layout
    other = tile_layout.__wrapped__(grid, tile)
    assert layout != other and len({layout, other, layout}) == 2


def test_a_layout_made_in_inference_mode_serves_training():
    """A pipeline may run first, and under inference_mode; tensors made there could not be saved for a backward."""
    grid, tile = TokenGrid(3, 5, 3), Tile(2, 2, 2)
    with torch.inference_mode():
        layout = tile_layout(grid, tile)
    assert not any(getattr(layout, name).is_inference() for name in ("order", "inverse", "sizes", "starts", "cells"))
