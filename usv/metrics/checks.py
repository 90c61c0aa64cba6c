"""What every metric asks of its input: one place for the shapes, the range and the words of the errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_videos(videos: torch.Tensor, name: str = "videos", min_frames: int = 1) -> torch.Tensor:
    """`videos` as detached fp32 on the CPU. ValueError unless float (B, T, 3, H, W) in [0, 1], sides ≥ 32 px."""
    if not isinstance(videos, torch.Tensor):
        raise ValueError(f"{name}: got {type(videos).__name__}, expected a float tensor (B, T, 3, H, W) in [0, 1]")
    if videos.ndim != 5 or videos.shape[2] != 3 or 0 in videos.shape or min(videos.shape[3:]) < 32:
        raise ValueError(f"{name}: got shape {tuple(videos.shape)}, expected (B, T, 3, H, W), none empty, H and W ≥ 32")
    if not videos.is_floating_point():
        raise ValueError(f"{name}: got dtype {videos.dtype}, expected floating point in [0, 1] (uint8: divide by 255)")
    if videos.shape[1] < min_frames:
        raise ValueError(f"{name}: got {videos.shape[1]} frames a clip, expected at least {min_frames}")
    videos = videos.detach().float().cpu()
    low, high = torch.aminmax(videos)
    # NaN fails the comparison too; 1e-3 lets the rounding of bf16 decoders pass.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{name}: got values from {low:.4g} to {high:.4g}, expected finite values in [0, 1]")
    return videos.clamp(0, 1)


def check_twins(videos: torch.Tensor, twins: torch.Tensor, name: str = "twins") -> tuple[torch.Tensor, torch.Tensor]:
    """Both arguments of a full-reference metric, checked. ValueError where the shapes differ."""
    videos, twins = check_videos(videos), check_videos(twins, name)
    if videos.shape != twins.shape:
        raise ValueError(f"{name}: got shape {tuple(twins.shape)}, expected that of videos, {tuple(videos.shape)}")
    return videos, twins


def check_labels(labels: Sequence | torch.Tensor, count: int, name: str) -> list:
    """`labels` as a list of `count` plain ints or strings. ValueError where the count differs."""
    labels = labels.tolist() if isinstance(labels, torch.Tensor) else list(labels)
    if len(labels) != count:
        raise ValueError(f"{name}: got {len(labels)} labels, expected one per video, {count}")
    return labels
