"""QK^T of int8 on a CPU whose integer units multiply it (VNNI): a quarter of the bytes to gather and three times the rate of fp32.

    s_ij = scale * q_scale_i k_scale_j <q8_i, k8_j>,    q8, k8 as `low_precision` rounds them

k8 and its scales are made once, a few thousand tokens at a time; q8 when its rows are taken, with one scale a work item, which is
a query block or at most 256 rows of one. The int32 products of torch._int_mm lie in the buffer of the scores and become fp32 in place.
"""

import torch
from torch import Tensor

from .cpu_plan import Batch, Layout
from .cpu_tensors import Scratch, key_units, longest
from .low_precision import INT8_TOP, round_to

AT_ONCE = 2048  # keys quantised at a time, so that their fp32 stays in cache


class Int8Logits:
    """As `cpu.ExactLogits`, from int8 products. scale: of the dot products, in units of EXP; set before a run begins."""

    def __init__(self, q_units: Tensor, k: Tensor, layout: Layout, dtype: torch.dtype):
        self.q_units, self.dim, self.number = q_units, k.shape[3], layout.num_q
        keys = torch.empty(k.shape, dtype=torch.int8)
        scales = torch.empty(*k.shape[:3], 1, dtype=dtype)
        self.means = k.mean(2, dtype=dtype).flatten(0, 1)  # (G, D)
        self.longest, self.scale = 0.0, 1.0
        for head, mean in enumerate(self.means):
            source, to, scale = (x.flatten(0, 1)[head] for x in (k, keys, scales))
            for first in range(0, len(source), AT_ONCE):
                here = slice(first, first + AT_ONCE)
                x = source[here].to(dtype) - mean
                self.longest = max(self.longest, longest(x))
                to[here], scale[here] = round_to(x, x.abs().amax(-1, keepdim=True), torch.int8)
        self.k_units, self.scale_units = key_units(keys, layout.kv_tile), key_units(scales, layout.kv_tile)

    def longest_key(self) -> float:
        return self.longest

    def begin(self, index, shape: tuple[int, int], scratch: Scratch) -> Tensor:
        """(n, p, D) query rows of a run; makes their int8."""
        self.q_npD = q = scratch.take("q", self.q_units, index, *shape, self.dim)
        rounded = self.rounded = scratch("q rounded", *shape, self.dim)
        self.q_scale = torch.abs(q, out=rounded).amax((1, 2), keepdim=True).mul_(1 / INT8_TOP)
        torch.div(q, self.q_scale.clamp(min=torch.finfo(q.dtype).tiny), out=rounded).round_()
        self.q8 = scratch("q8", *shape, self.dim, dtype=torch.int8).copy_(rounded).unbind(0)
        self.q_scale.mul_(self.scale)
        return q

    def __call__(self, items: slice, piece: Batch, column: Tensor | None, scratch: Scratch) -> Tensor:
        """(n, p, L) for items of the run and a piece of their lists."""
        n, p, length = piece.shape
        units, index = self.k_units[piece.kv_unit], piece.kv_index
        k8 = torch.index_select(units, 0, index, out=scratch("k8", len(index), units.shape[1], dtype=torch.int8)).view(n, length, self.dim)
        s = scratch("s", n, p, length)
        products = s if s.dtype == torch.float32 else scratch("products", n, p, length, dtype=torch.float32)
        products = products.view(torch.int32)
        for q_pD, k_DL, product in zip(self.q8[items], k8.transpose(1, 2).unbind(0), products.unbind(0)):
            torch._int_mm(q_pD, k_DL, out=product)
        factor = scratch.take("factor", self.scale_units[piece.kv_unit], index, n, 1, length).mul_(self.q_scale[items])
        s.copy_(products).mul_(factor)  # in place: every value lies where its product did
        return s if column is None else s.add_(column.unsqueeze(1))

    def lse_shift(self, lists: Tensor, scale: float) -> Tensor:
        """(n, p, 1) scale <q, mean key>, which smoothing took from every logit of a row."""
        means = self.means[lists // self.number].unsqueeze(1)  # a product of so few columns is slower as bmm
        return torch.mul(self.q_npD, means, out=self.rounded).sum(-1, keepdim=True).mul_(scale)
