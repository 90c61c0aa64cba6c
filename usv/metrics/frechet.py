"""Fréchet distance between two sets of clip features, made sound for a hundred clips, and confidence intervals.

    FD² = |μa − μb|² + tr(Ca + Cb − 2 (Ca^½ Cb Ca^½)^½)        Heusel et al. 2017 (arXiv 1706.08500)

With 2,560 dimensions and ~100 clips the covariances are rank-deficient and the plain formula mostly measures n. So the
features go through fixed random orthonormal projections to 64 dimensions (the same for everyone, hence comparable
between runs), the covariances are shrunk (Ledoit & Wolf 2004), and the results are averaged over the projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from usv.metrics.checks import check_labels

PROJECTED_DIM = 64
NUM_PROJECTIONS = 4
MIN_CLIPS = 16


@lru_cache(maxsize=4)
def _projections(dim: int) -> np.ndarray:
    """(NUM_PROJECTIONS, dim, d) with orthonormal columns, d = min(64, dim), scaled so that squared lengths are kept."""
    generator = np.random.Generator(np.random.PCG64(20240229))  # any fixed number: part of the metric's definition
    low = min(PROJECTED_DIM, dim)
    bases = [np.linalg.qr(generator.standard_normal((dim, low)))[0] for _ in range(NUM_PROJECTIONS)]
    return np.stack(bases) * np.sqrt(dim / low)


def _sqrt(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _moments(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and square root of the shrunk covariance under each projection."""
    from sklearn.covariance import ledoit_wolf

    out = []
    for projection in _projections(points.shape[1]):
        low = points @ projection
        # Constant features (a collapsed model) have zero covariance, where the shrinkage intensity is undefined.
        constant = np.ptp(points, axis=0).max() == 0
        out.append((low.mean(0), np.zeros((low.shape[1],) * 2) if constant else _sqrt(ledoit_wolf(low)[0])))
    return out


def _distance(moments_a: list, moments_b: list) -> float:
    distances = []
    for (mean_a, root_a), (mean_b, root_b) in zip(moments_a, moments_b, strict=True):
        # tr((Ca^½ Cb Ca^½)^½) is the nuclear norm of Ca^½ Cb^½: no square root of a non-symmetric matrix needed.
        overlap = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
        traces = np.square(root_a).sum() + np.square(root_b).sum()
        distances.append(np.square(mean_a - mean_b).sum() + traces - 2 * overlap)
    return max(0.0, float(np.mean(distances)))


def check_features(features: torch.Tensor, name: str, min_clips: int = MIN_CLIPS) -> np.ndarray:
    """`features` as fp64 (n, D). ValueError unless 2-D, finite and with at least `min_clips` rows."""
    array = torch.as_tensor(features).detach().double().cpu().numpy()
    if array.ndim != 2 or len(array) < min_clips:
        raise ValueError(f"{name}: got shape {array.shape}, expected (n, D) with n ≥ {min_clips} clips")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite features")
    return array


def _check_pair(features_a: torch.Tensor, features_b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    a, b = check_features(features_a, "features_a"), check_features(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_b: got {b.shape[1]} dimensions, expected those of features_a, {a.shape[1]}")
    return a, b


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Squared Fréchet distance of two feature sets (n, D) and (m, D), in squared feature units; symmetric, ≥ 0.

    How many clips: at least 16 are required; from 120 a side it ranks methods soundly; below that, differences between
    small distances are noise. Two disjoint sets of the same distribution do not give 0 but a floor that falls
    with n, so compare only values taken with equal n and read them beside the floor (real against real).

    Raises ValueError for tensors that are not 2-D, finite, of equal D and with at least 16 rows.
    """
    a, b = _check_pair(features_a, features_b)
    return _distance(_moments(a), _moments(b))


def frechet_ci(
    reference_features: torch.Tensor,
    features: torch.Tensor,
    strata: Sequence | None = None,
    confidence: float = 0.95,
    num_resamples: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval (low, high) of `frechet_distance(reference_features, features)` over the choice of `features`.

    Random halves without replacement (McCarthy 1969), whose spread equals the standard error of the whole; centred on
    the distance itself. The bootstrap will not do: repeated clips alone raised a distance of 10 to 65. `strata`: a
    label per clip, e.g. its subject, halved separately, because prompts are chosen and not drawn. The reference is held
    fixed. (m, D) and (n, D) features, n ≥ 32. Raises ValueError like `frechet_distance`, or for a wrong number of
    strata.
    """
    reference, points = _check_pair(reference_features, features)
    check_features(features, "features", 2 * MIN_CLIPS)
    labels = [0] * len(points) if strata is None else check_labels(strata, len(points), "strata")
    groups = [np.flatnonzero([x == label for x in labels]) for label in dict.fromkeys(labels)]
    rng, fixed = np.random.default_rng(seed), _moments(reference)
    centre, halves = _distance(fixed, _moments(points)), []
    for _ in range(num_resamples):
        # An odd group gives its middle clip to half of the halves.
        rows = [rng.permutation(group)[: (len(group) + rng.integers(2)) // 2] for group in groups]
        halves.append(_distance(fixed, _moments(points[np.concatenate(rows)])))
    tail = (1 - confidence) / 2
    low, high = centre + np.quantile(halves, [tail, 1 - tail]) - np.mean(halves)
    return max(0.0, float(low)), float(high)


def bootstrap_ci(
    fn: Callable[..., float],
    *samples: torch.Tensor,
    paired: bool = False,
    confidence: float = 0.95,
    num_resamples: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of `fn(*samples)` by resampling the rows of each sample.

    fn takes as many tensors as given and returns a number; samples are (n, ...) tensors, resampled independently, or by
    the same rows where `paired` (a video and its twin). Rows drawn by scipy.stats.bootstrap (Efron 1979). For means and
    accuracies; the Fréchet distance has its own `frechet_ci`. Raises ValueError for samples of fewer than two
    rows, or of unequal length where paired.
    """
    from scipy.stats import bootstrap

    if not samples or any(len(sample) < 2 for sample in samples):
        raise ValueError(f"samples: got {[len(sample) for sample in samples]} rows, expected at least 2 in each")
    if paired and len({len(sample) for sample in samples}) > 1:
        raise ValueError(f"samples: got {[len(sample) for sample in samples]} rows, expected equal numbers (paired)")

    def statistic(*rows: np.ndarray) -> float:
        return float(fn(*(sample[torch.from_numpy(index)] for sample, index in zip(samples, rows, strict=True))))

    indices = [np.arange(len(sample)) for sample in samples]
    interval = bootstrap(
        indices,
        statistic,
        n_resamples=num_resamples,
        vectorized=False,
        paired=paired,
        method="percentile",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
