"""Merging on the embedded model's trained weights: what is alike merges, and across frames better than within them; every clip against itself."""

import math

import pytest
import torch
from embedded import clips, wan_mini

import usv.models.tokens as tokens
from usv import flow
from usv.metrics.paired import paired_difference
from usv.models.forward import SparseTransformer
from usv.sparse.grid import Tile
from usv.sparse.plan import MERGE_LADDER, Rung

CLIPS, MERGING = 6, 6  # of the eight layers the first six merge, as the students that ship do
LEVEL = 0.35  # noise at which half of what the sampler goes through is cleaner
WITHIN, ACROSS = (1, 2, 2), (3, 1, 2)


@pytest.fixture(scope="module")
def errors():
    """(cell, merge rung, random descriptors?) -> relative squared error of the velocity of each clip against the dense forward's."""
    pipe, dense = wan_mini()
    x0, text, _ = clips(pipe, CLIPS)
    sigma = torch.full((CLIPS,), LEVEL)
    x_t = flow.interpolate(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), sigma)
    made, match = {}, tokens.match

    def random_match(descriptor, layout, **options):
        drawn = torch.randn(descriptor.shape, generator=torch.Generator().manual_seed(1))
        return match(drawn, layout, **options)

    with torch.no_grad():
        wanted = dense(x_t, 1000 * sigma, text)[0]
        for cell in (WITHIN, ACROSS):
            model = SparseTransformer(pipe.transformer, Tile(3, 4, 4, cell=cell)).eval()
            for merge in range(1, len(MERGE_LADDER)):
                rungs = [Rung(0, merge if layer < MERGING else 0) for layer in range(model.num_layers)]
                for drawn in (False, True):
                    tokens.match = random_match if drawn else match
                    try:
                        velocity = model(x_t, 1000 * sigma, text, rungs)[0]
                    finally:
                        tokens.match = match
                    made[cell, merge, drawn] = ((velocity - wanted).square().flatten(1).sum(1) / wanted.square().flatten(1).sum(1)).log()
    return made


@pytest.mark.parametrize("cell, merges", [(WITHIN, (1, 2)), (ACROSS, (1, 2, 3))])
def test_random_descriptors_are_worse(errors, cell, merges):
    """By a paired interval over clips. Within frames the last rung merges all that can, whatever matches."""
    for merge in merges:
        worse = paired_difference(errors[cell, merge, False], errors[cell, merge, True])
        print(f"{cell} {MERGE_LADDER[merge]:.0%} merged, random: {[round(math.exp(x), 3) for x in worse]}")
        assert worse.low > 0, f"{MERGE_LADDER[merge]:.0%} merged in cells of {cell}: log ratio of errors {worse}"
    if cell == WITHIN:
        torch.testing.assert_close(errors[cell, 3, True], errors[cell, 3, False])


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_cells_across_frames_err_a_tenth_less(errors, merge):
    """At the same fraction of tokens merged, the geometric mean over clips; and its interval says that it is less at all."""
    ratio = paired_difference(errors[WITHIN, merge, False], errors[ACROSS, merge, False])
    print(f"{MERGE_LADDER[merge]:.0%} merged: {[round(math.exp(x), 3) for x in ratio]}")
    assert ratio.value <= math.log(0.9) and ratio.high < 0, f"{MERGE_LADDER[merge]:.0%} merged: log ratio of errors {ratio}"
