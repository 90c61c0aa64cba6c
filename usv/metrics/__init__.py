"""Offline video-quality metrics: nothing is downloaded, every network ships in a package.

Rooms: `appearance` (EfficientNet: subjects, consistency, perceptual distance) · `frechet` (distance of sets, intervals)
· `motion` (optical flow: camera motion, warp error) · `fidelity` (PSNR, SSIM, VMAF, flicker, the codec's
grid) · `coverage` (is all of it there) · `paired` (differences of two methods, and what equal quality is) · `summary`.
"""

from usv.metrics.appearance import (
    Alignment,
    Prototypes,
    build_prototypes,
    features,
    lpips_like,
    subject_accuracy,
    subject_consistency,
)
from usv.metrics.coverage import coverage
from usv.metrics.fidelity import border_ratio, flicker, psnr, ssim, vmaf
from usv.metrics.frechet import bootstrap_ci, frechet_ci, frechet_distance
from usv.metrics.motion import MOTIONS, camera_motion, flow_warp_error, motion_accuracy
from usv.metrics.paired import gap_closed, non_inferior, paired_difference, paired_frechet
from usv.metrics.summary import evaluate_videos

__all__ = [
    "MOTIONS",
    "Alignment",
    "Prototypes",
    "bootstrap_ci",
    "border_ratio",
    "build_prototypes",
    "camera_motion",
    "coverage",
    "evaluate_videos",
    "features",
    "flicker",
    "flow_warp_error",
    "frechet_ci",
    "frechet_distance",
    "gap_closed",
    "lpips_like",
    "motion_accuracy",
    "non_inferior",
    "paired_difference",
    "paired_frechet",
    "psnr",
    "ssim",
    "subject_accuracy",
    "subject_consistency",
    "vmaf",
]
