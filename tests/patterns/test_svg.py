import math

import pytest
import torch
from pattern_reference import masked_attention, qkv, spread, touched_blocks

from usv.patterns import SVG, PatternState, Text, attend
from usv.patterns.svg import band_masks, band_width, classify, profile_errors, sample_rows, token_major_order
from usv.sparse.grid import TokenGrid

NO_WARM_UP = {"dense_layers": 0.0, "dense_steps": 0.0}
GRID = TokenGrid(5, 4, 6)


@pytest.mark.parametrize(
    ("frames", "places", "text", "density"),
    [(21, 3600, 0, 0.25), (21, 1560, 0, 0.3), (33, 3600, 256, 0.2), (11, 4080, 226, 0.3), (21, 3600, 0, 1.0)],
)
def test_band_covers_the_density_at_published_shapes(frames, places, text, density):
    length = frames * places + text
    width = band_width(density, frames * places, text)
    # Pairs with |i − j| ≤ w, counted diagonal by diagonal, and the text's rows and columns.
    whole = int(width)
    pairs = length + 2 * sum(length - distance for distance in range(1, min(whole, length - 1) + 1))
    assert pairs / length**2 + (2 * text / length if density < 1 else 0) == pytest.approx(density, abs=2e-4)


def test_band_width_is_the_published_formula():
    assert band_width(0.25, 75600) == pytest.approx(10128.48, abs=0.01)  # 75600 · (1 − 0.8660254)
    assert band_width(0.36, 1000) == pytest.approx(200)
    assert band_width(1.0, 1000, 50) == 1050
    with pytest.raises(ValueError, match="density: got 0.1, accepted: more than 0.4000"):
        band_width(0.1, 800, 200)


@pytest.mark.parametrize("block", [1, 7, 16])
@pytest.mark.parametrize("width", [3.0, 16.5, 40.0])
def test_masks_are_the_blocks_touched_by_the_rounded_band(width, block):
    length = GRID.num_tokens
    i = torch.arange(length)
    band = (i[:, None] - i).abs() <= math.ceil(width / block) * block
    sink = (i < GRID.h * GRID.w).expand(length, length)
    spatial, temporal = band_masks(GRID, width, block, True)
    assert torch.equal(temporal, touched_blocks(band, block))
    assert torch.equal(spatial, touched_blocks(band | sink, block))
    assert torch.equal(band_masks(GRID, width, block, False)[0], temporal)


@pytest.mark.parametrize(
    ("grid", "text"), [(TokenGrid(21, 45, 80), 0), (TokenGrid(21, 30, 52), 0), (TokenGrid(33, 45, 80), 256), (TokenGrid(11, 48, 85), 226)]
)  # fmt: skip
def test_masks_at_published_shapes(grid, text):
    """Row by row, as runs of columns: the band to the block that holds the last token of its rounded width, and the sink."""
    settings, block = SVG(density=0.3), 128
    spatial, temporal = settings.masks(grid, text)
    width = math.ceil(band_width(0.3, grid.num_tokens, text) / block) * block
    sink = -(-grid.h * grid.w // block)
    for row in range(len(temporal)):
        first, last = max(row * block - width, 0) // block, min((row + 1) * block - 1 + width, grid.num_tokens - 1) // block
        columns = torch.arange(len(temporal))
        band = (columns >= first) & (columns <= last)
        assert torch.equal(temporal[row], band) and torch.equal(spatial[row], band | (columns < sink))


@pytest.mark.parametrize("grid", [TokenGrid(21, 52, 68), GRID, TokenGrid(1, 3, 3)])
def test_token_major_order_moves_fP_plus_p_to_pF_plus_f(grid):
    order, places = token_major_order(grid), grid.h * grid.w
    x = torch.arange(grid.num_tokens)
    moved = x[order]
    f, p = x // places, x % places
    assert torch.equal(moved[p * grid.t + f], x)
    back = torch.empty_like(moved)
    back[order] = moved
    assert torch.equal(back, x)


def constructed_heads():
    """A head that looks only at its own frame, one that looks only at its own place, over random values."""
    token = torch.arange(GRID.num_tokens)
    places = GRID.h * GRID.w
    width = max(GRID.t, places)
    heads = [torch.nn.functional.one_hot(index, width).float() for index in (token // places, token % places)]
    x = 12 * torch.stack(heads)[None]
    return x, x, qkv(1, 2, GRID.num_tokens, width)[2]


def test_constructed_heads_are_classified_whatever_their_order_and_batch():
    q, k, v = constructed_heads()
    settings = SVG(density=0.3, block=4)
    assert classify(q, k, v, GRID, settings).tolist() == [[False, True]]
    flip = [1, 0]
    both = [torch.cat((x, x[:, flip])) for x in (q, k, v)]
    assert classify(*both, GRID, settings).tolist() == [[False, True], [True, False]]
    few = SVG(density=0.3, block=4, rows=0.05)  # 6 rows
    assert classify(q, k, v, GRID, few).tolist() == [[False, True]]


def test_equal_errors_are_spatial():
    q, k, v = qkv(1, 3, GRID.num_tokens, 8)
    assert not classify(q, k, v, GRID, SVG(density=1.0, block=4)).any()


def head_masks(settings, num_text=0):
    """Token masks in row-major order, spatial and temporal, from the definition of the two orders."""
    places, token = GRID.h * GRID.w, torch.arange(GRID.num_tokens)
    spatial, temporal = settings.masks(GRID, num_text)
    position = token % places * GRID.t + token // places
    length = GRID.num_tokens
    return spread(spatial, settings.block, length), spread(temporal, settings.block, length)[position][:, position]


@pytest.mark.parametrize("before", [None, True, False])
def test_profile_errors_are_those_of_masked_attention_on_the_sampled_rows(before):
    settings = SVG(density=0.5, block=8, rows=40)
    text = None if before is None else Text(6, before, torch.tensor([2, 6]))
    num_text = 0 if text is None else 6
    q, k, v = qkv(2, 2, GRID.num_tokens + num_text, 16, scale=2.0)
    rows = sample_rows(GRID.num_tokens, 40, 0)
    assert len(rows.unique()) == 40 and rows.max() < GRID.num_tokens
    errors = profile_errors(q, k, v, GRID, settings, text)
    real = torch.ones(2, 1, 1, GRID.num_tokens + num_text, dtype=torch.bool)
    shift = 0
    if before is not None:
        shift = 6 if before else 0
        first = 0 if before else GRID.num_tokens
        real[0, ..., first + 2 : first + 6] = False
    full = masked_attention(q, k, v, real)[:, :, rows + shift]
    for error, mask in zip(errors, head_masks(settings, num_text)):
        joint = torch.ones(1, 1, *[GRID.num_tokens + num_text] * 2, dtype=torch.bool)
        joint[..., shift : shift + GRID.num_tokens, shift : shift + GRID.num_tokens] = mask
        part = masked_attention(q, k, v, joint & real)[:, :, rows + shift]
        torch.testing.assert_close(error, (part - full).square().mean((-1, -2)).float(), rtol=1e-4, atol=1e-7)


def test_output_is_masked_attention_of_each_head_in_its_own_layout():
    settings = SVG(density=0.3, block=8, **NO_WARM_UP)
    q, k, v = constructed_heads()
    q, k = q + 0.5 * qkv(*q.shape, seed=5)[0], k + 0.5 * qkv(*q.shape, seed=6)[0]
    out, stats = attend(q, k, v, GRID, settings, PatternState())
    masks = torch.stack(head_masks(settings))[None]
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, masks), rtol=1e-5, atol=1e-5)
    assert stats.density == pytest.approx(masks.float().mean().item())
    assert not masks[0, 0].equal(masks[0, 1]) and 0.2 < stats.density < 0.8
    assert stats.seconds["profile"] > 0 and stats.seconds["attention"] > 0 and stats.seconds["cluster"] == 0


def test_all_spatial_heads_are_not_permuted():
    q, k, v = (x[:, :1] for x in constructed_heads())
    settings = SVG(density=0.3, block=8, **NO_WARM_UP)
    plan = settings.plan(q, k, v, GRID, PatternState(), None, _NoClock())
    assert plan.q_order is None
    q, k, v = constructed_heads()
    order = settings.plan(q, k, v, GRID, PatternState(), None, _NoClock()).q_order
    assert torch.equal(order[0, 0], torch.arange(GRID.num_tokens))
    assert torch.equal(order[0, 1], token_major_order(GRID))


class _NoClock:
    def lap(self, stage):
        assert stage in ("profile", "cluster", "select")


def test_more_text_than_any_density_takes():
    from usv.patterns.svg import band_width

    with pytest.raises(ValueError, match="density: got 0.5, accepted: 1 alone: dense rows and columns of 200 text tokens among 300"):
        band_width(0.5, 100, 200)
    assert band_width(1, 100, 200) == 300
    with pytest.raises(ValueError, match="density: got 0.1, accepted: more than 0.4000"):
        band_width(0.1, 400, 100)
