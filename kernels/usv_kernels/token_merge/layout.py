"""What of token merging is known before any token is seen: tiles, cells and counts, so that every shape is static."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import require
from ..selection import known_bound


@dataclass(frozen=True)
class MergeLayout:
    """Who may merge into whom, and how many do; holds no token data. Built once per (grid, count) by `build`.

    Attributes:
        dst: (S,) int64, for each token the destination of its cell; its own position for destinations and for tokens of
            no cell.
        members: (S, L) int64, for each destination the sources of its cell, filled up with -1; -1 throughout for
            others.
        tile_starts, tile_sizes, num_merged: (num_tiles,) int32, before merging.
        kept_starts, kept_sizes: (num_tiles,) int32, the tiles after merging.
        num_tokens, num_kept_tokens, max_tile: S, S_kept = S - sum of num_merged, and the largest tile: Python integers.
        kept_max: the bound on kept_sizes that `BlockSelection` takes as q_max and kv_max.
    """

    dst: Tensor
    members: Tensor
    tile_starts: Tensor
    tile_sizes: Tensor
    num_merged: Tensor
    kept_starts: Tensor
    kept_sizes: Tensor
    num_tokens: int
    num_kept_tokens: int
    max_tile: int
    kept_max: int = 0

    @classmethod
    def build(
        cls,
        cells: Tensor | Sequence[Sequence[int]],
        tile_sizes: Tensor | Sequence[int],
        num_merged: int | Tensor | Sequence[int],
        device: torch.device | str | None = None,
    ) -> "MergeLayout":
        """Plain Python on the host; not for use inside a compiled graph.

        Args:
            cells: (num_cells, cell_size) positions within a tile, or (num_tiles, num_cells, cell_size) where tiles
                differ. The first present position of a cell is its dst, the others are its src. Negative entries, and
                positions not below the tile's size, are absent: in a partial tile a cell shrinks. Cells of one tile are
                disjoint.
            tile_sizes: (num_tiles,) tokens of each tile; tiles are consecutive.
            num_merged: tokens merged in each tile: (num_tiles,), or one integer for all. At most the tile's number of
                src (for one integer, partial tiles merge floor(num_merged * their size / largest size), at most their
                src).
            device: where the tensors live. Default: the CPU.

        Raises:
            ValueError: overlapping cells, a negative or too large count, or shapes that do not fit.
        """
        sizes = [int(n) for n in (tile_sizes.tolist() if isinstance(tile_sizes, Tensor) else tile_sizes)]
        cells = torch.as_tensor(cells, device="cpu")
        require(cells.dim() in (2, 3), "cells", f"shape {tuple(cells.shape)}", "(num_cells, cell_size), or per tile")
        if cells.dim() == 3:
            require(cells.shape[0] == len(sizes), "cells", f"shape {tuple(cells.shape)}", f"{len(sizes)} tiles first")
        require(all(n >= 0 for n in sizes), "tile_sizes", min(sizes, default=0), "sizes >= 0")
        shared = cells.tolist() if cells.dim() == 2 else None
        own = None if shared is not None else cells.tolist()
        largest, total = max(sizes, default=0), sum(sizes)
        width = max(cells.shape[-1] - 1, 1)
        dst, members = list(range(total)), [[-1] * width for _ in range(total)]
        counts, start = [], 0
        for tile, size in enumerate(sizes):
            num_src = _fill_tile(shared if shared is not None else own[tile], start, size, dst, members)
            counts.append(_count(num_merged, tile, size, largest, num_src, len(sizes)))
            start += size

        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        size_t, count_t = ints(sizes), ints(counts)
        kept_t = size_t - count_t
        return cls(
            dst=torch.tensor(dst, dtype=torch.int64, device=device),
            members=torch.tensor(members, dtype=torch.int64, device=device).reshape(total, width),
            tile_starts=size_t.cumsum(0, dtype=torch.int32) - size_t,
            tile_sizes=size_t,
            num_merged=count_t,
            kept_starts=kept_t.cumsum(0, dtype=torch.int32) - kept_t,
            kept_sizes=kept_t,
            num_tokens=total,
            num_kept_tokens=total - sum(counts),
            max_tile=largest,
            kept_max=known_bound(kept_t.cpu()),
        )


def _fill_tile(cells: list, start: int, size: int, dst: list, members: list) -> int:
    """Enters one tile's cells into dst and members; returns its number of src tokens."""
    seen, num_src = set(), 0
    for cell in cells:
        present = [p for p in cell if 0 <= p < size]
        repeated = seen.intersection(present) or (set(present) if len(set(present)) < len(present) else set())
        require(not repeated, "cells", f"positions {sorted(repeated)} twice in one tile", "disjoint cells")
        seen.update(present)
        for slot, position in enumerate(present[1:]):
            dst[start + position] = start + present[0]
            members[start + present[0]][slot] = start + position
        num_src += max(len(present) - 1, 0)
    return num_src


def _count(num_merged, tile: int, size: int, largest: int, num_src: int, num_tiles: int) -> int:
    if isinstance(num_merged, int):
        count = num_merged if size == largest else min(num_merged * size // max(largest, 1), num_src)
    else:
        require(len(num_merged) == num_tiles, "num_merged", f"{len(num_merged)} counts", f"one per tile, {num_tiles}")
        count = int(num_merged[tile])
    require(
        0 <= count <= num_src, "num_merged", f"{count} in tile {tile}", f"0..{num_src}, the tile's number of src tokens"
    )
    return count
