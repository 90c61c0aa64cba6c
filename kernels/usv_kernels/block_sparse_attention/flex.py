"""FlexAttention as a second oracle: the same logits through torch's own block-sparse kernel.

Slow to set up (a compiled kernel for each shape) and, on a CPU, without a backward in torch 2.11 to 2.13: differentiable
inputs are refused there rather than silently detached.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from .._checks import require
from ..selection import BlockSelection
from .reference import pair_logits, token_blocks


def attend(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, key_bias: Tensor | None,
           block_gate: Tensor | None, scale: float, block_size: int = 128, compile: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same arguments and results as the public function; `compile` runs FlexAttention's fused kernel."""
    inputs = [x for x in (q, k, v, key_bias, block_gate) if x is not None]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    require(not (differentiable and q.device.type == "cpu"), "impl", "'flex' with inputs that require gradients on a CPU",
            "impl='cpu', or torch.no_grad(): FlexAttention has no CPU backward")  # fmt: skip
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    pairs = pair_logits(selection, block_gate, torch.float32)
    q_block = token_blocks(selection.q_starts, selection.q_sizes, q_len).expand(batch, heads, q_len).contiguous()
    kv_block = token_blocks(selection.kv_starts, selection.kv_sizes, kv_len).expand(batch, heads, kv_len).contiguous()
    bias = torch.zeros(batch, 1, kv_len, device=q.device) if key_bias is None else key_bias.float()
    bias = bias.expand(batch, heads, kv_len).contiguous()

    def listed(b, h, i, j):
        return pairs[b, h, q_block[b, h, i], kv_block[b, h, j]] > float("-inf")

    def score(s, b, h, i, j):
        return s + pairs[b, h, q_block[b, h, i], kv_block[b, h, j]] + bias[b, h, j]

    mask = create_block_mask(listed, batch, heads, q_len, kv_len, device=q.device, BLOCK_SIZE=block_size)
    plain = key_bias is None and block_gate is None
    run = torch.compile(flex_attention, dynamic=False) if compile else flex_attention
    out, aux = run(q, k, v, score_mod=None if plain else score, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse
