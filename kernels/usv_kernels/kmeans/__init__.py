"""k-means over the tokens of every batch and head.

    assign   a_s = argmin_k |x_s - c_k|^2, ties to the lower index
    update   c_k = mean of the x_s with a_s = k; a cluster without tokens keeps its centroid

SVG2 (https://arxiv.org/abs/2505.18875) clusters queries and keys with it: many iterations once, then two from the
cached centroids of the previous step. `assignment.argsort(stable=True)` is the permutation that makes clusters
contiguous, `counts` their sizes. No gradient: x is detached. Distances exist for a chunk of tokens at a time, never
S x K at once. Limits: Triton needs D <= 128.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_shape, require
from .._impl import accumulator, check_float, custom_op, require_triton, resolve
from . import cpu, reference

__all__ = ["Clusters", "kmeans"]


class Clusters(NamedTuple):
    """assignment (B, H, S) int64; centroids (B, H, K, D) float32, or float64 as the input; counts (B, H, K) int64."""

    assignment: Tensor
    centroids: Tensor
    counts: Tensor


def kmeans(x: Tensor, k: int, iters: int, init: Tensor | None = None, impl: str = "auto") -> Clusters:
    """Lloyd's iteration: assign, update, `iters` times.

    Args:
        x: (B, H, S, D) floating, any strides; equal tokens are fine.
        k: clusters, 1..S.
        iters: iterations; 0 only assigns to `init`.
        init: (B, H, k, D) centroids to start from. Default: k tokens evenly spaced over the sequence.
        impl: auto | reference | cpu | triton.

    Returns:
        Clusters. The assignment is the last one made, and with iters > 0 centroids are the means of that assignment.

    Raises:
        ValueError: k not in 1..S, iters negative, or 0 without init, wrong shape, dtype, device or impl.
    """
    check_float("x", x, 4, "(B, H, S, D)")
    batch, heads, length, dim = x.shape
    require(1 <= k <= length, "k", k, lambda: f"an integer in 1..{length} (S)")
    require(iters >= (0 if init is not None else 1), "iters", iters, "at least 1, or 0 with init")
    impl = resolve("kmeans", impl, x, ("reference", "cpu", "triton"), (dim <= 128, "x", lambda: f"D = {dim}", "D <= 128 for impl='triton'"))
    x = x.detach()
    if init is None:
        init = x[:, :, torch.arange(k, device=x.device) * length // k]
    else:
        check_shape("init", init, (batch, heads, k, dim), "(B, H, k, D)")
        require(init.device == x.device, "init", f"device {init.device}", f"{x.device}")
    centroids = init.detach().to(accumulator(x.dtype)).contiguous()
    if iters == 0:
        assignment = _assign(x, centroids, impl)
        return Clusters(assignment, centroids, _update(x, assignment, centroids, impl)[1])
    for _ in range(iters):
        assignment = _assign(x, centroids, impl)
        centroids, counts = _update(x, assignment, centroids, impl)
    return Clusters(assignment, centroids, counts)


def _backend(impl: str, x: Tensor):
    if impl != "triton":
        return cpu if impl == "cpu" else reference
    require_triton(x)
    from . import triton as backend

    return backend


@custom_op("kmeans_assign")
def _assign(x: Tensor, centroids: Tensor, impl: str) -> Tensor:
    return _backend(impl, x).assign(x, centroids)


@custom_op("kmeans_update")
def _update(x: Tensor, assignment: Tensor, centroids: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _backend(impl, x).update(x, assignment, centroids)


@_assign.register_fake
def _(x, centroids, impl):
    return x.new_empty(x.shape[:3], dtype=torch.int64)


@_update.register_fake
def _(x, assignment, centroids, impl):
    return torch.empty_like(centroids), centroids.new_empty(centroids.shape[:3], dtype=torch.int64)
