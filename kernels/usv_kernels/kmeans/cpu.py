"""The two halves of a k-means iteration on the CPU: one matrix product per chunk of tokens, and whole-row additions."""

import torch
from torch import Tensor

from .._impl import accumulator

LIMIT = 1 << 18  # scores that exist at one time: 1 MB in float32 stays in a core's cache between product and argmax


def assign(x_BHSD: Tensor, centroids_BHKD: Tensor) -> Tensor:
    """argmin |x - c|^2 = argmax (x.c - |c|^2 / 2), of tokens and centroids less the mean centroid: no cancellation."""
    batch, heads, length, _ = x_BHSD.shape
    acc = accumulator(x_BHSD.dtype)
    centroids = centroids_BHKD.to(acc)
    clusters = centroids.shape[2]
    offset = centroids.mean(2, keepdim=True)
    centroids = centroids - offset
    bias = centroids.square().sum(-1).mul(-0.5).unsqueeze(2)
    out = torch.empty(batch, heads, length, dtype=torch.int64)
    # Whole heads together while they fit, else one head in chunks: a chunk of all heads would be a few rows of each.
    group = max(LIMIT // max(length * clusters, 1), 1)
    step = length if group > 1 else max(LIMIT // clusters, 1)
    for b in range(batch):
        for h in range(0, heads, group):
            part = (b, slice(h, h + group))
            for start in range(0, length, max(step, 1)):
                here = (*part, slice(start, start + step))
                scores = torch.baddbmm(bias[part], x_BHSD[here].to(acc) - offset[part], centroids[part].transpose(1, 2))
                out[here] = scores.max(-1).indices  # the first of equals, like argmax, in two thirds of its time
    return out


def update(x_BHSD: Tensor, assignment_BHS: Tensor, centroids_BHKD: Tensor) -> tuple[Tensor, Tensor]:
    """Sums in float64: a cluster may hold every token, and a running float32 sum over 75,600 of them is not a mean."""
    batch, heads, length, dim = x_BHSD.shape
    clusters = centroids_BHKD.shape[2]
    total = torch.zeros(batch * heads * clusters, dim, dtype=torch.float64)
    flat = assignment_BHS + torch.arange(batch * heads).view(batch, heads, 1) * clusters
    step = max(LIMIT // max(batch * heads * dim, 1), 1)
    for start in range(0, length, step):
        rows = x_BHSD[:, :, start : start + step].to(torch.float64).reshape(-1, dim)
        total.index_add_(0, flat[:, :, start : start + step].reshape(-1), rows)
    counts = torch.bincount(flat.flatten(), minlength=total.shape[0]).view(batch, heads, clusters)
    mean = (total.view(centroids_BHKD.shape) / counts.clamp(min=1)[..., None]).to(centroids_BHKD.dtype)
    return torch.where(counts[..., None] > 0, mean, centroids_BHKD), counts
