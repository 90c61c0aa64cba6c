"""Block choice in plain torch: a stable sort in descending order, then a mask over ranks. The oracle of `select`."""

import torch
from torch import Tensor

from .._impl import accumulator


def _descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted scores and the block at every rank. Stable: among equal scores the lower block index comes first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True)


def top_k_mask(scores_BHMN: Tensor, num_kept_BHM: Tensor) -> Tensor:
    """True for the num_kept highest scores of each row that are not -inf."""
    _, order = _descending(scores_BHMN)
    rank = torch.arange(scores_BHMN.shape[-1], device=order.device)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, rank < num_kept_BHM[..., None])
    return kept & (scores_BHMN != float("-inf"))


def top_p_mask(scores_BHMN: Tensor, p: float, floor: int) -> Tensor:
    """True for the blocks, in descending order, that still have less than p of the softmax mass before them."""
    sorted_scores, order = _descending(scores_BHMN)
    # A row that is -inf throughout gives NaN here; comparing NaN gives False and the row stays empty below.
    mass = torch.softmax(sorted_scores.to(accumulator(scores_BHMN.dtype)), dim=-1)
    before = mass.cumsum(-1) - mass
    rank = torch.arange(scores_BHMN.shape[-1], device=order.device)
    ranked = (before < p) | (rank < floor) if p < 1.0 else torch.ones_like(before, dtype=torch.bool)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, ranked)
    return kept & (scores_BHMN != float("-inf"))
