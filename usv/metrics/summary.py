"""All metrics of a set of videos in one call, each network and flow run once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from usv.metrics.appearance import (
    Prototypes,
    check_subjects,
    classify_subjects,
    compare_frames,
    consistency_of,
    frame_features,
    pool_features,
)
from usv.metrics.checks import check_labels, check_twins, check_videos
from usv.metrics.coverage import coverage
from usv.metrics.fidelity import border_ratio, find_ffmpeg, flicker, psnr, ssim, vmaf
from usv.metrics.frechet import MIN_CLIPS, bootstrap_ci, check_features, frechet_ci, frechet_distance
from usv.metrics.motion import camera_motion, check_motions, classify_motion, flow_warp_error, optical_flow
from usv.metrics.recogniser import Recogniser, told


def _hits(predicted: list, wanted: list) -> torch.Tensor:
    return torch.tensor([a == b for a, b in zip(predicted, wanted, strict=True)], dtype=torch.float64)


def _has_vmaf() -> bool:
    try:
        find_ffmpeg()
    except RuntimeError:
        return False
    return True


def measure_videos(
    videos: torch.Tensor,
    subjects: Sequence | None = None,
    motions: Sequence | None = None,
    dense_twins: torch.Tensor | None = None,
    *,
    prototypes: Prototypes | Recogniser | None = None,
    patch: int | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every metric that the arguments allow, for each video: name -> (B,), and the clips' features (B, 2560).

    Always: subject_consistency, flicker, flow_warp_error. With `subjects` (B labels of `prototypes`, which then is
    required): subject_accuracy. With `motions` (B indices or names of MOTIONS): motion_accuracy. With `patch` (px of the
    codec): border_ratio. With `dense_twins`, the dense model's videos for the same prompts and seeds: psnr (inf for equal
    clips), ssim, lpips_like, vmaf.

    videos and dense_twins (B, T, 3, H, W) float in [0, 1], T ≥ 3. Raises ValueError for wrong arguments (all are
    checked before anything is computed). VMAF is left out where no ffmpeg has libvmaf (`fidelity.find_ffmpeg` says why).
    """
    videos = check_videos(videos, min_frames=3)
    if subjects is not None:
        if prototypes is None:
            raise ValueError("prototypes: got None, expected those of build_prototypes, since subjects are given")
    learnt = isinstance(prototypes, Recogniser)
    if subjects is not None:
        subjects = check_labels(subjects, len(videos), "subjects") if learnt else check_subjects(subjects, len(videos), prototypes)
    if motions is not None:
        motions = check_labels(motions, len(videos), "motions") if learnt else check_motions(motions, len(videos))
    if dense_twins is not None:
        check_twins(videos, dense_twins, "dense_twins")

    each = {} if patch is None else {"border_ratio": border_ratio(videos, patch)}
    if dense_twins is None:
        frames = frame_features(videos)
    else:
        each["lpips_like"], frames = compare_frames(videos, dense_twins)
        each |= {metric.__name__: metric(videos, dense_twins) for metric in (psnr, ssim, *([vmaf] if _has_vmaf() else ()))}
    flow = optical_flow(videos)
    each |= {
        "subject_consistency": consistency_of(frames),
        "flicker": flicker(videos),
        "flow_warp_error": flow_warp_error(videos, flow),
    }
    things, moved = told(prototypes, videos, flow) if learnt else (None, None)
    if subjects is not None:
        each["subject_accuracy"] = _hits(things if learnt else classify_subjects(frames, prototypes), subjects)
    if motions is not None:
        each["motion_accuracy"] = _hits(moved if learnt else classify_motion(camera_motion(flow=flow)), motions)
    return each, pool_features(frames)


def evaluate_videos(
    videos: torch.Tensor,
    subjects: Sequence | None = None,
    motions: Sequence | None = None,
    reference_features: torch.Tensor | None = None,
    dense_twins: torch.Tensor | None = None,
    *,
    prototypes: Prototypes | Recogniser | None = None,
    intervals: bool = False,
    patch: int | None = None,
) -> dict[str, float]:
    """The metrics of `measure_videos`, averaged over videos.

    With `reference_features` (n, 2560), `features` of real clips, n ≥ 16: frechet_distance and coverage too. With `intervals`, each
    also as <name>_low and <name>_high, the 95% interval over videos (`bootstrap_ci`, `frechet_ci` with the subjects as strata, B ≥ 32).
    Raises ValueError as `measure_videos` does.
    """
    if reference_features is not None:
        check_features(reference_features, "reference_features")
        check_features(check_videos(videos).flatten(1)[:, :1], "videos", 2 * MIN_CLIPS if intervals else MIN_CLIPS)
    each, pooled = measure_videos(videos, subjects, motions, dense_twins, prototypes=prototypes, patch=patch)
    return summarise(each, pooled, reference_features, subjects, intervals)


def summarise(
    each: dict[str, torch.Tensor], pooled: torch.Tensor, reference_features: torch.Tensor | None, subjects: Sequence | None, intervals: bool
) -> dict[str, float]:
    """`evaluate_videos` from what `measure_videos` gave."""
    result = {name: float(values.mean()) for name, values in each.items()}
    if intervals:
        for name, values in each.items():
            result[f"{name}_low"], result[f"{name}_high"] = bootstrap_ci(torch.mean, values, num_resamples=1000)
    if reference_features is not None:
        result["frechet_distance"] = frechet_distance(reference_features, pooled)
        result["coverage"] = coverage(reference_features, pooled)
        if intervals:
            low, high = frechet_ci(reference_features, pooled, subjects)
            result["frechet_distance_low"], result["frechet_distance_high"] = low, high
    return result
