"""Short independent references: token masks by definition, attention with an S × S mask in fp64."""

import torch


def masked_attention(q, k, v, mask):
    """(B, H, S, D) attention in fp64 where mask (broadcastable to (B, H, S, S)) is True; rows without a key give zeros."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0) @ v.double()


def touched_blocks(token_mask, block):
    """(M, M) bool: block pairs with at least one True token pair, by slicing."""
    length = len(token_mask)
    starts = range(0, length, block)
    return torch.tensor([[bool(token_mask[i : i + block, j : j + block].any()) for j in starts] for i in starts])


def spread(block_mask, block, length):
    """(S, S) bool token mask of an (M, M) block mask."""
    return block_mask.repeat_interleave(block, 0)[:length].repeat_interleave(block, 1)[:, :length]


def qkv(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator) * scale for _ in range(3))
