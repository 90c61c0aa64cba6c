"""Training-free attention patterns on one kernel: SVG, SVG2, radial, sliding tile, tile top-k.

    out, stats = attend(q, k, v, grid, SVG2(top_p=0.9), state)
"""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from usv.patterns.protocol import CallStats as CallStats
from usv.patterns.protocol import Pattern as Pattern
from usv.patterns.protocol import PatternPlan as PatternPlan
from usv.patterns.protocol import PatternState as PatternState
from usv.patterns.protocol import Text as Text
from usv.patterns.protocol import attend as attend
from usv.patterns.protocol import executed_pairs as executed_pairs
from usv.patterns.static import Radial as Radial
from usv.patterns.static import SlidingTile as SlidingTile
from usv.patterns.svg import SVG as SVG
from usv.patterns.svg2 import SVG2 as SVG2
from usv.patterns.tile_top_k import TileTopK as TileTopK
from usv.patterns.tile_top_k import TileTopKProxy as TileTopKProxy

PATTERNS = {"svg": SVG, "svg2": SVG2, "radial": Radial, "sliding_tile": SlidingTile, "tile_top_k": TileTopK,
            "tile_top_k_proxy": TileTopKProxy}  # fmt: skip


def make_pattern(name: str, **options) -> Pattern:
    """Settings of a pattern by name, e.g. make_pattern("svg2", top_p=0.9).

    Raises ValueError: an unknown name or option, with the nearest valid one, or a value out of range.
    """
    if name not in PATTERNS:
        raise ValueError(f"attention: got {name!r}, accepted: {_accepted(name, PATTERNS)}")
    known = [field.name for field in fields(PATTERNS[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: got an unknown option of {name}, accepted: {_accepted(option, known)}")
    return PATTERNS[name](**options)


def _accepted(given: str, names) -> str:
    near = get_close_matches(str(given), list(names), 1)
    return ", ".join(names) + (f"; did you mean {near[0]!r}?" if near else "")
