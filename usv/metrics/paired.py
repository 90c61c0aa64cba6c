"""Two methods on the same prompts and seeds: differences with intervals, and the one definition of equal quality.

Clips of one prompt and seed are pairs, and clips of one subject stand or fall together: intervals resample whole subjects (the cluster
bootstrap, Cameron, Gelbach & Miller 2008), so that forty clips of three subjects do not pass for forty.

    non-inferior:  low end of (candidate − reference) ≥ −0.02 in subject and in motion,  high end of the ratio of Fréchet distances ≤ 1.10
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from usv.metrics.checks import check_labels
from usv.metrics.frechet import MIN_CLIPS, _distance, _moments, check_features

# how much worse a candidate may be with confidence and still be of equal quality
ACCURACY_MARGIN, FRECHET_MARGIN = 0.02, 1.10
HIGHER_IS_BETTER = ("subject_accuracy", "motion_accuracy")


class Difference(NamedTuple):
    """A mean difference, or a ratio, with its 95% interval."""

    value: float
    low: float
    high: float


class Verdict(NamedTuple):
    """`non_inferior`'s answer: of all metrics together, and of each its difference or ratio and whether it is within its margin."""

    non_inferior: bool
    metrics: dict[str, tuple[Difference, bool]]


def _rows_of(labels: list) -> list[np.ndarray]:
    """Row numbers of each label."""
    return [np.flatnonzero([x == label for x in labels]) for label in dict.fromkeys(labels)]


def _resamples(clusters: list, count: int, seed: int) -> list[np.ndarray]:
    """Row numbers of `count` resamples of whole clusters."""
    rng = np.random.default_rng(seed)
    groups = _rows_of(clusters)
    return [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(count)]


def paired_difference(
    reference: torch.Tensor, candidate: torch.Tensor, clusters: Sequence | None = None, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Difference:
    """Mean of candidate − reference over clips, with its interval over clusters.

    reference, candidate: (n,) values of the same clips in the same order. clusters: a label a clip, e.g. its subject (None: each clip its
    own). Raises ValueError for differing lengths, values that are not finite, or fewer than two clusters.
    """
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (reference, candidate))
    if a.shape != b.shape or not len(a):
        raise ValueError(f"candidate: got {len(b)} values, expected one for each of the reference's {len(a)} clips")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("reference, candidate: got NaN or infinity, expected finite values")
    labels = list(range(len(a))) if clusters is None else check_labels(clusters, len(a), "clusters")
    if len(set(labels)) < 2:
        raise ValueError(f"clusters: got {len(set(labels))}, expected at least 2: one cluster has no spread")
    difference = b - a
    means = [difference[rows].mean() for rows in _resamples(labels, num_resamples, seed)]
    tail = (1 - confidence) / 2
    return Difference(float(difference.mean()), *map(float, np.quantile(means, [tail, 1 - tail])))


def paired_frechet(
    real: torch.Tensor, reference: torch.Tensor, candidate: torch.Tensor, strata: Sequence | None = None, confidence: float = 0.95,
    num_resamples: int = 100, seed: int = 0, clusters: Sequence | None = None,
) -> Difference:
    """FD(real, candidate) / FD(real, reference) with its interval, both over the same random halves of the clips (see `frechet_ci`).

    strata: a label per clip, halved separately; or clusters: a label per clip, whole ones of which make a half, so that clips of one prompt
    do not pass for several. One of the two at most.
    (m, D) features of real clips, (n, D) of the two methods at the same prompts and seeds, n ≥ 32. Raises ValueError as `frechet_distance` does.
    """
    fixed_points, a, b = check_features(real, "real"), check_features(reference, "reference", 2 * MIN_CLIPS), check_features(candidate, "candidate", 2 * MIN_CLIPS)  # fmt: skip
    if a.shape != b.shape or a.shape[1] != fixed_points.shape[1]:
        raise ValueError(f"candidate: got shape {b.shape}, expected the reference's {a.shape} with real's {fixed_points.shape[1]} dimensions")
    if strata is not None and clusters is not None:
        raise ValueError("clusters: got some beside strata, expected one of the two")
    whole = [[row] for row in range(len(a))] if clusters is None else _rows_of(check_labels(clusters, len(a), "clusters"))
    if clusters is not None and len(whole) < 2:
        raise ValueError(f"clusters: got {len(whole)}, expected at least 2: one cluster has no spread")
    groups = [np.arange(len(whole))] if strata is None else _rows_of(check_labels(strata, len(a), "strata"))
    rng, fixed = np.random.default_rng(seed), _moments(fixed_points)
    ratio = lambda rows: _distance(fixed, _moments(b[rows])) / max(_distance(fixed, _moments(a[rows])), 1e-12)  # noqa: E731
    centre, halves = ratio(slice(None)), []
    for _ in range(num_resamples):
        half = np.concatenate([rng.permutation(group)[: (len(group) + rng.integers(2)) // 2] for group in groups])
        halves.append(ratio(np.concatenate([whole[i] for i in half])))
    tail = (1 - confidence) / 2
    low, high = centre + np.quantile(halves, [tail, 1 - tail]) - np.mean(halves)
    return Difference(centre, max(0.0, float(low)), float(high))


def non_inferior(
    reference: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor], clusters: Sequence, features: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> Verdict:
    """Whether a candidate is of equal quality: within its margin in subject, in motion and in Fréchet distance, each with 95% confidence.

    reference, candidate: per-clip values of `HIGHER_IS_BETTER` (n,). clusters: a subject a clip. features: of real clips, of the
    reference's and of the candidate's. Every table and sentence of the project that says "equal quality" asks here.
    """
    metrics: dict[str, tuple[Difference, bool]] = {}
    for name in HIGHER_IS_BETTER:
        difference = paired_difference(reference[name], candidate[name], clusters)
        metrics[name] = (difference, difference.low >= -ACCURACY_MARGIN)
    ratio = paired_frechet(*features, clusters)
    metrics["frechet_ratio"] = (ratio, ratio.high <= FRECHET_MARGIN)
    return Verdict(all(within for _, within in metrics.values()), metrics)


def gap_closed(value: float, untrained: float, full: float) -> float:
    """Share of the way from the untrained few-step teacher to the full one: 0 is as good as no training, 1 as the full teacher.

    nan where the two do not differ, since nothing is there to close.
    """
    return float("nan") if untrained == full else (value - untrained) / (full - untrained)
