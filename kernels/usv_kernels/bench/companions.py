"""What a sparse attention spends around its kernel: pooling, selection, permutation, as a share of the attention's own time.

One call pools q, k and v, scores and selects blocks from the pooled q and k, and permutes q, k, v and back the output. The
last is what a pattern with its own token order pays in every layer (SVG, SVG2); one that orders its tokens once a forward
(USV) pays none of it, so both sums are given.
"""

import math

import torch

from .. import block_pool, block_sparse_attention, inverse_permutation, permute, select_top_k
from .timing import measure, tiles

GOAL = 0.10


def companions(heads: int, length: int, dim: int, density: float, block: int, dtype: torch.dtype, device: str, impl: str, budget: float) -> list[dict]:
    """Rows of one shape, forward, then forward and backward, each with its share of the attention time in the same run."""
    rows = []
    for backward in (False, True):
        parts = functions(heads, length, dim, density, block, dtype, device, impl, backward)
        times = measure(parts, device, budget)
        for found in times.values():
            found.pop("seconds")
        median = {name: times[name]["median_ms"] for name in times}
        once = (median["pooling"] + median["selection"]) / median["attention"]
        row = {"pass": "forward+backward" if backward else "forward", "S": length, "D": dim, "H": heads, "block": block,
               "dtype": str(dtype).removeprefix("torch."), "density": density, "times": times,
               "share_of_attention": once + median["permutation"] / median["attention"], "goal": GOAL,
               "share_without_permutation": once}  # fmt: skip
        rows.append(row)
        print(f"S {length} D {dim} density {density:.3f} {row['dtype']} {row['pass']}: " + ", ".join(f"{n} {t:.2f} ms" for n, t in median.items())
              + f"; {row['share_of_attention']:.1%} of the attention, {once:.1%} without permutation", flush=True)  # fmt: skip
    return rows


def functions(heads, length, dim, density, block, dtype, device, impl, backward: bool) -> dict:
    """Name -> what is timed. Selection has no gradient; it counts the same in both passes."""
    q, k, v, grad = (torch.randn(1, heads, length, dim, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    sizes = tiles(length, block).to(torch.int32)
    starts = (sizes.cumsum(0) - sizes).to(torch.int32)
    bounds = {"q_max": block, "kv_max": block}
    starts, sizes = starts.to(device), sizes.to(device)
    pooled = [block_pool(x.detach(), starts, sizes, impl=impl) for x in (q, k)]
    num_kept = max(1, round(density * len(sizes)))
    order = torch.argsort(torch.rand(1, heads, length, device=device), -1)
    inverse = inverse_permutation(order)

    def selection():
        scores = pooled[0] @ pooled[1].transpose(-1, -2) / math.sqrt(dim)
        return select_top_k(scores, num_kept, starts, sizes, starts, sizes, impl=impl, **bounds)

    lists = selection()

    def differentiated(outputs, inputs, grads):
        if backward:
            torch.autograd.grad(outputs, inputs, grads)

    def attention():
        differentiated(block_sparse_attention(q, k, v, lists, impl=impl)[0], leaves, grad)

    def pooling():
        means = [block_pool(x, starts, sizes, impl=impl) for x in leaves]
        differentiated(means, leaves, [pooled[0], pooled[1], pooled[1]])

    def permutation():
        moved = [permute(x, order, impl=impl) for x in leaves]
        differentiated(moved, leaves, [grad] * 3)
        back = permute(q, inverse, impl=impl)
        differentiated(back, q, grad)

    return {"attention": attention, "pooling": pooling, "selection": selection, "permutation": permutation}
