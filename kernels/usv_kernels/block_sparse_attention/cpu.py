"""Fast CPU path: gather the key/value blocks a query block lists, then batched matrix products over many query blocks.

A work item is (a run of query rows, the tokens its list names). Items of equal or similar size are batched into one
gather and a few `bmm` calls, so nothing that is not listed is computed and the score matrix of a batch stays in cache.
Regular tiles are gathered whole; blocks of any other layout token by token, sorted by size so that padding a batch to
its largest item wastes little. The backward recomputes the scores (no score matrix is kept) and adds dK and dV in list
order, so it is deterministic. Half precision is computed in fp32: without native bf16 units that is also faster.

Letters: G = B * H, n items of a batch, p query rows of an item, L tokens of its list, c slots of its list, D channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Score elements per batch: 1 MB in fp32, so that scores and gathered tiles stay in the caches of a core.
BATCH_ELEMENTS = 1 << 18
# Longest run of query rows in one work item; longer blocks are split, which bounds the score matrix.
MAX_ROWS = 256
# Padding a batch may cost this factor in token pairs, or this many pairs a batch: about what its calls cost anyway.
PADDING_FACTOR, PADDING_PAIRS = 1.15, 100_000


@dataclass
class Layout:
    """Work items of one call. In tile mode a gathered unit is a whole tile, otherwise one token (tile 1 x 1)."""

    lists: Tensor  # (G * M, K) long, global unit or block index of each slot
    counts: Tensor  # (G * M,) long
    row_list: Tensor  # (items,) long: which list an item uses
    batches: list  # [(first item, last item + 1)], items being sorted
    q_tile: int
    kv_tile: int
    num_q: int
    num_kv: int
    q_start: Tensor | None = None  # token mode: (items,) global first query row and number of rows
    q_size: Tensor | None = None
    kv_start: Tensor | None = None  # token mode: (G * N,) global first token and number of tokens of each key block
    kv_size: Tensor | None = None
    ragged: bool = True  # tile mode: items of a batch may have different counts
    kv_rest: int = 0  # tile mode: valid tokens of a partial last key tile, 0 if it is full
    identity: bool = False  # items are all query tiles in order: no gather of queries


def _regular_tile(starts: Tensor, sizes: Tensor, length: int) -> int:
    """The tile size if blocks are shared equal tiles that cover the sequence (the last may be smaller), else 0."""
    if starts.dim() != 1 or starts.numel() == 0:
        return 0
    tile, count = int(sizes[0]), starts.numel()
    expected = torch.arange(count, dtype=starts.dtype) * tile
    full = bool((starts == expected).all()) and bool((sizes[:-1] == tile).all())
    covers = 0 < int(sizes[-1]) <= tile and int(expected[-1]) + int(sizes[-1]) == length
    return tile if full and covers else 0


def _group(p: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, list]:
    """Sorts items by size and cuts them into batches whose padding stays small. Items without tokens are dropped."""
    order = np.lexsort((tokens, np.ceil(np.log2(np.maximum(p, 1)) * 4)))
    order = order[(p[order] > 0) & (tokens[order] > 0)]
    batches, first, real, top_p, top_l = [], 0, 0, 0, 0
    for i, (rows, length) in enumerate(zip(p[order].tolist(), tokens[order].tolist(), strict=True)):
        new_p, new_l, number = max(top_p, rows), max(top_l, length), i - first + 1
        padded, new_real = new_p * new_l * number, real + rows * length
        wasteful = padded > PADDING_FACTOR * new_real and padded - new_real > PADDING_PAIRS
        if number > 1 and (padded > BATCH_ELEMENTS or wasteful):
            batches.append((first, i))
            first, real, top_p, top_l = i, rows * length, rows, length
        else:
            real, top_p, top_l = new_real, new_p, new_l
    if len(order) > first:
        batches.append((first, len(order)))
    return order, batches


def _plan(selection_tensors: tuple[Tensor, ...], q_len: int, kv_len: int) -> Layout:
    kv_num_blocks, kv_indices, q_starts, q_sizes, kv_starts, kv_sizes = selection_tensors
    batch, heads, num_q, capacity = kv_indices.shape
    groups, num_kv = batch * heads, kv_sizes.shape[-1]
    counts = kv_num_blocks.reshape(-1).long()
    offset = torch.arange(groups).repeat_interleave(num_q).unsqueeze(-1) * num_kv
    lists = kv_indices.reshape(-1, capacity).long() + offset
    q_tile, kv_tile = _regular_tile(q_starts, q_sizes, q_len), _regular_tile(kv_starts, kv_sizes, kv_len)
    if q_tile and kv_tile and q_tile <= MAX_ROWS:
        lowest, highest = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
        layout = Layout(lists, counts, torch.arange(groups * num_q), [], q_tile, kv_tile, num_q, num_kv, kv_rest=kv_len % kv_tile)
        if lowest == highest > 0:
            step = max(1, BATCH_ELEMENTS // (q_tile * highest * kv_tile))
            layout.batches = [(i, min(i + step, len(counts))) for i in range(0, len(counts), step)]
            layout.ragged, layout.identity = False, True
        else:
            tokens = (counts * kv_tile).numpy()
            order, layout.batches = _group(np.full(len(counts), q_tile), tokens)
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
    return Layout(lists, counts, row_list[order], batches, 1, 1, num_q, num_kv, start[order], size[order], kv_start, kv_size)


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


def _batch(layout: Layout, first: int, last: int) -> Batch:
    lists = layout.row_list[first:last]
    counts = layout.counts[lists] if layout.ragged else layout.counts[first:first + 1]
    slots, n = int(counts.max()), last - first
    padded = layout.ragged and int(counts.min()) != slots
    index = layout.lists[lists, :slots] if not layout.identity else layout.lists[first:last, :slots]
    unused = None
    if padded:
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
    q_index = slice(first, last) if layout.identity else lists
    return Batch(lists, q_index, index.reshape(-1), None, invalid, None, (n, layout.q_tile, slots * tile), slots)


def _units(x_BHSd: Tensor, tile: int, count: int, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B, H, S, d) -> (G * count, tile * d) whole tiles, zero-padded; (G * S, d) for tile 1."""
    batch, heads, length, dim = x_BHSd.shape
    x = x_BHSd.to(dtype)
    if tile > 1 and count * tile != length:
        x = torch.nn.functional.pad(x, (0, 0, 0, count * tile - length), value=fill)
    return x.reshape(-1, tile * dim)


class Scratch:
    """Buffers that one call reuses for every batch: fresh memory would be page-faulted in and leave the cache each time
    (measured: gathers into fresh memory took as long as the matrix products)."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        count = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < count:
            self.buffers[name] = torch.empty(count, dtype=self.dtype)
        return self.buffers[name][:count].view(shape)

    def take(self, name: str, units: Tensor, index, *shape: int) -> Tensor:
        """Rows `index` of `units` as `shape`, copied unless they are consecutive."""
        if isinstance(index, slice):
            return units[index].view(shape)
        rows = self(name, len(index), units.shape[1])
        return torch.index_select(units, 0, index, out=rows).view(shape)


def _put(units: Tensor, index, values: Tensor) -> None:
    """Writes rows; padding rows repeat the last valid one and write the same value again."""
    if isinstance(index, slice):
        units[index] = values
    else:
        units.index_copy_(0, index, values)


def _column_bias(b: Batch, layout: Layout, bias_units: Tensor | None, gate: Tensor | None, dtype) -> Tensor | None:
    """(n, L): everything that is added to a whole column of scores: key bias, gate of the block, -inf for padding."""
    n, _, length = b.shape
    column = None
    if bias_units is not None:
        column = bias_units.index_select(0, b.kv_index).view(n, length)
    if gate is not None:
        values = gate[b.lists, : b.slots]
        values = values.repeat_interleave(layout.kv_tile, 1) if b.slot is None else values.gather(1, b.slot)
        column = values if column is None else column + values
    if b.invalid is not None:
        column = torch.zeros(n, length, dtype=dtype) if column is None else column
        column = column.masked_fill(b.invalid, float("-inf"))
    return column


def _scores(q_npD: Tensor, k_nLD: Tensor, column: Tensor | None, scale: float, s_npL: Tensor) -> Tensor:
    if column is not None:
        s_npL.copy_(column.unsqueeze(1))
    return s_npL.baddbmm_(q_npD, k_nLD.transpose(1, 2), beta=0 if column is None else 1, alpha=scale)


def _inputs(q, k, v, key_bias, block_gate, layout: Layout, dtype):
    kv = layout.kv_tile
    q_units = _units(q, layout.q_tile, layout.num_q, dtype)
    k_units, v_units = _units(k, kv, layout.num_kv, dtype), _units(v, kv, layout.num_kv, dtype)
    bias = None
    if key_bias is not None:
        bias = _units(key_bias.expand(*k.shape[:3]).unsqueeze(-1), kv, layout.num_kv, dtype)
    gate = None if block_gate is None else block_gate.reshape(-1, block_gate.shape[-1]).to(dtype)
    return q_units, k_units, v_units, bias, gate


def forward(q, k, v, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0, kv_max: int = 0) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) in fp32 (fp64 for fp64 input). Reads the sizes: needs no bounds."""
    batch, heads, q_len, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    layout = _plan(selection_tensors, q_len, k.shape[2])
    q_units, k_units, v_units, bias, gate = _inputs(q, k, v, key_bias, block_gate, layout, dtype)
    out = torch.zeros_like(q_units)
    lse = torch.full((q_units.shape[0], layout.q_tile), float("-inf"), dtype=dtype)
    scratch = Scratch(dtype)
    for first, last in layout.batches:
        b = _batch(layout, first, last)
        n, p, length = b.shape
        q_npD = scratch.take("q", q_units, b.q_index, n, p, dim)
        k_nLD = scratch.take("k", k_units, b.kv_index, n, length, dim)
        column = _column_bias(b, layout, bias, gate, dtype)
        s = _scores(q_npD, k_nLD, column, scale, scratch("s", n, p, length))
        top = s.amax(-1, keepdim=True)
        if column is not None:
            top = torch.where(top == float("-inf"), 0.0, top)
        torch.exp(s.sub_(top), out=s)
        total = s.sum(-1, keepdim=True)
        # K is no longer needed: V takes its buffer, which is still in cache.
        v_nLD = scratch.take("k", v_units, b.kv_index, n, length, dim)
        o_npD = torch.bmm(s, v_nLD, out=scratch("o", n, p, dim)).div_(total if column is None else torch.where(total == 0, 1.0, total))
        _put(out, b.q_index, o_npD.view(-1, out.shape[1]))
        _put(lse, b.q_index, (top + total.log()).view(-1, lse.shape[1]))
    out = out.view(batch, heads, -1, dim)[:, :, :q_len].to(q.dtype)
    return out.contiguous(), lse.view(batch, heads, -1)[:, :, :q_len].contiguous()


def backward(grad_out, grad_lse, q, k, v, out, lse, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0,
             kv_max: int = 0):  # fmt: skip
    """Gradients of q, k, v, key_bias and block_gate (None for an absent argument). grad_lse may be None."""
    batch, heads, q_len, dim = q.shape
    kv_len = k.shape[2]
    dtype = lse.dtype
    layout = _plan(selection_tensors, q_len, kv_len)
    q_units, k_units, v_units, bias, gate = _inputs(q, k, v, key_bias, block_gate, layout, dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    # A row without keys has lse = -inf; +inf makes its probabilities exp(s - inf) = 0 instead of NaN.
    lse = torch.where(lse == float("-inf"), float("inf"), lse).unsqueeze(-1)
    go_units = _units(grad_out, layout.q_tile, layout.num_q, dtype)
    lse_units = _units(lse, layout.q_tile, layout.num_q, dtype, fill=float("inf"))
    delta_units = _units(delta, layout.q_tile, layout.num_q, dtype)
    dq, dk, dv = torch.zeros_like(q_units), torch.zeros_like(k_units), torch.zeros_like(v_units)
    dbias = None if bias is None else torch.zeros_like(bias)
    dgate = None if gate is None else torch.zeros_like(gate)
    scratch = Scratch(dtype)
    for first, last in layout.batches:
        b = _batch(layout, first, last)
        n, p, length = b.shape
        q_npD = scratch.take("q", q_units, b.q_index, n, p, dim)
        go_npD = scratch.take("go", go_units, b.q_index, n, p, dim)
        lse_np1 = scratch.take("lse", lse_units, b.q_index, n, p, 1)
        delta_np1 = scratch.take("delta", delta_units, b.q_index, n, p, 1)
        if b.q_invalid is not None:
            lse_np1 = lse_np1.masked_fill(b.q_invalid.unsqueeze(-1), float("inf"))
        k_nLD = scratch.take("k", k_units, b.kv_index, n, length, dim)
        s = _scores(q_npD, k_nLD, _column_bias(b, layout, bias, gate, dtype), scale, scratch("s", n, p, length))
        torch.exp(s.sub_(lse_np1), out=s)
        part_nLD = scratch("part", n, length, dim)
        dv.index_add_(0, b.kv_index, torch.bmm(s.transpose(1, 2), go_npD, out=part_nLD).view(-1, dv.shape[1]))
        v_nLD = scratch.take("v", v_units, b.kv_index, n, length, dim)
        ds = torch.bmm(go_npD, v_nLD.transpose(1, 2), out=scratch("ds", n, p, length)).sub_(delta_np1).mul_(s)
        if bias is not None or gate is not None:
            _add_column_gradient(ds.sum(1), b, layout, dbias, dgate)
        dq_npD = torch.bmm(ds, k_nLD, out=scratch("o", n, p, dim))
        _put(dq, b.q_index, _first_valid(dq_npD, b).reshape(-1, dq.shape[1]))
        dk.index_add_(0, b.kv_index, torch.bmm(ds.transpose(1, 2), q_npD, out=part_nLD).view(-1, dk.shape[1]))

    def shaped(x: Tensor, length: int, factor: float, like: Tensor) -> Tensor:
        return x.view(batch, heads, -1, dim)[:, :, :length].mul(factor).to(like.dtype).contiguous()

    if dbias is not None:
        dbias = dbias.view(batch, heads, -1)[:, :, :kv_len]
        dbias = (dbias.sum(1, keepdim=True) if key_bias.shape[1] != heads else dbias).to(key_bias.dtype).contiguous()
    if dgate is not None:
        dgate = dgate.view(block_gate.shape).to(block_gate.dtype)
    return shaped(dq, q_len, scale, q), shaped(dk, kv_len, scale, k), shaped(dv, kv_len, 1.0, v), dbias, dgate


def _first_valid(dq_npD: Tensor, b: Batch) -> Tensor:
    """Padding rows share their index with the item's last valid row, so they must carry that row's gradient."""
    if b.q_invalid is None:
        return dq_npD
    last = (~b.q_invalid).sum(1, keepdim=True) - 1
    row = torch.minimum(torch.arange(b.shape[1]), last)
    return dq_npD.gather(1, row.unsqueeze(-1).expand_as(dq_npD))


def _add_column_gradient(column: Tensor, b: Batch, layout: Layout, dbias: Tensor | None, dgate: Tensor | None) -> None:
    """Adds (n, L) column sums of dS to the gradients of key_bias and of block_gate."""
    n = b.shape[0]
    if dbias is not None:
        dbias.index_add_(0, b.kv_index, column.view(-1, dbias.shape[1]))
    if dgate is not None:
        if b.slot is None:
            slots = column.view(n, b.slots, layout.kv_tile).sum(-1)
        else:
            slots = torch.zeros(n, b.slots, dtype=column.dtype).scatter_add_(1, b.slot, column)
        dgate[:, : b.slots].index_add_(0, b.lists, slots)
