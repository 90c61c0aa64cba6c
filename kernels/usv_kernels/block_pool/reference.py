"""Block means in plain torch: every token is added to the block that owns it. Autograd's own gradient."""

import torch
from torch import Tensor

from .._impl import accumulator


def block_pool(x_BHSD: Tensor, starts_M: Tensor, sizes_M: Tensor) -> Tensor:
    batch, heads, length, dim = x_BHSD.shape
    blocks, acc = starts_M.shape[0], accumulator(x_BHSD.dtype)
    token_S = torch.arange(length, device=x_BHSD.device)
    inside_MS = (token_S >= starts_M[:, None]) & (token_S < (starts_M + sizes_M)[:, None])
    # Tokens of no block go to an extra block that is cut off again, so that an inf or NaN there stays there.
    outside_S = ~inside_MS.any(0)
    owner_S = torch.cat([inside_MS, outside_S[None]]).to(torch.uint8).argmax(0)
    total = x_BHSD.new_zeros(batch, heads, blocks + 1, dim, dtype=acc).index_add(2, owner_S, x_BHSD.to(acc))
    return (total[:, :, :blocks] / sizes_M.clamp(min=1).to(acc)[:, None]).to(x_BHSD.dtype)
