import itertools
import math

import pytest
import torch
from pattern_reference import masked_attention, qkv, spread, touched_blocks

from usv.patterns import SVG2, PatternState, Radial, SlidingTile, TileTopK, attend
from usv.patterns.protocol import block_sizes
from usv.patterns.static import (
    mask_density,
    radial_decay,
    radial_mask,
    sliding_mask,
    tile_counts,
    tile_sides,
    window_for_density,
)
from usv.sparse.grid import Tile, TokenGrid, tile_layout

NO_WARM_UP = {"dense_layers": 0.0, "dense_steps": 0.0}
GRID = TokenGrid(9, 3, 5)


def radial_tokens(grid, decay):
    """The paper's mask, token pair by token pair."""
    places = grid.h * grid.w
    mask = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for a, b in itertools.product(range(grid.num_tokens), repeat=2):
        (i, x), (j, y) = divmod(a, places), divmod(b, places)
        spread_by, distance = 1, max(abs(i - j), 1)
        while spread_by * 2 <= distance:
            spread_by *= 2
        s = decay * places
        near = spread_by <= s and abs(x - y) + 1 <= s / spread_by
        diagonal = x == y and abs(i - j) % math.ceil(spread_by / s) == 0
        mask[a, b] = near or diagonal or j == 0
    return mask


@pytest.mark.parametrize("decay", [1.0, 0.4, 0.1])
@pytest.mark.parametrize("block", [1, 4, 15])
def test_radial_is_the_blocks_touched_by_the_papers_mask(decay, block):
    expected = touched_blocks(radial_tokens(GRID, decay), block)
    assert torch.equal(radial_mask(GRID, block, decay), expected)
    assert decay == 1.0 or block == 15 or not expected.all()


@pytest.mark.parametrize("density", [0.5, 0.3])
def test_radial_meets_a_density(density):
    grid, block = TokenGrid(13, 8, 16), 16
    decay = radial_decay(grid, block, density)
    sizes = block_sizes(grid.num_tokens, block)
    executed = mask_density(radial_mask(grid, block, decay), sizes)
    assert density - 0.06 < executed <= density
    assert mask_density(radial_mask(grid, block, decay * 1.02), sizes) > executed - 1e-9


def test_radial_below_its_least_density_is_refused():
    with pytest.raises(ValueError, match="density: got 0.01, accepted: at least 0"):
        radial_decay(GRID, 4, 0.01)


def window_tokens(grid, tile, window):
    """Sliding-tile attention, token pair by token pair, in row-major order."""
    counts = [math.ceil(a / b) for a, b in zip((grid.t, grid.h, grid.w), tile)]
    tiles = [
        (t // tile[0], h // tile[1], w // tile[2])
        for t, h, w in itertools.product(range(grid.t), range(grid.h), range(grid.w))
    ]

    def sees(q, k):
        for a, b, count, extent in zip(q, k, counts, window):
            extent = min(extent, count)
            first = min(max(a - extent // 2, 0), count - extent)
            if not first <= b < first + extent:
                return False
        return True

    return torch.tensor([[sees(q, k) for k in tiles] for q in tiles])


@pytest.mark.parametrize(("tile", "window"), [((2, 2, 2), (3, 1, 3)), ((4, 2, 3), (2, 2, 1)), ((1, 3, 2), (5, 9, 2))])
def test_sliding_tile_is_its_window(tile, window):
    q, k, v = qkv(2, 2, GRID.num_tokens, 8)
    out, stats = attend(q, k, v, GRID, SlidingTile(tile=tile, window=window, **NO_WARM_UP), PatternState())
    mask = window_tokens(GRID, tile, window)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
    assert stats.density == pytest.approx(mask.double().mean().item(), abs=1e-12)
    assert 0 < stats.density < 1


def test_every_row_of_a_sliding_window_costs_the_same():
    mask = sliding_mask((5, 4, 6), (3, 3, 3))
    assert (mask.sum(-1) == 27).all() and mask.diagonal().all()


def test_window_for_density_is_the_largest_that_fits_and_even():
    counts = (4, 4, 4)
    assert window_for_density(counts, 1.0) == counts
    assert window_for_density(counts, 8 / 64) == (2, 2, 2)
    assert math.prod(window_for_density((21, 30, 52), 0.2)) <= 0.2 * 21 * 30 * 52
    with pytest.raises(ValueError, match="density: got 0.01, accepted: at least 0.0156"):
        window_for_density(counts, 0.01)


@pytest.mark.parametrize("grid", [(21, 30, 52), (21, 45, 80), (9, 12, 12)])
@pytest.mark.parametrize("density", [0.5, 0.25])
def test_a_window_stays_within_its_density_also_where_tiles_are_partial(grid, density):
    """Partial tiles stand at the borders, and nearly all rows list whole ones: a share of the tiles is a larger share of the pairs."""
    grid = TokenGrid(*grid)
    layout = tile_layout(grid, Tile(4, 4, 4))
    counts, sides = tile_counts(grid, layout.tile), tile_sides(grid, layout.tile)
    executed = lambda window: mask_density(sliding_mask(counts, window), layout.sizes)  # noqa: E731
    window = window_for_density(counts, density, sides)
    assert 0.85 * density < executed(window) <= density + 1e-9
    assert executed(window_for_density(counts, density)) > density, "what was counted before"
    for axis in range(3):
        wider = tuple(extent + (i == axis) for i, extent in enumerate(window))
        assert wider[axis] > counts[axis] or executed(wider) > density


def test_radial_output_is_masked_attention():
    q, k, v = qkv(2, 2, GRID.num_tokens, 8)
    out, stats = attend(q, k, v, GRID, Radial(decay=0.4, block=4, **NO_WARM_UP), PatternState())
    mask = spread(touched_blocks(radial_tokens(GRID, 0.4), 4), 4, GRID.num_tokens)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
    assert stats.density == pytest.approx(mask.double().mean().item(), abs=1e-12)


def test_tile_top_k_keeps_the_tiles_with_the_highest_mean_scores():
    grid, tile = TokenGrid(4, 3, 4), (2, 2, 2)
    q, k, v = qkv(1, 2, grid.num_tokens, 8, scale=2.0)
    out, stats = attend(q, k, v, grid, TileTopK(density=0.3, tile=tile, **NO_WARM_UP), PatternState())
    t, h, w = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in (4, 3, 4)), indexing="ij"))
    tile_of = (t // 2) * 4 + (h // 2) * 2 + w // 2
    means = [torch.stack([x[:, :, tile_of == i].double().mean(2) for i in range(8)], 2) for x in (q, k)]
    kept = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    kept.scatter_(-1, (means[0] @ means[1].transpose(-1, -2)).topk(3).indices, True)  # ⌈0.3 · 8⌉
    mask = kept[:, :, tile_of][:, :, :, tile_of]
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
    assert stats.density == pytest.approx(mask.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Radial(decay=0), "decay: got 0"),
        (lambda: Radial(density=1.5), "density: got 1.5"),
        (lambda: SlidingTile(tile=(4, 4)), r"tile: got \(4, 4\), accepted: three positive extents"),
        (lambda: SlidingTile(window=(0, 1, 1)), "window: got"),
        (lambda: TileTopK(density=0.0), "density: got 0.0"),
        (lambda: TileTopK(density="0.3"), "density: got '0.3', accepted: a number"),
        (lambda: SlidingTile(tile=4), "tile: got 4, accepted: three positive extents"),
        (lambda: SlidingTile(window=3), "window: got 3, accepted: three positive extents"),
        (lambda: Radial(block=64.5), "block: got 64.5, accepted: a whole number"),
        (lambda: SVG2(q_clusters=10.5), "q_clusters: got 10.5, accepted: a whole number"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
