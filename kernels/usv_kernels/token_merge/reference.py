"""Token merging in plain torch. Autograd's own gradients; any floating dtype; the oracle of `token_merge`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._impl import accumulator


def match(
    descriptor_BSC: Tensor, dst: Tensor, tile_starts: Tensor, tile_sizes: Tensor, num_merged: Tensor, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """kept_index (B, S_kept), token_slot (B, S), int64, sizes (B, S_kept) int32; arguments as in `MergeLayout`."""
    merged_BS = _merged_tokens(descriptor_BSC, dst, tile_starts, tile_sizes, num_merged)
    batch, length = merged_BS.shape
    kept_BS = ~merged_BS
    # A stable sort moves kept tokens to the front in ascending order; their number is known, so the cut is static.
    kept_index = torch.argsort(merged_BS.to(torch.uint8), dim=1, stable=True)[:, :num_kept].contiguous()
    own_slot = kept_BS.cumsum(1) - 1
    target = torch.where(kept_BS, torch.arange(length, device=merged_BS.device), dst)
    token_slot = own_slot.gather(1, target)
    ones = torch.ones_like(token_slot, dtype=torch.int32)
    sizes = ones.new_zeros(batch, num_kept).scatter_add_(1, token_slot, ones)
    return kept_index, token_slot, sizes


def _merged_tokens(
    descriptor_BSC: Tensor, dst: Tensor, tile_starts: Tensor, tile_sizes: Tensor, num_merged: Tensor
) -> Tensor:
    """(B, S) bool: in each tile the num_merged src most similar to their dst; ties: the lower position."""
    acc = accumulator(descriptor_BSC.dtype)
    unit = F.normalize(descriptor_BSC.to(acc), dim=-1, eps=1e-12)
    similarity_BS = (unit * unit[:, dst]).sum(-1)
    position = torch.arange(dst.shape[0], device=dst.device)
    similarity_BS = similarity_BS.masked_fill(dst == position, float("-inf"))
    # Two stable sorts, by similarity and then by tile, give each tile's tokens in descending order without padding.
    tile_S = torch.searchsorted((tile_starts + tile_sizes).long(), position, right=True)
    by_similarity = torch.argsort(similarity_BS, dim=1, descending=True, stable=True)
    by_tile = torch.argsort(tile_S[by_similarity], dim=1, stable=True)
    order = by_similarity.gather(1, by_tile)
    rank = position - tile_starts.long()[tile_S]
    first = rank < num_merged.long()[tile_S]
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, first.expand_as(order))


def merge(x_BSC: Tensor, kept_index: Tensor, token_slot: Tensor, sizes: Tensor) -> Tensor:
    """Mean of each kept token and the tokens merged into it: z_dst + sum(z - z_dst) / (1 + count).

    In this form equal tokens give exactly themselves, which a sum followed by a division does not.
    """
    acc = accumulator(x_BSC.dtype)
    x = x_BSC.to(acc)
    kept = x.gather(1, _rows(kept_index, x))
    slot = _rows(token_slot, x)
    total = torch.zeros_like(kept).scatter_add(1, slot, x - kept.gather(1, slot))
    return (kept + total / sizes.to(acc)[..., None]).to(x_BSC.dtype)


def unmerge(update_BKC: Tensor, token_slot: Tensor) -> Tensor:
    return update_BKC.gather(1, _rows(token_slot, update_BKC))


def _rows(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])
