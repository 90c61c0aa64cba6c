"""Top-k block choice on the CPU without a full sort, and the lists of a mask.

A score and its block index become one integer of 64 bits whose order is the order of the definition: higher scores first, lower
indices first among equals, NaN highest. Partial selection of distinct integers then needs no rule for ties.
"""

import torch
from torch import Tensor

HIGHEST = 2**31 - 1


def top_k(scores_BHMN: Tensor, num_kept: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Counts (B, H, M) and ascending lists (B, H, M, capacity) of the num_kept highest scores of each row, at most fp32,
    that are not -inf; int32, unused slots hold 0."""
    blocks = scores_BHMN.shape[-1]
    bits = (scores_BHMN.float() + 0.0).view(torch.int32)  # + 0.0: -0 is 0
    # The bits of a float sort as an integer if those below the sign are inverted where the sign is set.
    rank = (bits ^ ((bits >> 31) & HIGHEST)).masked_fill_(scores_BHMN.isnan(), HIGHEST)
    key = (rank.long() << 32).sub_(torch.arange(blocks))
    order = key.topk(num_kept, dim=-1, sorted=False).indices
    order = torch.where(scores_BHMN.gather(-1, order) == float("-inf"), blocks, order).sort(-1).values
    counts = (order < blocks).sum(-1, dtype=torch.int32)
    lists = torch.zeros(*order.shape[:-1], capacity, dtype=torch.int32)
    lists[..., :num_kept] = order.masked_fill_(order == blocks, 0)
    return counts, lists


def compact(mask_BHMN: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Counts (B, H, M) and ascending lists (B, H, M, capacity) of the True entries, int32; unused slots hold 0."""
    counts = mask_BHMN.sum(-1)
    *row, column = mask_BHMN.nonzero(as_tuple=True)
    lists = torch.zeros(*mask_BHMN.shape[:-1], capacity, dtype=torch.int32)
    first = counts.flatten().cumsum(0) - counts.flatten()
    slot = torch.arange(column.shape[0]) - first.repeat_interleave(counts.flatten())
    lists[(*row, slot)] = column.to(torch.int32)
    return counts.to(torch.int32), lists
