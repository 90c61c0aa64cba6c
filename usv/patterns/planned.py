"""A pattern under a learned plan: the policy says how much, the pattern says which.

    density   num_kept / blocks of the layer's plan at this timestep, so that the student's cost is kept
    blocks    the pattern's at that density, e.g. SVG2's clusters

The student's coarse branch and its token merging stay as they are. Merged tokens are no grid any more: they have a place, but
neighbours are missing. SVG2 needs none, its clusters are of whatever tokens there are, weighted by what each stands for; the
other patterns are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from usv.patterns import SVG2, Pattern, make_pattern
from usv.patterns.processors import PatternRun, Progress
from usv.patterns.protocol import CallStats, attend, require
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import SparsityPlan

# Settings of the patterns that say how much, or where it is dense; a plan says both.
HOW_MUCH = ("density", "top_p", "floor", "num_kept", "decay", "window", "dense_layers", "dense_steps")


def planned_pattern(name: str, plan: SparsityPlan, **options) -> Pattern:
    """Settings of a pattern that runs under `plan`.

    Raises ValueError: an unknown name or option, an option that says how much, or a plan that merges tokens where the
    pattern needs their grid.
    """
    given = next((option for option in options if option in HOW_MUCH), None)
    require(given is None, str(given), options.get(given), "not given beside a checkpoint, whose plan says how much is computed")
    merging = name != "svg2" and plan.merged() > 0
    require(not merging, "attention", f"{name!r} beside a plan that merges {plan.merged():.0%} of the tokens",
            "'svg2', whose clusters need no token grid, or a student trained without merging")  # fmt: skip
    return make_pattern(name, **options, dense_layers=0.0, dense_steps=0.0)


class PlannedPattern:
    """The fine branches of a `SparseTransformer` under a pattern.

    Args:
        pattern: from `planned_pattern`. num_layers, tile: of the network. progress, record, impl, recall_rows: as in
            `usv.patterns.processors.PatternRun`.
    """

    def __init__(
        self, pattern: Pattern, num_layers: int, tile: Tile, progress: Progress, record: Callable[[CallStats], None],
        impl: str = "auto", recall_rows: int = 0,
    ):  # fmt: skip
        self.run = PatternRun(pattern, num_layers, progress, record, impl, recall_rows)
        self.tile = tile
        self.layers = [partial(self.attend, layer) for layer in range(num_layers)]

    def begin(self, grid: TokenGrid, timestep: Tensor) -> None:
        """Notes a new forward; before each."""
        self.run.begin(grid, timestep)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, density: float, key_bias: Tensor | None):
        """q, k, v (B, H, S, D) in tile-major order, all tokens or the merged ones with key_bias (B, 1, S) -> the same shape
        and the executed density."""
        run = self.run
        run.state.layer = layer
        pattern = replace(run.pattern, density=density)
        if isinstance(pattern, SVG2):  # places mean nothing to it: tokens as they lie
            out, stats = attend(q, k, v, TokenGrid(1, 1, q.shape[2]), pattern, run.state, impl=run.impl, key_bias=key_bias)
        else:
            layout = tile_layout(run.grid, self.tile, str(q.device))
            rows = (x[:, :, layout.inverse] for x in (q, k, v))
            out, stats = attend(*rows, run.grid, pattern, run.state, impl=run.impl)
            out = out[:, :, layout.order]
        run.record(stats)
        return out, stats.density
