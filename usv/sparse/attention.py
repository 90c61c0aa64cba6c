"""The one sparse attention: coarse -> select -> fine -> gate, on tokens in tile-major order.

    q_c, k_c, v_c = mean of each block          scores = q_c k_cᵀ / √D         coarse = softmax(scores) v_c
    fine = exact attention over the num_kept best-scored blocks of each row    out = fine + gate ⊙ coarse
           (or over as many as hold a share `mass` of the coarse map: the input says how many)

Gate is a projection of the block's input, zero at first, so training starts as plain block-sparse attention and at full
density as exact dense attention. Selection has no gradient; the coarse branch gives q and k theirs. Source: VSA
(arXiv 2505.13389). Shape letters: B batch, H heads, S tokens, D head width, M blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from usv_kernels import BlockSelection, block_pool, block_sparse_attention, select_top_k

from usv.sparse.joint import Text, list_text, text_rows
from usv.sparse.sequence_parallel import SequenceGroup, gather_heads, own_heads

# Another fine branch: (q, k, v, density, key_bias or None), as below, -> (out, executed density). See `usv.patterns.planned`.
Fine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None], tuple[torch.Tensor, float]]


@dataclass(frozen=True)
class AttentionStats:
    """Detached measurements of one call, each a 0-d tensor.

    entropy: of the coarse attention map, 0 (one block) to 1 (uniform), mean over rows and heads.
    coarse_recall: share of the coarse map's mass on selected blocks, the cheap stand-in for attention recall; NaN where
        another fine branch chose.
    density: executed block pairs / all block pairs.
    """

    entropy: torch.Tensor
    coarse_recall: torch.Tensor
    density: torch.Tensor


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    sizes: torch.Tensor,
    num_kept: int,
    gate: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    impl: str = "auto",
    fine: Fine | None = None,
    largest: int = 0,
    mass: float = 0.0,
    text: Text | None = None,
    group: SequenceGroup | None = None,
) -> tuple[torch.Tensor, AttentionStats]:
    """Sparse self-attention over blocks.

    Args:
        q, k, v: (B, H, S, D) in tile-major order, after norm and RoPE.
        starts, sizes: (M,) int32, the blocks.
        num_kept: key blocks per query block, 1..M.
        gate: (B, H, S, 1), weight of the coarse branch; None leaves it out.
        key_bias: (B, 1, S), e.g. log(size) of merged tokens.
        impl: how the kernel runs.
        fine: runs instead of selection and fine branch, at the density num_kept / M; the coarse branch stays.
        largest: bound on sizes that the host knows (`BlockSelection.q_max`): the GPU kernel then takes its flat loop. 0: none.
        mass: above 0, the best blocks of all rows and heads of a sample together are kept until they hold this share of its coarse map, at
            least one a row, instead of num_kept of every row (`kept_of_mass`).
        text: joint attention: q, k, v are (B, H, T + S, D) with these tokens of text, which every row of the video lists whole and whose
            rows are dense (`usv.sparse.joint`); blocks, gate and key_bias are of the video.
        group: processes that have the other heads of these samples, which `mass` counts too.

    Returns:
        the shape of q and the statistics.
    """
    if text is not None:
        return _joint(q, k, v, starts, sizes, num_kept, gate, key_bias, impl, fine, largest, mass, text, group)
    scores = _coarse_scores(q, k, starts, sizes)
    coarse_map = scores.float().softmax(-1)
    if fine is None:
        selection = _select(scores, num_kept, mass, (starts, sizes, starts, sizes), largest, group)
        out, _ = block_sparse_attention(q, k, v, selection, key_bias=key_bias, impl=impl)
        stats = _stats(coarse_map.detach(), selection, uniform=not mass)
    else:
        out, density = fine(q, k, v, num_kept / len(sizes), key_bias)
        stats = AttentionStats(_entropy(coarse_map.detach()), torch.tensor(math.nan), torch.tensor(density))
    if gate is not None:
        out = _add_coarse(out, coarse_map, v, gate, starts, sizes)
    return out, stats


def _joint(q, k, v, starts, sizes, num_kept, gate, key_bias, impl, fine, largest, mass, text: Text, group) -> tuple[torch.Tensor, AttentionStats]:
    """`sparse_attention` of a joint sequence."""
    if fine is not None:
        raise ValueError("fine: another fine branch (a pattern's blocks beside a student) does not run in joint attention or with tokens beside the grid; accepted: None, the student's own")
    q_v, k_v, v_v = (text.video(x) for x in (q, k, v))
    scores = _coarse_scores(q_v, k_v, starts, sizes)
    coarse_map = scores.float().softmax(-1)
    selection = _select(scores, num_kept, mass, (starts, sizes, starts, sizes), largest, group)
    if key_bias is not None:
        key_bias = text.join(key_bias, key_bias.new_zeros(*key_bias.shape[:2], text.num))
    columns = text.with_columns(key_bias, q_v.shape[2], len(q))
    out, _ = block_sparse_attention(q_v, k, v, list_text(selection, text, q_v.shape[2]), key_bias=columns, impl=impl)
    if gate is not None:
        out = _add_coarse(out, coarse_map, v_v, gate, starts, sizes)
    out = text.join(out, text_rows(q, k, v, text, key_bias))
    return out, _stats(coarse_map.detach(), selection, uniform=not mass)


def _select(scores: torch.Tensor, num_kept: int, mass: float, layout, largest: int, group: SequenceGroup | None) -> BlockSelection:
    if mass:
        every = scores.detach() if group is None else gather_heads(scores.detach(), group)  # the share is one over all heads
        kept = kept_of_mass(every, mass)
        return select_top_k(scores, kept if group is None else own_heads(kept, group), *layout, q_max=largest, kv_max=largest)
    return select_top_k(scores, num_kept, *layout, q_max=largest, kv_max=largest)


def kept_of_mass(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """(B, H, M, N) coarse scores -> (B, H, M) int32: blocks that each row keeps.

    One threshold on a block's share of its row, the same in all rows and heads of a sample, such that what lies above it holds `mass` of
    the coarse map. Of all choices of so many blocks that one holds most. A share kept in every row (top-p) takes blocks from
    concentrated heads, where each holds much, for diffuse ones, where it holds little: at equal density less is kept. Of equal shares
    those come first that are first in their rows.
    """
    batch, heads, rows, blocks = scores.shape
    share = scores.float().softmax(-1).sort(-1, descending=True).values
    flat, order = share.view(batch, heads * rows, blocks).transpose(1, 2).flatten(1).sort(dim=-1, descending=True, stable=True)
    held = flat.cumsum(-1, dtype=torch.float64) / (heads * rows)
    kept = held - flat / (heads * rows) < mass - 1e-7  # what lies before it does not hold the share yet
    counts = torch.zeros(batch, heads * rows, dtype=torch.int32, device=scores.device)
    counts.scatter_add_(1, order % (heads * rows), kept.to(torch.int32))
    return counts.clamp_min_(1).view(batch, heads, rows)


def _coarse_scores(q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    q_c, k_c = (block_pool(x, starts, sizes) for x in (q, k))
    return q_c @ k_c.transpose(-1, -2) / math.sqrt(q.shape[-1])


def _add_coarse(out, coarse_map, v, gate, starts, sizes) -> torch.Tensor:
    """out + gate ⊙ coarse, each block's coarse row given to its tokens."""
    coarse = coarse_map.to(v.dtype) @ block_pool(v, starts, sizes)
    return torch.addcmul(out, gate, coarse.repeat_interleave(sizes.long(), dim=2, output_size=v.shape[2]))


def _entropy(coarse_map: torch.Tensor) -> torch.Tensor:
    entropy = -(coarse_map * coarse_map.clamp_min(1e-12).log()).sum(-1).mean()
    return entropy / math.log(max(coarse_map.shape[-1], 2))


def _stats(coarse_map: torch.Tensor, selection: BlockSelection, uniform: bool) -> AttentionStats:
    """uniform: every slot is used, which the host knows without asking a GPU."""
    num_blocks = coarse_map.shape[-1]
    kept = coarse_map.gather(-1, selection.kv_indices.long())
    if uniform:
        density = torch.tensor(selection.capacity / num_blocks)
    else:
        kept = kept * (torch.arange(selection.capacity, device=kept.device) < selection.kv_num_blocks.unsqueeze(-1))
        density = selection.kv_num_blocks.float().mean() / num_blocks
    return AttentionStats(_entropy(coarse_map), kept.sum(-1).mean(), density)


@torch.no_grad()
def attention_recall(q: torch.Tensor, k: torch.Tensor, selection: BlockSelection, rows: int = 64) -> torch.Tensor:
    """Share of the dense attention mass that a selection keeps, from `rows` evenly spaced query rows (0-d tensor).

    For sampled rows the dense probabilities are formed in full (B, H, rows, S), never S × S. Blocks must be shared (M,).
    """
    length = q.shape[2]
    index = torch.linspace(0, length - 1, min(rows, length), device=q.device).long()
    probs = (q[:, :, index].float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    block_of = torch.repeat_interleave(selection.q_sizes.long())
    mask = selection.to_mask()[:, :, block_of[index]]  # (B, H, rows, N)
    keep = mask.repeat_interleave(selection.kv_sizes.long(), dim=-1, output_size=k.shape[2])
    return (probs * keep).sum(-1).mean()
