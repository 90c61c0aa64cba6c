"""The backward of the CPU path. It recomputes the scores, so no score matrix is kept, and adds dK and dV in list order, so it is deterministic.

Letters as in `cpu.py`.
"""

import itertools

import torch
from torch import Tensor

from .._products import fast_products
from .cpu_plan import Batch, Layout, make_batch, make_plan, pieces
from .cpu_tensors import Proxies, Scratch, column_bias, exponential, inputs, put, scores, units


@fast_products
def backward(grad_out, grad_lse, q, k, v, out, lse, selection_tensors, key_bias, block_gate, scale: float, q_max: int = 0,
             kv_max: int = 0, proxy=None):  # fmt: skip
    """Gradients of q, k, v, key_bias and block_gate (None for an absent argument), and of the three tensors of a proxy. grad_lse may
    be None."""
    batch, heads, kv_len, dim = k.shape
    dtype = lse.dtype
    layout = make_plan(selection_tensors, q.shape[2], kv_len, proxy is not None)
    q_units, k_units, v_units, bias, gate = inputs(q, k, v, key_bias, block_gate, layout, dtype)
    proxies = None if proxy is None else Proxies(proxy, layout, dtype, scale, 1.0)
    dproxy = None if proxy is None else [torch.zeros(x.shape[0] * x.shape[1], *x.shape[2:], dtype=dtype) for x in proxy]
    delta = _row_products(grad_out, out, dtype)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    # A row without keys has lse = -inf; +inf makes its probabilities exp(s - inf) = 0 instead of NaN.
    lse = torch.where(lse == float("-inf"), float("inf"), lse).unsqueeze(-1)
    go_units, lse_units, delta_units = (units(x, layout.q_unit) for x in (grad_out, lse, delta))
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
            q_npD = scratch.take("q", q_units, b.rows.index, n, p, dim)
            go_npD = scratch.take("go", go_units, b.rows.index, n, p, dim)
            lse_np1 = scratch.take("lse", lse_units, b.rows.index, n, p, 1)
            delta_np1 = scratch.take("delta", delta_units, b.rows.index, n, p, 1)
            if b.rows.invalid is not None:
                lse_np1 = lse_np1.masked_fill(b.rows.invalid.unsqueeze(-1), float("inf"))
            dq_npD, begun = scratch("o", n, p, dim), False
            for piece in pieces(b, layout.kv_tile):
                length = piece.shape[2]
                here = piece.sum_index - part.heads.start * (whole // layout.kv_tile)
                k_nLD = scratch.take("k", k_units[b.kv_unit], piece.kv_index, n, length, dim)
                s = scores(q_npD, k_nLD, column_bias(piece, layout, bias, gate, dtype), scale, scratch("s", n, p, length))
                exponential(s.sub_(lse_np1))
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
                s = proxies.scores(q_npD, b.lists, scratch)
                exponential(s.sub_(lse_np1))
                _add_proxy_gradients(s, q_npD, go_npD, delta_np1, dq_npD if begun else dq_npD.zero_(), proxies, proxies.head(b.lists), scale, dproxy)
            dq_npD = torch.mul(dq_npD, scale, out=scratch.place("dq", dq, b.rows.index, n, p, dim))
            put(dq, b.rows, dq_npD)
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
    dq.addmm_(ds, proxies.keys_GDN[head].T)
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
