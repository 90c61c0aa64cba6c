"""What forward and backward of the CPU path share: buffers, rows to gather, what is added to the logits, proxies.

Letters as in `cpu.py`: G = B * H, n items of a batch, p query rows of an item, L tokens of its list, c slots of its list, D channels.
"""

import math

import torch
from torch import Tensor

from .._products import has_mkl_exp
from .cpu_plan import Batch, Layout, Rows

LOG2E = math.log2(math.e)
# Logits are multiplied by UNIT, then `exponential` takes their exp.
EXP, UNIT = (torch.exp, 1.0) if has_mkl_exp() else (torch.exp2, LOG2E)


def units(x: Tensor, tile: int) -> Tensor:
    """(B, H, S, d) -> (G * S / tile, tile * d)."""
    return x.reshape(-1, tile * x.shape[-1])


def key_units(x: Tensor, tile: int) -> dict[int, Tensor]:
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


def put(units: Tensor, rows: Rows, values: Tensor) -> None:
    """Writes query rows, computed in a buffer of `Scratch.place`, without their padding."""
    if isinstance(rows.index, slice):
        return
    index, values = rows.index, values.reshape(-1, units.shape[1])
    if rows.invalid is not None:
        valid = ~rows.invalid.reshape(-1)
        index, values = index[valid], values[valid]
    units.index_copy_(0, index, values.to(units.dtype))


def column_bias(b: Batch, layout: Layout, bias_units: dict[int, Tensor] | None, gate: Tensor | None, dtype) -> Tensor | None:
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


def scores(q_npD: Tensor, k_nLD: Tensor, column: Tensor | None, scale: float, s_npL: Tensor) -> Tensor:
    """s = scale q k^T + column, written there."""
    if column is not None:
        s_npL.copy_(column.unsqueeze(1))
    return s_npL.baddbmm_(q_npD, k_nLD.transpose(1, 2), beta=0 if column is None else 1, alpha=scale)


def exponential(s: Tensor) -> Tensor:
    """exp of natural logits, in place."""
    return EXP(s if UNIT == 1.0 else s.mul_(UNIT), out=s)


class Proxies:
    """Keys, values and log sizes (B, H, N) of what stands for blocks that are not listed; no gather: a head's are shared by its queries."""

    def __init__(self, proxy: tuple[Tensor, ...], layout: Layout, dtype: torch.dtype, scale: float, unit: float):
        """scale: of the dot products. unit: log2(e) where the logits are of exp2, else 1."""
        self.alpha = scale * unit
        keys, self.values = (x.flatten(0, 1).to(dtype) for x in proxy[:2])
        self.keys_GDN = keys.transpose(1, 2).contiguous()  # as products with few channels are fastest
        groups, number = keys.shape[:2]
        self.number, self.num_q = number, layout.num_q
        columns = proxy[2].reshape(groups, 1, number).to(dtype).expand(groups, layout.num_q, number).reshape(-1, number)
        used = torch.arange(layout.lists.shape[1]) < layout.counts.unsqueeze(-1)
        target = torch.where(used, layout.lists % max(number, 1), number)
        listed = torch.zeros(len(columns), number + 1, dtype=torch.bool).scatter_(1, target, True)[:, :number]
        self.columns = columns.masked_fill(listed, float("-inf")).mul_(unit)  # (G * M, N), which columns itself may only pretend to be

    def head(self, lists: Tensor) -> int:
        """Whose proxies the items with these lists meet; a run has items of one head."""
        return int(lists[0]) // self.num_q

    def scores(self, q_npD: Tensor, lists: Tensor, scratch: Scratch) -> Tensor:
        """(n, p, N) logits in the buffer of the scores."""
        n, p, _ = q_npD.shape
        s = scratch("s", n, p, self.number)
        s.copy_(self.columns.index_select(0, lists).unsqueeze(1))
        s.view(n * p, -1).addmm_(q_npD.view(n * p, -1), self.keys_GDN[self.head(lists)], alpha=self.alpha)
        return s


def inputs(q, k, v, key_bias, block_gate, layout: Layout, dtype):
    q_units = units(q, layout.q_unit)
    k_units, v_units = key_units(k, layout.kv_tile), key_units(v, layout.kv_tile)
    bias = None
    if key_bias is not None:
        bias = key_units(key_bias.expand(*k.shape[:3]).unsqueeze(-1).to(dtype), layout.kv_tile)
    gate = None if block_gate is None else block_gate.reshape(-1, block_gate.shape[-1]).to(dtype)
    return q_units, k_units, v_units, bias, gate


def longest(x: Tensor) -> float:
    """A bound on the norms of the rows of x. Taken in x's own dtype: it sums in fp32 and makes no converted copy; eps is for what
    rounding took off a norm."""
    if not x.numel():
        return 0.0
    norms = torch.linalg.vector_norm(x, dim=-1)
    return float(norms.nan_to_num(0.0, posinf=math.inf).amax()) * (1 + torch.finfo(x.dtype).eps)
