"""Fast CPU path: gather the key/value blocks a query block lists, then batched matrix products over many query blocks.

A work item is (a run of query rows, the tokens its list names). Items of equal or similar size are batched into one
gather and a few `bmm` calls, so nothing that is not listed is computed and the score matrix of a batch stays in cache.
Regular tiles are gathered whole, unless a batch lists a partial one; it, and blocks of any other layout, token by token, sorted
by size so that padding a batch to its largest item wastes little. Half precision is computed in fp32, converted tile by tile after
the gather: bf16 products would have bf16 results. Batches that follow each other have their queries converted, their proxies
attended and their output written together. QK^T of int8: `cpu_int8`.

exp(x) is torch.exp where that is MKL's on Intel, else exp2(x * log2(e)): on AMD MKL's takes four times as long (80 and 22 us for
262,144 values on two cores).

Letters: G = B * H, n items of a batch, p query rows of an item, L tokens of its list, c slots of its list, D channels.
"""

import math

import torch
from torch import Tensor

from .._products import fast_products
from . import cpu_backward
from .cpu_int8 import Int8Logits
from .cpu_plan import Batch, Layout, batch_runs, make_batch, make_plan, pieces, query_rows
from .cpu_tensors import EXP, UNIT, Proxies, Scratch, column_bias, exponential, inputs, longest, put, scores

backward = cpu_backward.backward


def _exponents_fit(q: Tensor, longest_key: float, bias: Tensor | None, gate: Tensor | None, layout: Layout, scale: float, proxy=None) -> bool:
    """Whether no logit can leave -40..40, by |<q, k>| <= |q| |k|. Then exp needs no maximum subtracted: the largest term of a
    row is at least e^-40 and its sum at most e^40 times its length, far inside fp32. Saves two of four passes over scores.
    NaN counts for nothing: where it is listed it spoils its row either way, and where it is not it must not matter."""
    longest_query = longest(q)
    bound = abs(scale) * longest_query * longest_key
    if gate is not None:
        gate = torch.where(torch.arange(gate.shape[1]) < layout.counts.unsqueeze(-1), gate, 0.0)
    for x in (bias, gate):
        bound += float(x.abs().nan_to_num(0.0, posinf=math.inf).amax()) if x is not None and x.numel() else 0.0
    if proxy is not None:
        added = proxy[2].nan_to_num(0.0, neginf=0.0).abs()
        bound = max(bound, abs(scale) * longest_query * longest(proxy[0]) + (float(added.amax()) if added.numel() else 0.0))
    return bound <= 40.0


def _subtract_top(s: Tensor, top: Tensor, total: Tensor, o_npD: Tensor, begun: bool) -> None:
    """s becomes s - top, top the largest logit of each row so far; what was summed under a lower one shrinks with it."""
    if begun:
        before = top.clone()
        torch.maximum(top, s.amax(-1, keepdim=True), out=top)
        shrink = exponential(before.sub_(top)).nan_to_num_(0.0)  # NaN of a row that has met no key yet: nothing is summed
        total.mul_(shrink)
        o_npD.mul_(shrink)
    else:
        torch.amax(s, -1, keepdim=True, out=top)
    s.sub_(top.masked_fill(top == float("-inf"), 0.0))


def _step(s: Tensor, values, top: Tensor, total: Tensor, o_npD: Tensor, shifted: bool, begun: bool) -> None:
    """One step of the online softmax: logits s (n, p, L), in units of EXP unless shifted, and a function that gives their values
    (n, L, D), or (L, D) of all items."""
    if shifted:
        _subtract_top(s, top, total, o_npD, begun)
        exponential(s)
    else:
        EXP(s, out=s)
    v = values()
    if v.dim() == 2:
        flat, o_flat = s.view(-1, s.shape[-1]), o_npD.view(-1, v.shape[-1])
        o_flat.addmm_(flat, v) if begun else torch.mm(flat, v, out=o_flat)
    else:
        o_npD.baddbmm_(s, v) if begun else torch.bmm(s, v, out=o_npD)
    if begun:
        total.add_(torch.sum(s, -1, keepdim=True))
    else:
        torch.sum(s, -1, keepdim=True, out=total)


class ExactLogits:
    """scale <q, k> + column of listed keys, in fp32 (fp64). scale: in units of EXP; set before a run begins."""

    def __init__(self, q_units: Tensor, k: Tensor, k_units: dict[int, Tensor], dim: int):
        self.q_units, self.k, self.k_units, self.dim, self.scale = q_units, k, k_units, dim, 1.0

    def longest_key(self) -> float:
        return longest(self.k)

    def begin(self, index, shape: tuple[int, int], scratch: Scratch) -> Tensor:
        """(n, p, D) query rows of a run."""
        self.q_npD = scratch.take("q", self.q_units, index, *shape, self.dim)
        return self.q_npD

    def __call__(self, items: slice, piece: Batch, column: Tensor | None, scratch: Scratch) -> Tensor:
        """(n, p, L) for items of the run and a piece of their lists."""
        n, p, length = piece.shape
        k_nLD = scratch.take("k", self.k_units[piece.kv_unit], piece.kv_index, n, length, self.dim)
        return scores(self.q_npD[items], k_nLD, column, self.scale, scratch("s", n, p, length))

    def lse_shift(self, lists: Tensor, scale: float) -> Tensor | None:
        """(n, p, 1) what the lse of the run's rows is short of."""
        return None


@fast_products
def forward(q, k, v, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0, kv_max: int = 0, proxy=None,
            qk_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) in fp32 (fp64 for fp64 input). Reads the sizes: needs no bounds.
    qk_dtype: torch.int8, without proxies, or None."""
    dim = q.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    layout = make_plan(selection_tensors, q.shape[2], k.shape[2], proxy is not None)
    q_units, k_units, v_units, bias, gate = inputs(q, k, v, key_bias, block_gate, layout, dtype)
    logits = ExactLogits(q_units, k, k_units, dim) if qk_dtype is None else Int8Logits(q_units, k, layout, dtype)
    # Written in q's dtype run by run while in cache; with uniform counts every row is written, so no zeros are needed.
    out = (torch.empty if layout.uniform else torch.zeros)(q_units.shape, dtype=q.dtype)
    # lse = tops + log(totals): rows that no batch writes keep log(0) = -inf.
    tops, totals = (torch.zeros(q_units.shape[0], layout.q_unit, dtype=dtype) for _ in range(2))
    shifted = not _exponents_fit(q, logits.longest_key(), key_bias, gate, layout, scale, proxy)
    # Small logits are scaled for EXP at once; large ones only after the maximum, else their rounding would grow with them.
    unit = 1.0 if shifted else UNIT
    logits.scale = scale * unit
    proxies = None if proxy is None else Proxies(proxy, layout, dtype, scale, unit)
    scratch = Scratch(dtype)
    for run in (run for part in layout.parts for run in batch_runs(layout, part)):
        begin, lists = run[0][0], layout.row_list[run[0][0] : run[-1][1]]
        rows = query_rows(layout, begin, run[-1][1])
        q_npD = logits.begin(rows.index, rows.shape, scratch)
        top, total = (scratch.place(name, x, rows.index, *rows.shape, 1) for name, x in (("top", tops), ("total", totals)))
        o_npD = scratch("o", *rows.shape, dim)
        if proxies is not None:
            _step(proxies.scores(q_npD, lists, scratch), lambda: proxies.values[proxies.head(lists)], top, total, o_npD, shifted, False)
        masked = proxies is not None
        for first, last in run:
            b, items, begun = make_batch(layout, first, last), slice(first - begin, last - begin), proxies is not None
            for piece in pieces(b, layout.kv_tile):
                column = column_bias(piece, layout, bias, gate, dtype)
                masked |= column is not None
                if column is not None and not shifted:
                    column = column * unit
                s = logits(items, piece, column, scratch)

                def listed(piece=piece, unit=b.kv_unit):
                    # K is no longer needed: V takes its buffer, which is still in cache.
                    return scratch.take("k", v_units[unit], piece.kv_index, piece.shape[0], piece.shape[2], dim)

                _step(s, listed, top[items], total[items], o_npD[items], shifted, begun)
                begun = True
        if shifted:
            top.masked_fill_(top == float("-inf"), 0.0)
        if (shift := logits.lse_shift(lists, scale)) is not None:
            top.add_(shift) if shifted else top.copy_(shift)
        if shifted or shift is not None:
            put(tops, rows, top)
        divisor = torch.where(total == 0, 1.0, total) if masked else total
        put(out, rows, torch.div(o_npD, divisor, out=scratch.place("out", out, rows.index, *rows.shape, dim)))
        put(totals, rows, total)
    return out.view(q.shape), tops.add_(totals.log_()).view(q.shape[:3])
