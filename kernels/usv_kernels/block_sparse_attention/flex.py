"""FlexAttention as a second oracle: the same logits through torch's own block-sparse kernel.

Slow to set up (a compiled kernel for each shape) and, on a CPU, without a backward in torch 2.11 to 2.13: differentiable
inputs are refused there rather than silently detached.
"""

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from .._checks import require
from ..selection import BlockSelection, regular_tile
from .reference import pair_logits, token_blocks


def attend(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, key_bias: Tensor | None,
           block_gate: Tensor | None, scale: float, block_size: int = 128) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same arguments and results as the public function."""
    _refuse_cpu_gradients(q, k, v, key_bias, block_gate)
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
    out, aux = flex_attention(q, k, v, score_mod=None if plain else score, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def _refuse_cpu_gradients(*tensors: Tensor | None) -> None:
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    require(not (differentiable and tensors[0].device.type == "cpu"), "impl", "'flex' with inputs that require gradients on a CPU",
            "impl='cpu', or torch.no_grad(): FlexAttention has no CPU backward")  # fmt: skip


@cache
def compiled():
    """FlexAttention's fused kernel; it compiles once a shape."""
    if torch.cuda.is_available():
        offer_small_tiles()
    return torch.compile(flex_attention, dynamic=False)


def offer_small_tiles() -> None:
    """Adds backward tiles of 64 to those that the compiler chooses from, in every thread of this process: autograd compiles in its own.

    On Hopper it has only some of 128, and leaves out all that do not divide a block before it looks at kernel_options: a
    backward for blocks of 64 would not compile (torch 2.11 to 2.13).
    """
    from torch._inductor.choices import InductorChoices

    plain = InductorChoices.get_flex_attention_bwd_configs

    def with_small_tiles(self, *arguments, **named):
        small = SimpleNamespace(block_m1=64, block_n1=64, block_m2=64, block_n2=64, num_stages=2, num_warps=4)
        return [*plain(self, *arguments, **named), small]

    InductorChoices.get_flex_attention_bwd_configs = with_small_tiles


def block_mask(selection: BlockSelection, block: int, q_len: int, kv_len: int) -> BlockMask:
    """The same lists as FlexAttention wants them, for blocks of `block` tokens that follow each other; the last may have fewer.

    ValueError for others.
    """
    s = selection
    for name, starts, sizes, length in (("q_sizes", s.q_starts, s.q_sizes, q_len), ("kv_sizes", s.kv_starts, s.kv_sizes, kv_len)):
        regular = regular_tile(starts, sizes, length) == block
        require(regular, name, "other blocks", f"consecutive blocks of {block} tokens, the last of what is left of {length}")
    counts, lists = selection.kv_num_blocks, selection.kv_indices
    full = lists.new_zeros(*lists.shape[:3], selection.num_kv_blocks)
    full[..., : lists.shape[3]] = torch.where(torch.arange(lists.shape[3], device=lists.device) < counts[..., None], lists, 0)
    none = torch.zeros_like(counts), torch.zeros_like(full)
    both = torch.is_grad_enabled()  # the lists of its backward take longer than those of its forward
    return BlockMask.from_kv_blocks(*none, counts.contiguous(), full, BLOCK_SIZE=block, seq_lengths=(q_len, kv_len), compute_q_blocks=both)


def attend_compiled(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse by the fused kernel, without bias and gates; see `block_mask` for what blocks it takes.

    On a CPU that kernel has no lse (torch 2.13): NaN everywhere.
    """
    _refuse_cpu_gradients(q, k, v)
    block = int(selection.q_sizes.flatten()[0])
    mask = block_mask(selection, block, q.shape[2], k.shape[2])
    if q.device.type == "cpu":
        return compiled()(q, k, v, block_mask=mask, scale=scale), q.new_full(q.shape[:3], float("nan"), dtype=torch.float32)
    out, aux = compiled()(q, k, v, block_mask=mask, scale=scale, kernel_options=kernel_options(q, block), return_aux=AuxRequest(lse=True))
    return out, aux.lse


def kernel_options(q: Tensor, block: int) -> dict | None:
    """On a GPU its own tiles (128 rows) would refuse blocks of 64, so tiles of the block's size, in both passes; of 64 rows with the four
    warps that share them (its own eight would compute them twice, `triton_launch`)."""
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    warps = {"fwd_num_warps": 4, "bwd_num_warps": 4} if block <= 64 else {}
    return dict.fromkeys(names, block) | warps if q.is_cuda else None
