"""Fast CPU path: gather the key/value blocks a query block lists, then batched matrix products over many query blocks.

A work item is (a run of query rows, the tokens its list names). Items of equal or similar size are batched into one
gather and a few `bmm` calls, so nothing that is not listed is computed and the score matrix of a batch stays in cache.
Regular tiles are gathered whole, unless a batch lists a partial one; it, and blocks of any other layout, token by token, sorted
by size so that padding a batch to its largest item wastes little. The backward recomputes the scores (no score matrix is kept)
and adds dK and dV in list order, so it is deterministic. Half precision is computed in fp32, converted tile by tile after the gather: bf16
products would have bf16 results.

exp(x) is exp2(x * log2(e)): torch.exp is MKL's, which on AMD takes four times as long (80 and 22 us for 262,144 values on two cores).

Letters: G = B * H, n items of a batch, p query rows of an item, L tokens of its list, c slots of its list, D channels.
"""

import itertools
import math

import torch
from torch import Tensor

from .._products import fast_products
from .cpu_plan import Batch, Layout, make_batch, make_plan, pieces

LOG2E = math.log2(math.e)


def _units(x: Tensor, tile: int) -> Tensor:
    """(B, H, S, d) -> (G * S / tile, tile * d)."""
    return x.reshape(-1, tile * x.shape[-1])


def _key_units(x: Tensor, tile: int) -> dict[int, Tensor]:
    """(B, H, S, d) -> its tokens, and its tiles, as rows to gather. Where the last tile of a head is partial the others begin anywhere:
    then these are the (tile, d) tokens from each token on, a view that needs no copy."""
    tokens = x.contiguous().view(-1, x.shape[-1])
    if x.shape[2] % tile == 0:
        return {1: tokens, tile: tokens.view(-1, tile * x.shape[-1])}
    return {1: tokens, tile: tokens.as_strided((max(len(tokens) - tile + 1, 0), tile * x.shape[-1]), (x.shape[-1], 1))}


class Scratch:
    """Buffers that one call reuses for every batch: fresh memory would be page-faulted in and leave the cache each time
    (measured: gathers into fresh memory took as long as the matrix products). Where all batches are alike, as are most of equal
    lists, so are the views of them: made anew each time they took 4% of a forward."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[str, Tensor] = {}  # the last of each buffer

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        view = self.views.get(name)
        if view is None or view.shape != shape:
            count = math.prod(shape)
            if name not in self.buffers or self.buffers[name].numel() < count:
                self.buffers[name] = torch.empty(count, dtype=dtype or self.dtype)
            view = self.views[name] = self.buffers[name][:count].view(shape)
        return view

    def take(self, name: str, units: Tensor, index, *shape: int) -> Tensor:
        """Rows `index` of `units` as `shape` in the buffers' dtype, copied unless they are consecutive and have it."""
        if isinstance(index, slice):
            rows = units[index]
        else:
            buffer = name if units.dtype == self.dtype else "to convert"
            rows = torch.index_select(units, 0, index, out=self(buffer, len(index), units.shape[1], dtype=units.dtype))
        return (rows if rows.dtype == self.dtype else self(name, *rows.shape).copy_(rows)).view(shape)

    def sums(self, name: str, x: Tensor, length: int) -> Tensor:
        """(heads, length, d) zeros to add to in the buffers' dtype: `x`, (heads, S, d), itself if it is like that."""
        return (x if x.dtype == self.dtype and x.shape[1] == length else self(name, len(x), length, x.shape[2])).zero_()

    def place(self, name: str, units: Tensor, index, *shape: int) -> Tensor:
        """Where to compute rows `index` of `units`: in place if they are consecutive, else a buffer for `_put`."""
        return units[index].view(shape) if isinstance(index, slice) else self(name, *shape)


def _put(units: Tensor, b: Batch, values: Tensor) -> None:
    """Writes the query rows of a batch, computed in a buffer of `Scratch.place`, without its padding."""
    if isinstance(b.q_index, slice):
        return
    index, values = b.q_index, values.reshape(-1, units.shape[1])
    if b.q_invalid is not None:
        valid = ~b.q_invalid.reshape(-1)
        index, values = index[valid], values[valid]
    units.index_copy_(0, index, values.to(units.dtype))


def _column_bias(b: Batch, layout: Layout, bias_units: dict[int, Tensor] | None, gate: Tensor | None, dtype) -> Tensor | None:
    """(n, L): everything that is added to a whole column of scores: key bias, gate of the block, -inf for padding."""
    n, _, length = b.shape
    column = None
    if bias_units is not None:
        column = bias_units[b.kv_unit].index_select(0, b.kv_index).view(n, length)
    if gate is not None:
        values = gate[b.lists, b.first_slot : b.first_slot + b.slots]
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


class Proxies:
    """Keys, values and log sizes (B, H, N) of what stands for blocks that are not listed; no gather: a head's are shared by its queries."""

    def __init__(self, proxy: tuple[Tensor, ...], layout: Layout, dtype: torch.dtype, scale: float, unit: float):
        """scale: of the dot products. unit: log2(e) where the logits are of exp2, else 1."""
        self.alpha = scale * unit
        self.keys, self.values = (x.flatten(0, 1).to(dtype) for x in proxy[:2])
        groups, number = self.keys.shape[:2]
        self.number, self.num_q = number, layout.num_q
        columns = proxy[2].reshape(groups, 1, number).to(dtype).expand(groups, layout.num_q, number).reshape(-1, number)
        used = torch.arange(layout.lists.shape[1]) < layout.counts.unsqueeze(-1)
        target = torch.where(used, layout.lists % max(number, 1), number)
        listed = torch.zeros(len(columns), number + 1, dtype=torch.bool).scatter_(1, target, True)[:, :number]
        self.columns = columns.masked_fill(listed, float("-inf")).mul_(unit)  # (G * M, N), which columns itself may only pretend to be

    def head(self, b: Batch) -> int:
        return int(b.lists[0]) // self.num_q

    def scores(self, q_npD: Tensor, b: Batch, scratch: Scratch) -> Tensor:
        """(n, p, N) logits in the buffer of the scores."""
        n, p, _ = b.shape
        s = scratch("s", n, p, self.number)
        s.copy_(self.columns.index_select(0, b.lists).unsqueeze(1))
        s.view(n * p, -1).addmm_(q_npD.view(n * p, -1), self.keys[self.head(b)].T, alpha=self.alpha)
        return s


def _inputs(q, k, v, key_bias, block_gate, layout: Layout, dtype):
    q_units = _units(q, layout.q_unit)
    k_units, v_units = _key_units(k, layout.kv_tile), _key_units(v, layout.kv_tile)
    bias = None
    if key_bias is not None:
        bias = _key_units(key_bias.expand(*k.shape[:3]).unsqueeze(-1).to(dtype), layout.kv_tile)
    gate = None if block_gate is None else block_gate.reshape(-1, block_gate.shape[-1]).to(dtype)
    return q_units, k_units, v_units, bias, gate


def _exponents_fit(q: Tensor, k: Tensor, bias: Tensor | None, gate: Tensor | None, layout: Layout, scale: float, proxy=None) -> bool:
    """Whether no logit can leave -40..40, by |<q, k>| <= |q| |k|. Then exp needs no maximum subtracted: the largest term of a
    row is at least e^-40 and its sum at most e^40 times its length, far inside fp32. Saves two of four passes over scores.
    NaN counts for nothing: where it is listed it spoils its row either way, and where it is not it must not matter."""
    longest = _longest(q)
    bound = abs(scale) * longest * _longest(k)
    if gate is not None:
        gate = torch.where(torch.arange(gate.shape[1]) < layout.counts.unsqueeze(-1), gate, 0.0)
    for x in (bias, gate):
        bound += float(x.abs().nan_to_num(0.0, posinf=math.inf).amax()) if x is not None and x.numel() else 0.0
    if proxy is not None:
        added = proxy[2].nan_to_num(0.0, neginf=0.0).abs()
        bound = max(bound, abs(scale) * longest * _longest(proxy[0]) + (float(added.amax()) if added.numel() else 0.0))
    return bound <= 40.0


def _longest(x: Tensor) -> float:
    """A bound on the norms of the rows of x. Taken in x's own dtype: it sums in fp32 and makes no converted copy; eps is for what
    rounding took off a norm."""
    if not x.numel():
        return 0.0
    norms = torch.linalg.vector_norm(x, dim=-1)
    return float(norms.nan_to_num(0.0, posinf=math.inf).amax()) * (1 + torch.finfo(x.dtype).eps)


def _subtract_top(s: Tensor, top: Tensor, total: Tensor, o_npD: Tensor, begun: bool) -> None:
    """s becomes (s - top) * log2(e), top the largest logit of each row so far; what was summed under a lower one shrinks with it."""
    if begun:
        before = top.clone()
        torch.maximum(top, s.amax(-1, keepdim=True), out=top)
        shrink = before.sub_(top).mul_(LOG2E).exp2_().nan_to_num_(0.0)  # NaN of a row that has met no key yet: nothing is summed
        total.mul_(shrink)
        o_npD.mul_(shrink)
    else:
        torch.amax(s, -1, keepdim=True, out=top)
    s.sub_(top.masked_fill(top == float("-inf"), 0.0)).mul_(LOG2E)


def _step(s: Tensor, values, top: Tensor, total: Tensor, o_npD: Tensor, shifted: bool, begun: bool) -> None:
    """One step of the online softmax: logits s (n, p, L) and a function that gives their values (n, L, D) or (L, D)."""
    if shifted:
        _subtract_top(s, top, total, o_npD, begun)
    torch.exp2(s, out=s)
    v = values()
    if v.dim() == 2:  # of all items
        flat, o_flat = s.view(-1, s.shape[-1]), o_npD.view(-1, v.shape[-1])
        o_flat.addmm_(flat, v) if begun else torch.mm(flat, v, out=o_flat)
    else:
        o_npD.baddbmm_(s, v) if begun else torch.bmm(s, v, out=o_npD)
    if begun:
        total.add_(torch.sum(s, -1, keepdim=True))
    else:
        torch.sum(s, -1, keepdim=True, out=total)


@fast_products
def forward(q, k, v, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0, kv_max: int = 0, proxy=None) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) in fp32 (fp64 for fp64 input). Reads the sizes: needs no bounds."""
    dim = q.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    layout = make_plan(selection_tensors, q.shape[2], k.shape[2], proxy is not None)
    q_units, k_units, v_units, bias, gate = _inputs(q, k, v, key_bias, block_gate, layout, dtype)
    # Written in q's dtype batch by batch while in cache; with uniform counts every row is written, so no zeros are needed.
    out = (torch.empty if layout.uniform else torch.zeros)(q_units.shape, dtype=q.dtype)
    # lse = tops + log(totals): rows that no batch writes keep log(0) = -inf.
    tops, totals = (torch.zeros(q_units.shape[0], layout.q_unit, dtype=dtype) for _ in range(2))
    shifted = not _exponents_fit(q, k, key_bias, gate, layout, scale, proxy)
    # Small logits are scaled for exp2 at once; large ones only after the maximum, else their rounding would grow with them.
    unit = 1.0 if shifted else LOG2E
    proxies = None if proxy is None else Proxies(proxy, layout, dtype, scale, unit)
    scratch = Scratch(dtype)
    for first, last in (batch for part in layout.parts for batch in part.batches):
        b = make_batch(layout, first, last)
        n, p, _ = b.shape
        q_npD = scratch.take("q", q_units, b.q_index, n, p, dim)
        top, total = (scratch.place(name, x, b.q_index, n, p, 1) for name, x in (("top", tops), ("total", totals)))
        o_npD = scratch("o", n, p, dim)
        begun, column = False, None
        for piece in pieces(b, layout.kv_tile):
            length = piece.shape[2]
            k_nLD = scratch.take("k", k_units[b.kv_unit], piece.kv_index, n, length, dim)
            column = _column_bias(piece, layout, bias, gate, dtype)
            if column is not None and not shifted:
                column = column * unit
            s = _scores(q_npD, k_nLD, column, scale * unit, scratch("s", n, p, length))

            def listed(piece=piece, length=length):
                # K is no longer needed: V takes its buffer, which is still in cache.
                return scratch.take("k", v_units[b.kv_unit], piece.kv_index, n, length, dim)

            _step(s, listed, top, total, o_npD, shifted, begun)
            begun = True
        if proxies is not None:
            s = proxies.scores(q_npD, b, scratch)
            _step(s, lambda: proxies.values[proxies.head(b)], top, total, o_npD, shifted, begun)
        if shifted:
            _put(tops, b, top.masked_fill_(top == float("-inf"), 0.0))
        divisor = total if column is None and proxies is None else torch.where(total == 0, 1.0, total)
        o_npD = torch.div(o_npD, divisor, out=scratch.place("out", out, b.q_index, n, p, dim))
        _put(out, b, o_npD)
        _put(totals, b, total)
    return out.view(q.shape), tops.add_(totals.log_()).view(q.shape[:3])


@fast_products
def backward(grad_out, grad_lse, q, k, v, out, lse, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0,
             kv_max: int = 0, proxy=None):  # fmt: skip
    """Gradients of q, k, v, key_bias and block_gate (None for an absent argument), and of the three tensors of a proxy. grad_lse may
    be None."""
    batch, heads, kv_len, dim = k.shape
    dtype = lse.dtype
    layout = make_plan(selection_tensors, q.shape[2], kv_len, proxy is not None)
    q_units, k_units, v_units, bias, gate = _inputs(q, k, v, key_bias, block_gate, layout, dtype)
    proxies = None if proxy is None else Proxies(proxy, layout, dtype, scale, 1.0)
    dproxy = None if proxy is None else [torch.zeros(x.shape[0] * x.shape[1], *x.shape[2:], dtype=dtype) for x in proxy]
    delta = _row_products(grad_out, out, dtype)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    # A row without keys has lse = -inf; +inf makes its probabilities exp(s - inf) = 0 instead of NaN.
    lse = torch.where(lse == float("-inf"), float("inf"), lse).unsqueeze(-1)
    go_units, lse_units, delta_units = (_units(x, layout.q_unit) for x in (grad_out, lse, delta))
    dq = (torch.empty if layout.uniform else torch.zeros)(q_units.shape, dtype=q.dtype)
    dk, dv = (torch.empty(batch * heads, kv_len, dim, dtype=x.dtype) for x in (k, v))
    whole = -(-kv_len // layout.kv_tile) * layout.kv_tile  # a head's tokens if its last tile were whole
    dbias = None if bias is None else torch.zeros(batch * heads * whole, dtype=dtype)
    dgate = None if gate is None else torch.zeros_like(gate)
    scratch = Scratch(dtype)
    for part in layout.parts:
        dk_here, dv_here = dk[part.heads], dv[part.heads]
        dk_part, dv_part = scratch.sums("dk", dk_here, whole), scratch.sums("dv", dv_here, whole)
        # Of a tile's padding both are exactly 0, so that whole tiles can be added wherever they were gathered from.
        dk_tiles, dv_tiles = (x.view(-1, layout.kv_tile * dim) for x in (dk_part, dv_part))
        for first, last in part.batches:
            b = make_batch(layout, first, last)
            n, p, _ = b.shape
            q_npD = scratch.take("q", q_units, b.q_index, n, p, dim)
            go_npD = scratch.take("go", go_units, b.q_index, n, p, dim)
            lse_np1 = scratch.take("lse", lse_units, b.q_index, n, p, 1)
            delta_np1 = scratch.take("delta", delta_units, b.q_index, n, p, 1)
            if b.q_invalid is not None:
                lse_np1 = lse_np1.masked_fill(b.q_invalid.unsqueeze(-1), float("inf"))
            dq_npD, begun = scratch("o", n, p, dim), False
            for piece in pieces(b, layout.kv_tile):
                length = piece.shape[2]
                here = piece.sum_index - part.heads.start * (whole // layout.kv_tile)
                k_nLD = scratch.take("k", k_units[b.kv_unit], piece.kv_index, n, length, dim)
                s = _scores(q_npD, k_nLD, _column_bias(piece, layout, bias, gate, dtype), scale, scratch("s", n, p, length))
                torch.exp2(s.sub_(lse_np1).mul_(LOG2E), out=s)
                # V and both gradients of the listed tokens take turns in one buffer.
                dv_nLD = torch.bmm(s.transpose(1, 2), go_npD, out=scratch("v", n, length, dim))
                dv_tiles.index_add_(0, here, dv_nLD.view(-1, layout.kv_tile * dim))
                v_nLD = scratch.take("v", v_units[b.kv_unit], piece.kv_index, n, length, dim)
                ds = torch.bmm(go_npD, v_nLD.transpose(1, 2), out=scratch("ds", n, p, length)).sub_(delta_np1).mul_(s)
                if bias is not None or gate is not None:
                    _add_column_gradient(ds.sum(1), piece, layout, dbias, dgate)
                dq_npD = dq_npD.baddbmm_(ds, k_nLD) if begun else torch.bmm(ds, k_nLD, out=dq_npD)
                begun = True
                dk_nLD = torch.bmm(ds.transpose(1, 2), q_npD, out=scratch("v", n, length, dim))
                dk_tiles.index_add_(0, here, dk_nLD.view(-1, layout.kv_tile * dim))
            if proxies is not None:
                s = proxies.scores(q_npD, b, scratch)
                torch.exp2(s.sub_(lse_np1).mul_(LOG2E), out=s)
                _add_proxy_gradients(s, q_npD, go_npD, delta_np1, dq_npD if begun else dq_npD.zero_(), proxies, proxies.head(b), scale, dproxy)
            dq_npD = torch.mul(dq_npD, scale, out=scratch.place("dq", dq, b.q_index, n, p, dim))
            _put(dq, b, dq_npD)
        torch.mul(dk_part[:, :kv_len], scale, out=dk_here)
        if dv_part is not dv_here:
            dv_here.copy_(dv_part[:, :kv_len])
    if dbias is not None:
        dbias = dbias.view(batch, heads, whole)[:, :, :kv_len]
        dbias = (dbias.sum(1, keepdim=True) if key_bias.shape[1] != heads else dbias).to(key_bias.dtype).contiguous()
    if dgate is not None:
        dgate = dgate.view(block_gate.shape).to(block_gate.dtype)
    found = [] if proxy is None else [x.view(y.shape).to(y.dtype) for x, y in zip(dproxy, proxy)]
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), dbias, dgate, *found


def _add_proxy_gradients(p_npN: Tensor, q_npD, go_npD, delta_np1, dq_npD, proxies: Proxies, head: int, scale: float, dproxy: list[Tensor]) -> None:
    """Adds what the probabilities of proxies give to dQ (without the scale) and to the gradients of their keys, values and log sizes."""
    p, q, go, dq = (x.view(-1, x.shape[-1]) for x in (p_npN, q_npD, go_npD, dq_npD))
    dkeys, dvalues, dbias = (x[head] for x in dproxy)
    dvalues.addmm_(p.T, go)
    ds = torch.mm(go, proxies.values[head].T).sub_(delta_np1.reshape(-1, 1)).mul_(p)
    dbias += ds.sum(0)
    dq.addmm_(ds, proxies.keys[head])
    dkeys.addmm_(ds.T, q, alpha=scale)


def _row_products(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, S, 1) in dtype: <x, y> of every row; head by head, since both are converted for it."""
    products = torch.empty(*x.shape[:3], 1, dtype=dtype)
    for b, h in itertools.product(range(x.shape[0]), range(x.shape[1])):
        torch.sum(x[b, h].to(dtype) * y[b, h].to(dtype), -1, keepdim=True, out=products[b, h])
    return products


def _add_column_gradient(column: Tensor, b: Batch, layout: Layout, dbias: Tensor | None, dgate: Tensor | None) -> None:
    """Adds (n, L) column sums of dS to the gradients of key_bias and of block_gate."""
    n = b.shape[0]
    if dbias is not None:
        dbias.view(-1, layout.kv_tile).index_add_(0, b.sum_index, column.view(-1, layout.kv_tile))
    if dgate is not None:
        if b.slot is None:
            slots = column.view(n, b.slots, layout.kv_tile).sum(-1)
        else:
            slots = torch.zeros(n, b.slots, dtype=column.dtype).scatter_add_(1, b.slot, column)
        dgate[:, b.first_slot : b.first_slot + b.slots].index_add_(0, b.lists, slots)
