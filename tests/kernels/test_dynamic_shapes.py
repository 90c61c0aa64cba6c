"""torch.compile over changing lengths and counts: budgets and prompts vary, and no operation may be built anew for each."""

import pytest
import torch
from companion_checks import assert_compiles_once
from usv_kernels import block_pool, block_sparse_attention, kmeans, norm_rope, permute, select_top_k, select_top_p

BLOCKS = (9, 12, 17, 20)


def layout(blocks):
    sizes = torch.full((blocks,), 8, dtype=torch.int32)
    return (sizes.cumsum(0, dtype=torch.int32) - sizes, sizes) * 2


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def sparse(q, k, v, num_kept, starts, sizes, *kv):
    """Pooling, both selections, and attention: a layer's use of them."""
    pooled = [block_pool(x, starts, sizes, impl="cpu") for x in (q, k)]
    scores = pooled[0] @ pooled[1].transpose(-1, -2)
    selection = select_top_k(scores, num_kept, starts, sizes, *kv, impl="cpu")
    other = select_top_p(scores, 0.5, 0.1, starts, sizes, *kv, impl="cpu")
    return (*block_sparse_attention(q, k, v, selection, impl="cpu"), *block_sparse_attention(q, k, v, other, impl="cpu"))


def test_lengths_and_counts_of_attention():
    calls = [(*(randn(1, 2, 8 * n, 16) for _ in range(3)), kept, *layout(n)) for n, kept in zip(BLOCKS, (2, 3, 5, 4), strict=True)]
    assert_compiles_once(sparse, calls)


def test_counts_alone():
    q, k, v = (randn(1, 2, 72, 16) for _ in range(3))
    assert_compiles_once(sparse, [(q, k, v, kept, *layout(9)) for kept in (2, 3, 5, 4)])


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, index: (permute(x, index, impl="cpu"),), lambda n: (randn(1, 2, n, 8), torch.arange(n).flip(0))),
        (lambda x, w, f: (norm_rope(x, w, 1e-6, f, f, impl="cpu"),), lambda n: (randn(1, n, 32), randn(32), randn(1, n, 1, 8))),
        (lambda x: (kmeans(x, 3, 2, impl="cpu").centroids,), lambda n: (randn(1, 2, n, 8),)),
    ],
    ids=("permute", "norm_rope", "kmeans"),
)  # fmt: skip
def test_lengths(function, inputs):
    assert_compiles_once(function, [inputs(8 * n) for n in BLOCKS])
