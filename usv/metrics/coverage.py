"""Is everything there that is real? Share of real clips that a set of clips comes near to.

    coverage = mean_i 1[ min_j ‖r_i − g_j‖ ≤ d_i ],      d_i the distance from real clip i to its k-th nearest real neighbour

After Naeem et al. 2020 (arXiv 2002.09797). A model that draws one clip well and always the same has a fine Fréchet distance in each of
its subjects' details and no coverage; one that adds what is not real keeps it. Read it beside the floor, real clips against real clips.
"""

from __future__ import annotations

import torch

from usv.metrics.frechet import check_features

NEIGHBOURS = 5


def coverage(reference_features: torch.Tensor, features: torch.Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share in [0, 1] of reference clips (m, D) with one of `features` (n, D) within the distance of their k-th real neighbour.

    Raises ValueError as `frechet_distance` does, or where `neighbours` is not below m.
    """
    real, made = (torch.from_numpy(check_features(x, name)) for x, name in ((reference_features, "reference_features"), (features, "features")))
    if not 0 < neighbours < len(real):
        raise ValueError(f"neighbours: got {neighbours}, expected 1 to {len(real) - 1}, below the number of reference clips")
    if real.shape[1] != made.shape[1]:
        raise ValueError(f"features: got {made.shape[1]} dimensions, expected those of reference_features, {real.shape[1]}")
    reach = torch.cdist(real, real).kthvalue(neighbours + 1, 1).values  # the nearest of all is the clip itself
    return float((torch.cdist(real, made).amin(1) <= reach).double().mean())
