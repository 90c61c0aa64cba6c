"""Proxies: what stands in the softmax for a key block that a row does not list.

    S_in = scale * <q_i, proxy key_n> + log size_n     for a block n that the block of row i does not list
    out_i = (sum of listed tokens exp(S_ij) v_j  +  sum of unlisted blocks exp(S_in) proxy value_n) / (both sums of exp)

With the mean key and value of a block and its number of tokens this is what attention over the block would be if its keys were all
alike; by Jensen's inequality a block never gets more than its mass. With key bias b the size is sum exp(b_j) and the means are
weighted by exp(b_j): then merged tokens count as what they stand for. A block gate belongs to a listed block and leaves proxies alone.
The idea is Sol-Attn's; its blocks are approximated inside the same softmax too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, check_shape, require
from ..block_pool import block_pool
from ..selection import BlockSelection


class BlockProxy(NamedTuple):
    """keys, values: (B, H, N, D) in q's dtype. sizes: (N,) or (B, H or 1, N) floating, how many tokens each stands for, 0 for none
    (its key and value must be finite all the same)."""

    keys: Tensor
    values: Tensor
    sizes: Tensor


def block_proxy(k: Tensor, v: Tensor, selection: BlockSelection, key_bias: Tensor | None = None) -> BlockProxy:
    """The means of the key blocks of a selection, differentiable in k, v and key_bias.

    Args:
        k, v: (B, H, S, D). selection: its key blocks, of any layout.
        key_bias: (B, H or 1, S), as of attention: tokens count exp(key_bias) times.

    Returns: BlockProxy with keys and values in k's dtype, sizes fp32 (fp64 of fp64), (N,) or with a bias (B, H, N).
    """
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    if key_bias is None:
        return BlockProxy(_means(k, selection), _means(v, selection), selection.kv_sizes.to(work))
    weights = key_bias.to(work).exp().expand(k.shape[:3]).unsqueeze(-1)
    mean = _means(weights, selection)  # of the weights
    safe = torch.where(mean == 0, 1.0, mean)
    keys, values = ((_means(x.to(work) * weights, selection) / safe).to(x.dtype) for x in (k, v))
    return BlockProxy(keys, values, mean.squeeze(-1) * selection.kv_sizes)


def _means(x: Tensor, selection: BlockSelection) -> Tensor:
    """(B, H, S, d) -> (B, H, N, d): sums in fp32, 0 for an empty block."""
    starts, sizes = selection.kv_starts, selection.kv_sizes
    if sizes.dim() == 1:
        return block_pool(x, starts, sizes)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Blocks in the order of their tokens, with what lies before each; empty ones last, wherever they claim to begin.
    length = x.shape[2]
    starts, sizes = (y.flatten(0, 1).long() for y in (starts, sizes))
    begin, order = torch.where(sizes > 0, starts, length).sort(dim=-1, stable=True)
    sorted_sizes = sizes.gather(-1, order)
    end = begin + sorted_sizes
    gaps = begin - torch.nn.functional.pad(end[:, :-1], (1, 0))
    runs = torch.stack((gaps, sorted_sizes), -1).flatten(1)
    runs = torch.cat((runs, length - end[:, -1:]), -1)
    sums = torch.segment_reduce(x.to(work).flatten(0, 1).contiguous(), "sum", lengths=runs, axis=1, initial=0.0)[:, 1::2]
    sums = torch.zeros_like(sums).scatter(1, order.unsqueeze(-1).expand_as(sums), sums)
    return (sums / sizes.clamp(min=1).unsqueeze(-1)).view(*x.shape[:2], -1, x.shape[3]).to(x.dtype)


def check_proxy(proxy, q: Tensor, selection: BlockSelection) -> None:
    """Shapes, dtypes and devices; looks at no values."""
    require(isinstance(proxy, tuple) and len(proxy) == 3, "proxy", type(proxy).__name__, "a BlockProxy (keys, values, sizes) or None")
    batch, heads, _, dim = q.shape
    num_kv = selection.num_kv_blocks
    for name, x in zip(("proxy.keys", "proxy.values"), proxy[:2]):
        check_shape(name, x, (batch, heads, num_kv, dim), "(B, H, N, D)")
        require(x.dtype == q.dtype, name, x.dtype, f"q's dtype {q.dtype}")
        require(x.device == q.device, name, x.device, f"q's device {q.device}")
    sizes = proxy[2]
    per_head = sizes.shape[1] if sizes.dim() == 3 and sizes.shape[1] in (1, heads) else heads
    if sizes.dim() != 1:
        check_shape("proxy.sizes", sizes, (batch, per_head, num_kv), "(N,) or (B, H or 1, N)")
    else:
        check_shape("proxy.sizes", sizes, (num_kv,), "(N,) or (B, H or 1, N)")
    require(sizes.dtype in FLOAT_DTYPES, "proxy.sizes", sizes.dtype, "a floating dtype")
    require(sizes.device == q.device, "proxy.sizes", sizes.device, f"q's device {q.device}")


def log_sizes(sizes: Tensor, batch: int, heads: int) -> Tensor:
    """(B, H, N) log of the sizes, -inf where 0, with gradient 0 there; fp32, or fp64 of fp64."""
    sizes = sizes.to(torch.float64 if sizes.dtype == torch.float64 else torch.float32)
    some = sizes > 0
    return torch.where(some, torch.where(some, sizes, 1.0).log(), float("-inf")).expand(batch, heads, sizes.shape[-1])
