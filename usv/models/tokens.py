"""`Tokens`: a video's hidden states between two blocks, tile-major, all of them or merged, and what stands beside the grid.

    row-major (B, S + E, C)  --begin-->  tile-major tokens of the grid | tokens beside it  --row_major-->  (B, S + E, C)

Conditions (LTX's key frames and references) and history (FramePack) are tokens of the same sequence with places, timesteps and
modulation of their own, but of no grid: they are read by all, never pruned and never merged. A block is called with them behind
the grid's, wherever they stand in the pipeline's order. Shape letters: B batch, S tokens of the grid, E beside it, K those that merging
leaves of S, C width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from usv_kernels.token_merge import MergeMap, gather_kept, match, merge, unmerge

from usv.models.attend import merge_layout, shard_lengths
from usv.sparse.grid import TileLayout
from usv.sparse.sequence_parallel import Shards, gather


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for training too
def beside_order(layout: TileLayout, num: int, before: bool) -> Tensor:
    """(S + E,) row-major positions: the grid's tokens tile-major, then the `num` beside it; before: whether those stand before it."""
    begin = 0 if before else layout.grid.num_tokens
    beside = torch.arange(begin, begin + num, device=layout.order.device)
    return torch.cat((layout.order + (num if before else 0), beside))


@dataclass(frozen=True)
class Tokens:
    """Video tokens between two layers, tile-major: all of them, or merged while a run of layers shares one match.

    x: (B, S, C), as the run began where it is merged. begun, kept: (B, K, C), the merged states then and now. layout: of the whole
    grid. shards: where processes share the sample; x is then of one's own tokens. beside: (B, E, C), tokens of no grid, None where
    there are none; before: whether they stand before the grid's in row-major order.

    To diffusers' forward it is the hidden states between two blocks: a row-major (B, S + E, C) can be added to it.
    """

    x: Tensor
    layout: TileLayout
    shards: Shards | None = None
    begun: Tensor | None = None
    kept: Tensor | None = None
    merge_map: MergeMap | None = None
    fraction: float = 0.0
    beside: Tensor | None = None
    before: bool = False

    @classmethod
    def begin(cls, x: Tensor, layout: TileLayout, shards: Shards | None = None, before: bool = False) -> Tokens:
        """Of row-major hidden states (B, S + E, C), of which a process that shares the sample keeps its own."""
        num = x.shape[1] - layout.grid.num_tokens
        if not num:
            return cls(x[:, (layout if shards is None else shards.layout).order], layout, shards)
        return cls(x, layout, before=before).parted(x[:, beside_order(layout, num, before)])

    def all(self) -> Tensor:
        """(B, S, C): every token of the grid with its own residual and its dst's update."""
        return self.x if self.merge_map is None else self.x + unmerge(self.kept - self.begun, self.merge_map)

    def row_major(self) -> Tensor:
        """(B, S + E, C), in row-major order."""
        x = self.all()
        return self.to_row_major(x if self.beside is None else torch.cat((x, self.beside), 1))

    def to_row_major(self, x: Tensor) -> Tensor:
        """(B, S + E, C) in the order of `order` -> row-major."""
        if self.shards is not None:
            x = gather(x, shard_lengths(self.layout, 0.0, self.shards.group.size), self.shards.group)
        if self.beside is None:
            return x[:, self.layout.inverse]
        num = self.layout.grid.num_tokens
        grid, beside = x[:, :num][:, self.layout.inverse], x[:, num:]
        return torch.cat((beside, grid) if self.before else (grid, beside), 1)

    def states(self) -> Tensor:
        """(B, K + E, C), or (B, S + E, C) where nothing is merged: what a block is called with."""
        x = self.x if self.merge_map is None else self.kept
        return x if self.beside is None else torch.cat((x, self.beside), 1)

    def parted(self, states: Tensor) -> Tokens:
        """These tokens with other `states`."""
        beside, num = None, states.shape[1]
        if self.merge_map is not None:
            num = self.kept.shape[1]
        elif self.shards is None:
            num = self.layout.grid.num_tokens
        if states.shape[1] > num:
            states, beside = states[:, :num], states[:, num:]
        name = "x" if self.merge_map is None else "kept"
        return replace(self, **{name: states}, beside=beside)

    def unmerged(self) -> Tokens:
        """The same, every token with its own state."""
        return self if self.merge_map is None else Tokens(self.all(), self.layout, self.shards, beside=self.beside, before=self.before)

    def merged(self, fraction: float) -> Tokens:
        """The tokens as a run of merging layers begins; the same tokens inside such a run."""
        if self.merge_map is not None and self.fraction == fraction:
            return self
        x = self.all()
        # Descriptor: the normalised tokens. The paper takes the mean key, which would cost a key projection of all
        # tokens before any is merged; a merge must pay for itself (docs/log.md).
        descriptor = nn.functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        merge_map = match(descriptor, merge_layout(self.own, fraction))
        kept = merge(x, merge_map)
        return Tokens(x, self.layout, self.shards, kept, kept, merge_map, fraction, self.beside, self.before)

    def mixed(self, other: Tokens, mix: Tensor) -> Tokens:
        """(1 − mix) · these + mix · other."""
        if self.merge_map is other.merge_map:
            states = self.states()
            return self.parted(states + mix * (other.states() - states))
        return self.unmerged().mixed(other.unmerged(), mix)

    def kept_rows(self, x: Tensor, dim: int) -> Tensor:
        """Rows along `dim`, one for each token of `order` -> those of the tokens of `states`."""
        if self.merge_map is None:
            return x
        x, num = x.transpose(1, dim), self.layout.grid.num_tokens
        if self.beside is None:
            return gather_kept(x, self.merge_map).transpose(1, dim)
        kept = gather_kept(x[:, :num], self.merge_map)
        beside = x[:, num:].expand(len(kept), *(-1,) * (x.ndim - 1))
        return torch.cat((kept, beside), 1).transpose(1, dim)

    @property
    def own(self) -> TileLayout:
        """The tiles of this process."""
        return self.layout if self.shards is None else self.shards.layout

    @property
    def order(self) -> Tensor:
        """(S + E,), the row-major position of each token."""
        return self.own.order if self.beside is None else beside_order(self.layout, self.beside.shape[1], self.before)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def __add__(self, other: Tensor) -> Tokens:
        tokens = self.unmerged()
        return tokens.parted(tokens.states() + other[:, tokens.order])

    __radd__ = __add__
