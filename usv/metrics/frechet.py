"""Fréchet distance between two sets of clip features, made sound for a hundred clips, and bootstrap intervals.

    FD² = |μa − μb|² + tr(Ca + Cb − 2 (Ca^½ Cb Ca^½)^½)        Heusel et al. 2017 (arXiv 1706.08500)

With 2,560 dimensions and ~100 clips the covariances are rank-deficient and the plain formula mostly measures n. So the
features go through fixed random orthonormal projections to 64 dimensions (the same for everyone, hence comparable
between runs), the covariances are shrunk (Ledoit & Wolf 2004), and the results are averaged over the projections.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

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


def _moments(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    from sklearn.covariance import ledoit_wolf

    # Constant features (a collapsed model) have zero covariance, where the shrinkage intensity is undefined.
    covariance = ledoit_wolf(points)[0] if points.std(0).max() > 0 else np.zeros((points.shape[1],) * 2)
    return points.mean(0), _sqrt(covariance), float(np.trace(covariance))


def check_features(features: torch.Tensor, name: str) -> np.ndarray:
    """`features` as fp64 (n, D). ValueError unless 2-D, finite and with at least MIN_CLIPS rows."""
    array = torch.as_tensor(features).detach().double().cpu().numpy()
    if array.ndim != 2 or len(array) < MIN_CLIPS:
        raise ValueError(f"{name}: got shape {array.shape}, expected (n, D) with n ≥ {MIN_CLIPS} clips")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite features")
    return array


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Squared Fréchet distance of two feature sets (n, D) and (m, D), in squared feature units; symmetric, ≥ 0.

    How many clips: at least 16 are required; from 120 a side it ranks methods soundly; below that, differences between
    small distances are noise. Two disjoint sets of the same distribution do not give 0 but a floor that falls
    with n, so compare only values taken with equal n and read them beside the floor (real against real).

    Raises ValueError for tensors that are not 2-D, finite, of equal D and with at least 16 rows.
    """
    a, b = check_features(features_a, "features_a"), check_features(features_b, "features_b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_b: got {b.shape[1]} dimensions, expected those of features_a, {a.shape[1]}")
    distances = []
    for projection in _projections(a.shape[1]):
        (mean_a, root_a, trace_a), (mean_b, root_b, trace_b) = _moments(a @ projection), _moments(b @ projection)
        # tr((Ca^½ Cb Ca^½)^½) is the nuclear norm of Ca^½ Cb^½: no square root of a non-symmetric matrix needed.
        overlap = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
        distances.append(np.square(mean_a - mean_b).sum() + trace_a + trace_b - 2 * overlap)
    return max(0.0, float(np.mean(distances)))


def bootstrap_ci(
    fn: Callable[..., float],
    *samples: torch.Tensor,
    paired: bool = False,
    confidence: float = 0.95,
    num_resamples: int = 200,
    method: str = "percentile",
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap confidence interval (low, high) of `fn(*samples)` by resampling the rows of each sample.

    fn takes as many tensors as given and returns a number; samples are (n, ...) tensors, resampled independently, or by
    the same rows where `paired` (a video and its twin). `method`: "percentile", or "basic" for the Fréchet distance:
    resampled clips repeat, which biases that distance upwards, and "basic" reflects the bias away. Rows
    drawn by scipy.stats.bootstrap (Efron 1979). Raises ValueError for empty or single-row samples, or unequal n where
    paired, or an unknown method.
    """
    from scipy.stats import bootstrap

    if not samples or any(len(sample) < 2 for sample in samples):
        raise ValueError(f"samples: got {[len(sample) for sample in samples]} rows, expected at least 2 in each")
    if paired and len({len(sample) for sample in samples}) > 1:
        raise ValueError(f"samples: got {[len(sample) for sample in samples]} rows, expected equal numbers (paired)")
    if method not in ("percentile", "basic"):
        raise ValueError(f"method: got {method!r}, expected 'percentile' or 'basic'")

    def statistic(*rows: np.ndarray) -> float:
        return float(fn(*(sample[torch.from_numpy(index)] for sample, index in zip(samples, rows, strict=True))))

    indices = [np.arange(len(sample)) for sample in samples]
    interval = bootstrap(
        indices, statistic, n_resamples=num_resamples, vectorized=False, paired=paired, method=method,
        confidence_level=confidence, rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
