"""Top-k block choice on the CPU without a full sort: the k-th score is a threshold, ties at it go to lower indices."""

import torch
from torch import Tensor


def top_k_mask(scores_BHMN: Tensor, num_kept: int) -> Tensor:
    """True for the num_kept highest scores of each row that are not -inf; one count for all rows."""
    values, order = scores_BHMN.topk(num_kept, dim=-1, sorted=False)
    threshold = values.amin(-1, keepdim=True)
    kept = torch.zeros_like(scores_BHMN, dtype=torch.bool).scatter_(-1, order, True)
    # topk breaks ties arbitrarily: where more blocks equal the threshold than fit, the row is decided again by index.
    tied = scores_BHMN == threshold
    rows = (tied & ~kept).any(-1)
    if bool(rows.any()):
        above, at = scores_BHMN[rows] > threshold[rows], tied[rows]
        room = num_kept - above.sum(-1, keepdim=True)
        kept[rows] = above | (at & (at.cumsum(-1) <= room))
    # A NaN ranks highest and hides the threshold.
    unclear = threshold.isnan().squeeze(-1)
    if bool(unclear.any()):
        best = scores_BHMN[unclear].argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
        kept[unclear] = torch.zeros_like(kept[unclear]).scatter_(-1, best, True)
    return kept.logical_and_(scores_BHMN != float("-inf"))


def compact(mask_BHMN: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Counts (B, H, M) and ascending lists (B, H, M, capacity) of the True entries, int32; unused slots hold 0."""
    counts = mask_BHMN.sum(-1)
    *row, column = mask_BHMN.nonzero(as_tuple=True)
    lists = torch.zeros(*mask_BHMN.shape[:-1], capacity, dtype=torch.int32)
    first = counts.flatten().cumsum(0) - counts.flatten()
    slot = torch.arange(column.shape[0]) - first.repeat_interleave(counts.flatten())
    lists[(*row, slot)] = column.to(torch.int32)
    return counts.to(torch.int32), lists
