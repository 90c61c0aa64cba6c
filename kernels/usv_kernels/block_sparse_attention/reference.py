"""The definition in plain torch: every logit is written out, any dtype up to fp64, any device, autograd for gradients.

    S_ij = scale * <q_i, k_j> + key_bias_j + block_gate(block of i, block of j)   if that pair of blocks is listed
    lse_i = log sum_j exp S_ij,   out_i = sum_j exp(S_ij - lse_i) v_j

With proxies (`proxy`) the blocks that are not listed are further columns. Needs O(Sq * Sk) memory: it is the oracle of the tests, not a way to run a model.
"""

import torch
from torch import Tensor

from .._impl import outside_autocast
from ..selection import BlockSelection
from .low_precision import FP8_TOP, add_mean_key, as_float, low_inputs


def token_blocks(starts: Tensor, sizes: Tensor, length: int) -> Tensor:
    """(..., S) long: the block each token lies in, or the number of blocks where it lies in none."""
    token = torch.arange(length, device=starts.device)
    inside = (token >= starts.unsqueeze(-1)) & (token < (starts + sizes).unsqueeze(-1))
    index = torch.arange(starts.shape[-1], device=starts.device).unsqueeze(-1)
    return torch.where(inside, index, starts.shape[-1]).amin(-2) if starts.shape[-1] else token * 0


def pair_logits(selection: BlockSelection, block_gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, H, M + 1, N + 1): the gate of a listed pair (0 without gates), -inf of all others; the last row and column
    belong to tokens outside every block."""
    batch, heads, num_q, _ = selection.kv_indices.shape
    num_kv = selection.num_kv_blocks
    used = selection.used_slots()
    gate = torch.zeros(used.shape, dtype=dtype, device=used.device) if block_gate is None else block_gate.to(dtype)
    target = torch.where(used, selection.kv_indices, num_kv).long()
    values = torch.where(used, gate, float("-inf"))
    closed = torch.full((batch, heads, num_q, num_kv + 1), float("-inf"), dtype=dtype, device=used.device)
    logits = closed.scatter(-1, target, values)
    return torch.nn.functional.pad(logits, (0, 0, 0, 1), value=float("-inf"))


@outside_autocast
def attend(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, key_bias: Tensor | None,
           block_gate: Tensor | None, scale: float, proxy: tuple[Tensor, ...] | None = None, qk_dtype: torch.dtype | None = None,
           pv_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same arguments and results as the public function, but a proxy's log sizes (B, H, N); half precision is computed in fp32,
    fp64 in fp64, and low precision has the roundings of `low_precision` alone."""
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    pairs = pair_logits(selection, block_gate, dtype)
    q_block = token_blocks(selection.q_starts, selection.q_sizes, q_len).expand(batch, heads, q_len)
    kv_block = token_blocks(selection.kv_starts, selection.kv_sizes, kv_len).expand(batch, heads, kv_len)
    rows = pairs.gather(2, q_block.unsqueeze(-1).expand(-1, -1, -1, pairs.shape[-1]))
    bias = rows.gather(3, kv_block.unsqueeze(2).expand(-1, -1, q_len, -1))
    if key_bias is not None:
        bias = bias + key_bias.to(dtype).unsqueeze(2)
    low = None if qk_dtype is None else low_inputs(q.to(dtype), k.to(dtype), v.to(dtype), selection.tensors(), qk_dtype, pv_dtype)
    queries, keys = (q.to(dtype), k.to(dtype)) if low is None else (as_float(low.q), as_float(low.k))
    s = queries @ keys.transpose(-1, -2) * scale + bias
    values = v.to(dtype) if pv_dtype is None else as_float(low.v)
    if proxy is not None:
        proxy_keys, proxy_values, log_size = (x.to(dtype) for x in proxy)
        closed = torch.nn.functional.pad(selection.to_mask(), (0, 0, 0, 1), value=True)  # the last row: of tokens outside every block
        closed = closed.gather(2, q_block.unsqueeze(-1).expand(-1, -1, -1, closed.shape[-1]))
        approximated = q.to(dtype) @ proxy_keys.transpose(-1, -2) * scale + log_size.unsqueeze(2)
        s = torch.cat((s, approximated.masked_fill(closed, float("-inf"))), -1)
        values = torch.cat((values, proxy_values), 2)

    # Rows without any finite logit give out = 0 and lse = -inf with zero gradients, not NaN.
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((batch, heads, q_len, 1), float("-inf"))
    top = torch.where(top == float("-inf"), 0.0, top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    if pv_dtype is not None:
        p = (p * FP8_TOP).to(pv_dtype).to(dtype) / FP8_TOP
    out = (p / safe) @ values
    lse = torch.where(empty, float("-inf"), top + safe.log()).squeeze(-1)
    lse = lse if low is None else add_mean_key(lse, q, low.mean, scale)
    return out.to(q.dtype), lse
