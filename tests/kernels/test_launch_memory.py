"""What the GPU path allocates, counted without a GPU: everything is allocated by torch before and between the kernels, which here do nothing.

Held to dense flash attention at equal shapes, as torch runs it: out and lse forward; backward the three gradients, an fp32
accumulator of dQ and one fp32 number a row.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from usv_kernels import BlockSelection
from usv_kernels.block_sparse_attention import triton_launch

KERNELS = ("forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel", "gate_sum_kernel")


class Peak(TorchDispatchMode):
    """Bytes of the tensors that live at one time of those made inside."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self.live:
                storage = x.untyped_storage()
                self.live.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def gone(self, key, size):
        self.live.discard(key)
        self.now -= size


class InterpretedFunction:  # the name by which CPU tensors are let through
    def __getitem__(self, grid):
        return lambda *arguments, **named: None


def test_the_count_itself():
    with Peak() as peak:
        x = torch.zeros(1000)
        y = x.view(10, 100) + 1
        del x
        z = y.double()
    assert peak.now == 12000 and peak.peak == 12000 and z.shape == (10, 100)
    del y, z
    assert peak.now == 0


@pytest.mark.parametrize("dim", (64, 128))
@pytest.mark.parametrize("share", (1 / 32, 1 / 8, 1 / 2, 1))
def test_no_more_than_dense_flash_attention(monkeypatch, dim, share):
    for name in KERNELS:
        monkeypatch.setattr(triton_launch, name, InterpretedFunction())
    heads, length, block = 1, 32760, 64
    count = -(-length // block)
    sizes = torch.full((count,), block)
    sizes[-1] = length - (count - 1) * block
    kept = round(share * count)
    mask = torch.zeros(1, heads, count, count, dtype=torch.bool)
    mask.scatter_(-1, torch.rand(1, heads, count, count).argsort(-1)[..., :kept], True)
    selection = BlockSelection.from_mask(mask, sizes, sizes, capacity=kept)
    q = torch.zeros(1, heads, length, dim, dtype=torch.bfloat16)
    lists = (selection.tensors(), None, None, 1.0, block, block)
    one, row = q.nbytes, 4 * heads * length
    with Peak() as forward:
        out, lse = triton_launch.forward(q, q, q, *lists)
    assert forward.peak <= 1.01 * (one + row), "out and lse, and tables of a few integers a tile"
    with Peak() as backward:
        triton_launch.backward(q, None, q, q, q, out, lse, *lists)
    rounded = -(-length // 128) * 128
    flash = 3 * one + 4 * heads * rounded * (dim + 1)
    assert backward.peak <= flash, f"{backward.peak / flash:.2f} of flash attention's"
