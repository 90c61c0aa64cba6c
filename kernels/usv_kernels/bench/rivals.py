"""Other block-sparse attentions on the same lists: each optional, and left out with the reason where it is absent.

A rival gets (q, k, v, selection, block, passes) and returns a function that computes out (B, H, S, D), or raises `Absent`. Whoever is
timed has been held to our result first (`attention.rivals`). Interfaces: FlexAttention of torch 2.11 to 2.13; cuDNN frontend's BSA
(experimental, https://docs.nvidia.com/cudnn/operations/sparse_attention/bsa); flashinfer.sparse. The last two were read,
not run: no GPU was at hand.
"""

import importlib
from functools import cache

import torch
from torch import Tensor

from ..selection import BlockSelection


class Absent(Exception):
    """Why a rival is left out."""


def _module(name: str, package: str):
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise Absent(f"{name} does not import ({error}); pip install {package}") from error


def _needs(condition: bool, reason: str) -> None:
    if not condition:
        raise Absent(reason)


def flex(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, block: int, passes: str):
    """FlexAttention, compiled, with the mask of the same blocks built in the first call, which is not timed."""
    from ..block_sparse_attention import flex as attention

    _needs(passes == "forward" or q.is_cuda, "FlexAttention has no CPU backward")

    @cache
    def mask():
        return attention.block_mask(selection, block, q.shape[2], k.shape[2])

    return lambda: attention.compiled()(q, k, v, block_mask=mask(), kernel_options=attention.kernel_options(q, block))


def cudnn(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, block: int, passes: str):
    """cuDNN frontend's block-sparse attention, whose backward is a call of its own and is not timed."""
    _needs(q.is_cuda, "it needs an NVIDIA GPU")
    _needs(passes == "forward", "its backward is no autograd function; only its forward is timed")
    _needs(q.dtype == torch.bfloat16 and q.shape[-1] in (64, 128), f"bf16 and D 64 or 128, not {q.dtype} and {q.shape[-1]}")
    _needs(len(set(selection.kv_num_blocks.flatten().tolist())) == 1, "lists of one length")
    bsa = _module("cudnn", "nvidia-cudnn-frontend").BSA
    number, sizes = int(selection.kv_num_blocks.flatten()[0]), selection.kv_sizes.contiguous()
    lists = selection.kv_indices[..., :number].contiguous()
    return lambda: bsa.block_sparse_attention_forward(q, k, v, lists, number, sizes, sparse_block_size=block)[0]


def flashinfer(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, block: int, passes: str):
    """flashinfer's block-sparse attention with a list for each head; planned once, not timed; no backward, batch 1."""
    _needs(q.is_cuda, "it needs an NVIDIA GPU")
    _needs(passes == "forward", "it has no backward")
    _needs(q.shape[0] == 1, "one sequence at a time")
    sparse = _module("flashinfer.sparse", "flashinfer-python")
    wrapper = sparse.VariableBlockSparseAttentionWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=q.device))
    heads = q.shape[1]
    sizes = (x.expand(1, heads, x.shape[-1])[0].contiguous() for x in (selection.q_sizes, selection.kv_sizes))
    wrapper.plan(selection.to_mask()[0], *sizes, heads, heads, q.shape[-1], q_data_type=q.dtype)
    return lambda: wrapper.run(q[0], k[0], v[0]).unsqueeze(0)


RIVALS = {"flex": flex, "cudnn": cudnn, "flashinfer": flashinfer}
