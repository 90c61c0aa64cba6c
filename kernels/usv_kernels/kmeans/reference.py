"""The two halves of a k-means iteration in plain torch: differences, not dot products, so that nothing cancels."""

import torch
from torch import Tensor

from .._impl import accumulator

CHUNK = 4096  # tokens whose distances exist at one time: 4096 x 1000 clusters in float32 are 16 MB per head


def assign(x_BHSD: Tensor, centroids_BHKD: Tensor) -> Tensor:
    """(B, H, S) int64, the nearest centroid; ties: the lower cluster index."""
    centroids = centroids_BHKD.to(accumulator(x_BHSD.dtype))
    parts = []
    for chunk in x_BHSD.split(CHUNK, dim=2):
        distance = torch.cdist(chunk.to(centroids.dtype), centroids, compute_mode="donot_use_mm_for_euclid_dist")
        parts.append(distance.argmin(-1))
    return torch.cat(parts, dim=2)


def update(x_BHSD: Tensor, assignment_BHS: Tensor, centroids_BHKD: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids, the mean of their tokens or unchanged where there are none, and counts (B, H, K) int64."""
    index = assignment_BHS[..., None].expand(x_BHSD.shape)
    total = torch.zeros_like(centroids_BHKD, dtype=torch.float64).scatter_add_(2, index, x_BHSD.double())
    ones = torch.ones_like(assignment_BHS)
    counts = torch.zeros_like(centroids_BHKD[..., 0], dtype=torch.int64).scatter_add_(2, assignment_BHS, ones)
    mean = total / counts.clamp(min=1)[..., None]
    return torch.where(counts[..., None] > 0, mean.to(centroids_BHKD.dtype), centroids_BHKD), counts
