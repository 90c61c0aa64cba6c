"""Plan of the CPU path: which query rows and which tokens of their lists are batched into one set of products.

Letters as in `cpu.py`: G = B * H, n items of a batch, p query rows of an item, L tokens of its list, c slots of its list.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..selection import regular_tile

# Score elements per batch and thread: 512 KB in fp32, so that scores and gathered tiles stay in the caches of a core.
BATCH_ELEMENTS = 1 << 17
# Longest run of query rows in one work item; longer blocks are split, which bounds the score matrix.
MAX_ROWS = 256
# Padding a batch may cost this factor in token pairs, or this many pairs a batch: about what its calls cost anyway.
PADDING_FACTOR, PADDING_PAIRS = 1.15, 100_000


@dataclass
class Part:
    """Batches that share no key with those of other parts, so that their dK and dV can be summed in a buffer of their size."""

    first: int  # first unit of the key side, and how many
    count: int
    batches: list  # [(first item, last item + 1)], items being sorted


@dataclass
class Layout:
    """Work items of one call. In tile mode a gathered unit is a whole tile, otherwise one token (tile 1 x 1)."""

    lists: Tensor  # (G * M, K) long, global unit or block index of each slot
    counts: Tensor  # (G * M,) long
    row_list: Tensor  # (items,) long: which list an item uses
    parts: list[Part]
    q_tile: int
    kv_tile: int
    num_q: int
    num_kv: int
    q_start: Tensor | None = None  # token mode: (items,) global first query row and number of rows
    q_size: Tensor | None = None
    kv_start: Tensor | None = None  # token mode: (G * N,) global first token and number of tokens of each key block
    kv_size: Tensor | None = None
    kv_rest: int = 0  # tile mode: valid tokens of a partial last key tile, 0 if it is full
    uniform: int = 0  # tile mode: the count all items share, in which case they are the query tiles in order


def _group(p: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, list]:
    """Sorts items by size and cuts them into batches whose padding stays small. Items without tokens are dropped."""
    order = np.lexsort((tokens, np.ceil(np.log2(np.maximum(p, 1)) * 4)))
    order = order[(p[order] > 0) & (tokens[order] > 0)]
    batches, first, real, top_p, top_l = [], 0, 0, 0, 0
    limit = BATCH_ELEMENTS * torch.get_num_threads()
    for i, (rows, length) in enumerate(zip(p[order].tolist(), tokens[order].tolist(), strict=True)):
        new_p, new_l, number = max(top_p, rows), max(top_l, length), i - first + 1
        padded, new_real = new_p * new_l * number, real + rows * length
        wasteful = padded > PADDING_FACTOR * new_real and padded - new_real > PADDING_PAIRS
        if number > 1 and (padded > limit or wasteful):
            batches.append((first, i))
            first, real, top_p, top_l = i, rows * length, rows, length
        else:
            real, top_p, top_l = new_real, new_p, new_l
    if len(order) > first:
        batches.append((first, len(order)))
    return order, batches


def make_plan(selection_tensors: tuple[Tensor, ...], q_len: int, kv_len: int) -> Layout:
    kv_num_blocks, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes = selection_tensors
    batch, heads, num_q, capacity = kv_indices.shape
    groups, num_kv = batch * heads, kv_sizes.shape[-1]
    counts = kv_num_blocks.reshape(-1).long()
    offset = torch.arange(groups).repeat_interleave(num_q).unsqueeze(-1) * num_kv
    lists = kv_indices.reshape(-1, capacity).long() + offset
    q_tile, kv_tile = regular_tile(q_starts, q_sizes, q_len), regular_tile(kv_starts, kv_sizes, kv_len)
    if q_tile and kv_tile and q_tile <= MAX_ROWS:
        lowest, highest = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
        layout = Layout(lists, counts, torch.arange(groups * num_q), [], q_tile, kv_tile, num_q, num_kv, kv_rest=kv_len % kv_tile)
        if lowest == highest > 0:
            threads = torch.get_num_threads()
            # However long the lists, an item for each thread: one product shared by threads is slower than one product each.
            step = max(threads, BATCH_ELEMENTS * threads // (q_tile * highest * kv_tile))
            together = max(1, step // num_q)  # heads of a part
            for group in range(0, groups, together):
                last = min(group + together, groups)
                batches = [(i, min(i + step, last * num_q)) for i in range(group * num_q, last * num_q, step)]
                layout.parts.append(Part(group * num_kv, (last - group) * num_kv, batches))
            layout.uniform, layout.lists = highest, lists[:, :highest].contiguous()
        else:
            tokens = (counts * kv_tile).numpy()
            order, batches = _group(np.full(len(counts), q_tile), tokens)
            layout.parts = [Part(0, groups * num_kv, batches)]
            layout.row_list = torch.from_numpy(order)
        return layout
    return _plan_tokens(lists, counts, selection_tensors, q_len, kv_len)


def _plan_tokens(lists, counts, selection_tensors, q_len: int, kv_len: int) -> Layout:
    _, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes = selection_tensors
    batch, heads, num_q, capacity = kv_indices.shape
    num_kv = kv_sizes.shape[-1]

    def flat(x: Tensor, stride: int) -> Tensor:
        base = torch.arange(batch * heads).unsqueeze(-1) * stride
        return (x.expand(batch, heads, x.shape[-1]).reshape(batch * heads, -1).long() + base).reshape(-1)

    q_start, q_size, kv_start, kv_size = flat(q_starts, q_len), flat(q_sizes, 0), flat(kv_starts, kv_len), flat(kv_sizes, 0)
    # Split long query blocks: piece j of a block has rows j * MAX_ROWS and on.
    pieces = (q_size + MAX_ROWS - 1) // MAX_ROWS
    row_list = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
    first_piece = (pieces.cumsum(0) - pieces)[row_list]
    shift = (torch.arange(len(row_list)) - first_piece) * MAX_ROWS
    start, size = q_start[row_list] + shift, (q_size[row_list] - shift).clamp(max=MAX_ROWS)
    used = torch.arange(capacity) < counts.unsqueeze(-1)
    tokens = torch.where(used, kv_size[torch.where(used, lists, 0)], 0).sum(-1) if num_kv else counts * 0
    order, batches = _group(size.numpy(), tokens[row_list].numpy())
    order = torch.from_numpy(order)
    parts = [Part(0, batch * heads * kv_len, batches)]
    return Layout(lists, counts, row_list[order], parts, 1, 1, num_q, num_kv, start[order], size[order], kv_start, kv_size)


@dataclass
class Batch:
    """Indices of one batch of work items; None where a mask or a gather is not needed."""

    lists: Tensor  # (n,) which lists
    q_index: Tensor | slice  # units of the query side: (n,) tiles or (n * p,) tokens
    kv_index: Tensor  # (n * units,) units of the key side
    slot: Tensor | None  # (n, L) slot of each token, None in tile mode
    invalid: Tensor | None  # (n, L) padding tokens
    q_invalid: Tensor | None  # (n, p) padding rows
    shape: tuple[int, int, int]  # n, p, L
    slots: int  # c


def _runs(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, c) runs -> (n, L) token of each position, its run, and whether it is padding. Padding repeats the last
    token of the item, so that nothing outside its list is ever touched."""
    end = size.cumsum(-1)
    total = end[:, -1:]
    position = torch.arange(int(total.max())).expand(len(start), -1)
    invalid = position >= total
    position = torch.minimum(position, total - 1).contiguous()
    run = torch.searchsorted(end, position, right=True)
    return start.gather(1, run) + position - (end - size).gather(1, run), run, invalid


def make_batch(layout: Layout, first: int, last: int) -> Batch:
    lists, n = layout.row_list[first:last], last - first
    if slots := layout.uniform:
        index, unused, q_index = layout.lists[first:last], None, slice(first, last)
    else:
        counts, q_index, unused = layout.counts[lists], lists, None
        slots = int(counts.max())
        index = layout.lists[lists, :slots]
        if int(counts.min()) != slots:
            unused = torch.arange(slots) >= counts.unsqueeze(-1)
            index = torch.where(unused, index.gather(1, counts.unsqueeze(-1) - 1), index)
    if layout.q_start is not None:
        size = layout.kv_size[index] if unused is None else torch.where(unused, 0, layout.kv_size[index])
        token, slot, invalid = _runs(layout.kv_start[index], size)
        query, _, q_invalid = _runs(layout.q_start[first:last, None], layout.q_size[first:last, None])
        shape = (n, query.shape[1], token.shape[1])
        invalid, q_invalid = (x if bool(x.any()) else None for x in (invalid, q_invalid))
        return Batch(lists, query.reshape(-1), token.reshape(-1), slot, invalid, q_invalid, shape, slots)
    tile = layout.kv_tile
    invalid = None if unused is None else unused.repeat_interleave(tile, 1)
    if layout.kv_rest:
        partial = index % layout.num_kv == layout.num_kv - 1
        if bool(partial.any()):
            tail = (partial.unsqueeze(-1) & (torch.arange(tile) >= layout.kv_rest)).reshape(n, -1)
            invalid = tail if invalid is None else invalid | tail
    return Batch(lists, q_index, index.reshape(-1), None, invalid, None, (n, layout.q_tile, slots * tile), slots)
