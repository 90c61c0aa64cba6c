"""Plan of the CPU path: which query rows and which tokens of their lists are batched into one set of products.

Letters as in `cpu.py`: G = B * H, n items of a batch, p query rows of an item, L tokens of its list, c slots of its list.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..selection import regular_tile

# Score elements per batch and thread: 512 KB in fp32, so that scores and gathered tiles stay in the caches of a core.
BATCH_ELEMENTS = 1 << 17
# Longest run of query rows in one work item; longer blocks are split, and long lists are walked in pieces, which bounds the score matrix.
MAX_ROWS = 256
PIECE_ELEMENTS = 1 << 18
# Query rows whose batches are converted, divided and written together, and meet a head's proxies in one product.
RUN_ROWS = 512
# Padding a batch may cost this factor in token pairs, or this many pairs a batch: about what its calls cost anyway.
PADDING_FACTOR, PADDING_PAIRS = 1.15, 100_000
# Heads are summed apart where one has work for so many batches: the last of each, which is not full, then costs little.
PART_BATCHES = 16


@dataclass
class Part:
    """Batches of some of the G heads, which share no key with other parts: dK and dV can be summed in a buffer of their size."""

    heads: slice
    batches: list  # [(first item, last item + 1)], items being sorted


@dataclass
class Layout:
    """Work items of one call. In tile mode a batch that lists only whole tiles gathers tiles; all others tokens (tile 1 x 1)."""

    lists: Tensor  # (G * M, K) long, global block index of each slot
    counts: Tensor  # (G * M,) long
    row_list: Tensor  # (items,) long: which list an item uses
    parts: list[Part]
    q_tile: int
    kv_tile: int
    q_len: int
    kv_len: int
    num_q: int
    num_kv: int
    q_start: Tensor | None = None  # token mode: (items,) global first query row and number of rows
    q_size: Tensor | None = None
    kv_start: Tensor | None = None  # token mode: (G * N,) global first token and number of tokens of each key block
    kv_size: Tensor | None = None
    kv_first: Tensor | None = None  # tile mode with a partial last tile: (G * N,) global first token of each key tile
    partial: np.ndarray | None = None  # and (G * M,) which lists have the partial one
    uniform: int = 0  # tile mode: the count all items share, in which case they are the query tiles in order

    @property
    def q_unit(self) -> int:
        """Query rows that are read and written together: a tile, or single ones where the last tile of a head is partial."""
        return 1 if self.q_len % self.q_tile else self.q_tile


def _group(p: np.ndarray, tokens: np.ndarray, empty: bool) -> tuple[np.ndarray, list]:
    """Sorts items by size and cuts them into batches whose padding stays small. Items without tokens are dropped, or batched apart
    from all others if `empty`."""
    order = np.lexsort((tokens, np.ceil(np.log2(np.maximum(p, 1)) * 4)))
    order = order[(p[order] > 0) & ((tokens[order] > 0) | empty)]
    batches, first, real, top_p, top_l = [], 0, 0, 0, 0
    limit = BATCH_ELEMENTS * torch.get_num_threads()
    for i, (rows, length) in enumerate(zip(p[order].tolist(), tokens[order].tolist(), strict=True)):
        new_p, new_l, number = max(top_p, rows), max(top_l, length), i - first + 1
        padded, new_real = new_p * new_l * number, real + rows * length
        wasteful = padded > PADDING_FACTOR * new_real and padded - new_real > PADDING_PAIRS
        if number > 1 and (padded > limit or wasteful or (top_l == 0) != (length == 0)):
            batches.append((first, i))
            first, real, top_p, top_l = i, rows * length, rows, length
        else:
            real, top_p, top_l = new_real, new_p, new_l
    if len(order) > first:
        batches.append((first, len(order)))
    return order, batches


def _parts(p: np.ndarray, tokens: np.ndarray, head: np.ndarray, groups: int, apart: bool) -> tuple[np.ndarray, list[Part]]:
    """Sorts items of `groups` heads into parts of as few heads as are worth it, or of one (`make_plan`)."""
    pairs = int((p * tokens).sum()) // max(groups, 1)
    together = max(1, PART_BATCHES * BATCH_ELEMENTS * torch.get_num_threads() // max(pairs, 1)) if not apart else 1
    orders, parts, done = [np.zeros(0, np.int64)], [], 0
    for first in range(0, groups, together):
        last = min(first + together, groups)
        here = np.flatnonzero((head >= first) & (head < last))
        order, batches = _group(p[here], tokens[here], apart)
        parts.append(Part(slice(first, last), [(done + i, done + j) for i, j in batches]))
        orders.append(here[order])
        done += len(order)
    return np.concatenate(orders), parts


def make_plan(selection_tensors: tuple[Tensor, ...], q_len: int, kv_len: int, apart: bool = False) -> Layout:
    """apart: for proxies, which belong to a head and are there for empty lists too: a batch has queries of one head, and none is dropped."""
    kv_num_blocks, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes = selection_tensors
    batch, heads, num_q, capacity = kv_indices.shape
    groups, num_kv = batch * heads, kv_sizes.shape[-1]
    counts = kv_num_blocks.reshape(-1).long()
    offset = torch.arange(groups).repeat_interleave(num_q).unsqueeze(-1) * num_kv
    lists = kv_indices.reshape(-1, capacity).long() + offset
    q_tile, kv_tile = regular_tile(q_starts, q_sizes, q_len), regular_tile(kv_starts, kv_sizes, kv_len)
    if q_tile and kv_tile and q_tile <= MAX_ROWS:
        lowest, highest = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
        layout = Layout(lists, counts, torch.arange(groups * num_q), [], q_tile, kv_tile, q_len, kv_len, num_q, num_kv)
        if kv_len % kv_tile:
            tiles = torch.arange(groups * num_kv)
            layout.kv_first = tiles // num_kv * kv_len + tiles % num_kv * kv_tile
            used = torch.arange(capacity) < counts.unsqueeze(-1)
            layout.partial = ((lists % num_kv == num_kv - 1) & used).any(-1).numpy()
        if lowest == highest > 0:
            threads = torch.get_num_threads()
            # However long the lists, an item for each thread: one product shared by threads is slower than one product each.
            step = max(threads, BATCH_ELEMENTS * threads // (q_tile * highest * kv_tile))
            together = max(1, step // num_q) if not apart else 1  # heads of a part
            for group in range(0, groups, together):
                last = min(group + together, groups)
                batches = [(i, min(i + step, last * num_q)) for i in range(group * num_q, last * num_q, step)]
                layout.parts.append(Part(slice(group, last), batches))
            layout.uniform, layout.lists = highest, lists[:, :highest].contiguous()
        else:
            tokens = (counts * kv_tile).numpy()
            order, layout.parts = _parts(np.full(len(counts), q_tile), tokens, np.arange(len(counts)) // num_q, groups, apart)
            layout.row_list = torch.from_numpy(order)
        return layout
    return _plan_tokens(lists, counts, selection_tensors, q_len, kv_len, apart)


def _plan_tokens(lists, counts, selection_tensors, q_len: int, kv_len: int, apart: bool) -> Layout:
    _, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes = selection_tensors
    batch, heads, num_q, capacity = kv_indices.shape
    num_kv = kv_sizes.shape[-1]

    def flat(x: Tensor, stride: int) -> Tensor:
        base = torch.arange(batch * heads).unsqueeze(-1) * stride
        return (x.expand(batch, heads, x.shape[-1]).reshape(batch * heads, x.shape[-1]).long() + base).reshape(-1)

    q_start, q_size, kv_start, kv_size = flat(q_starts, q_len), flat(q_sizes, 0), flat(kv_starts, kv_len), flat(kv_sizes, 0)
    # Split long query blocks: piece j of a block has rows j * MAX_ROWS and on.
    pieces = (q_size + MAX_ROWS - 1) // MAX_ROWS
    row_list = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
    first_piece = (pieces.cumsum(0) - pieces)[row_list]
    shift = (torch.arange(len(row_list)) - first_piece) * MAX_ROWS
    start, size = q_start[row_list] + shift, (q_size[row_list] - shift).clamp(max=MAX_ROWS)
    used = torch.arange(capacity) < counts.unsqueeze(-1)
    tokens = torch.where(used, kv_size[torch.where(used, lists, 0)], 0).sum(-1) if num_kv else counts * 0
    order, parts = _parts(size.numpy(), tokens[row_list].numpy(), (row_list // num_q).numpy(), batch * heads, apart)
    order = torch.from_numpy(order)
    sides = (1, 1, q_len, kv_len, num_q, num_kv)
    return Layout(lists, counts, row_list[order], parts, *sides, start[order], size[order], kv_start, kv_size)


@dataclass
class Rows:
    """Query rows of work items that follow each other."""

    index: Tensor | slice  # units of the query side: (n,) tiles or (n * p,) tokens
    invalid: Tensor | None  # (n, p) padding rows
    shape: tuple[int, int]  # n, p


@dataclass
class Batch:
    """Indices of one batch of work items; None where a mask or a gather is not needed."""

    lists: Tensor  # (n,) which lists
    rows: Rows
    kv_index: Tensor  # (n * units,) what to gather of `cpu_tensors.key_units`
    kv_unit: int  # tokens of a unit: kv_tile, or 1 where a partial tile is listed
    sum_index: Tensor  # (n * tiles,) the tiles listed, where dK and dV are summed
    slot: Tensor | None  # (n, L) slot of each token, None in tile mode
    invalid: Tensor | None  # (n, L) padding tokens
    shape: tuple[int, int, int]  # n, p, L
    slots: int  # c
    first_slot: int = 0  # of a piece of the lists, in tile mode


def _runs(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, c) runs -> (n, L) token of each position, its run, and whether it is padding. Padding repeats the last
    token of the item, so that nothing outside its list is ever touched."""
    if start.shape[1] == 0:
        return start, start, start.bool()
    end = size.cumsum(-1)
    total = end[:, -1:]
    position = torch.arange(int(total.max())).expand(len(start), -1)
    invalid = position >= total
    position = torch.minimum(position, total - 1).contiguous()
    run = torch.searchsorted(end, position, right=True)
    return start.gather(1, run) + position - (end - size).gather(1, run), run, invalid


def _tokens(index: Tensor, tile: int, length: int, count: int) -> tuple[Tensor, Tensor]:
    """(n, c) tiles, `count` of them a head -> (n, c, tile) their tokens of G * length, and which are padding. Padding repeats the
    tile's last token."""
    head, first = index // count, index % count * tile
    token = first.unsqueeze(-1) + torch.arange(tile)
    return token.clamp(max=length - 1) + (head * length).unsqueeze(-1), token >= length


def pieces(b: Batch, tile: int) -> Iterator[Batch]:
    """The batch itself, or where its lists are long, piece by piece of them: the scores of a whole list would leave the caches (half of
    the blocks of 32,760 tokens take 1.44 s whole and 1.23 s in pieces; pieces of a quarter of the size 1.68 s)."""
    n, p, length = b.shape
    if length == 0:  # empty lists, of which only proxies are attended
        return
    unit = tile if b.slot is None else 1
    number = -(-length // max(unit, PIECE_ELEMENTS // p))
    if number == 1:
        yield b
        return
    step = -(-length // (number * unit)) * unit
    for begin in range(0, length, step):
        end = min(begin + step, length)

        def cut(index: Tensor, begin=begin, end=end) -> Tensor:
            each = n * length // index.numel()  # tokens of an entry
            return index.view(n, -1)[:, begin // each : end // each].reshape(-1)

        slot, invalid = (None if x is None else x[:, begin:end] for x in (b.slot, b.invalid))
        slots = {"slots": (end - begin) // tile, "first_slot": begin // tile} if b.slot is None else {}
        yield replace(b, kv_index=cut(b.kv_index), sum_index=cut(b.sum_index), slot=slot, invalid=invalid, shape=(n, p, end - begin), **slots)


def batch_runs(layout: Layout, part: Part) -> Iterator[list]:
    """Batches of a part that follow each other, with at most `RUN_ROWS` query rows together; those of other layouts than tiles, whose
    rows are padded to each other's, one by one."""
    most, run = RUN_ROWS // layout.q_tile if layout.q_start is None else 0, []
    for first, last in part.batches:
        if run and last - run[0][0] > most:
            yield run
            run = []
        run.append((first, last))
    if run:
        yield run


def make_batch(layout: Layout, first: int, last: int) -> Batch:
    lists, n, rows = layout.row_list[first:last], last - first, query_rows(layout, first, last)
    if slots := layout.uniform:
        index, unused = layout.lists[first:last], None
    else:
        counts, unused = layout.counts[lists], None
        slots = int(counts.max())
        index = layout.lists[lists, :slots]
        if slots and int(counts.min()) != slots:
            unused = torch.arange(slots) >= counts.unsqueeze(-1)
            # An empty list, which may stand beside those of empty blocks, has no last entry: any block does.
            last = torch.where(counts > 0, index.gather(1, (counts - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1), 0)
            index = torch.where(unused, last.unsqueeze(-1), index)
    if layout.q_start is not None:
        size = layout.kv_size[index] if unused is None else torch.where(unused, 0, layout.kv_size[index])
        token, slot, invalid = _runs(layout.kv_start[index], size)
        shape = (n, rows.shape[1], token.shape[1])
        token = token.reshape(-1)
        return Batch(lists, rows, token, 1, token, slot, invalid if bool(invalid.any()) else None, shape, slots)
    tile = layout.kv_tile
    shape = (n, layout.q_tile, slots * tile)
    invalid = None if unused is None else unused.repeat_interleave(tile, 1)
    if layout.partial is not None and layout.partial[lists.numpy()].any():
        token, tail = (x.reshape(n, -1) for x in _tokens(index, tile, layout.kv_len, layout.num_kv))
        invalid = tail if invalid is None else invalid | tail
        return Batch(lists, rows, token.reshape(-1), 1, index.reshape(-1), None, invalid, shape, slots)
    index = index.reshape(-1)
    gathered = index if layout.kv_first is None else layout.kv_first[index]
    return Batch(lists, rows, gathered, tile, index, None, invalid, shape, slots)


def query_rows(layout: Layout, first: int, last: int) -> Rows:
    """Query rows of items first to last, which end with their head or lie within it."""
    tile, length, count, n = layout.q_tile, layout.q_len, layout.num_q, last - first
    if layout.q_start is not None:
        query, _, invalid = _runs(layout.q_start[first:last, None], layout.q_size[first:last, None])
        return Rows(query.reshape(-1), invalid if bool(invalid.any()) else None, (n, query.shape[1]))
    if length % tile == 0:
        return Rows(slice(first, last) if layout.uniform else layout.row_list[first:last], None, (n, tile))
    if layout.uniform and last % count:  # a batch that does not end with its head is within it, without the partial tile
        start = first // count * length + first % count * tile
        return Rows(slice(start, start + n * tile), None, (n, tile))
    token, invalid = _tokens(layout.row_list[first:last], tile, length, count)
    return Rows(token.reshape(-1), invalid if bool(invalid.any()) else None, (n, tile))
