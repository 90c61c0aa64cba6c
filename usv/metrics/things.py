"""Which thing is in a clip, where, and how it moves of its own accord: drawings matched to frames.

    error(k, x) = Σ m_k (I_x − T_k)² / Σ m_k (var I_x + var T_k)      T_k, m_k a drawing's colours and cover, I_x the frame at x

The thing is the drawing of least error over a clip's middle frame; it is then followed from frame to frame by the same drawing in
five sizes, and its own motion is what is left when the camera's (usv/metrics/motion.py) is taken away. Positions in half views, x
right and y down, from -1 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from usv.metrics.checks import check_videos

SEARCH, FOLLOW = 32, 48  # px: sides at which a middle frame is searched for all drawings, and the others for the one
RADII = (0.36, 0.40, 0.44, 0.49)  # half sides of a drawing that are tried, in half views: a thing of MovingThings has 0.36 to 0.48
CANDIDATES, TILTS, FACTORS = 8, (-0.12, -0.04, 0.04, 0.12), (0.96, 1.04)  # of the second, closer look
STILL = 0.22  # half views over a clip: less is no motion; a thing that moves travels 0.65 to 0.9


class Things(NamedTuple):
    """For B clips: index of the thing, its middle-frame error, and its path (B, T, 2) in half views."""

    subject: list[int]
    error: torch.Tensor
    path: torch.Tensor


def _errors(frames: torch.Tensor, drawings: torch.Tensor, radius: float) -> torch.Tensor:
    """(N, K, S, S) error of each drawing (K, 4, h, w) centred at each pixel of frames (N, 3, S, S), compared inside the frame only.

    Divided by how much there is to see, the variance of the drawing and of what it lies on: a dark drawing on a dark place is no find.
    """
    side = max(3, round(radius * frames.shape[-1]))
    side += 1 - side % 2  # odd, so that it has a middle
    small = F.interpolate(drawings, (side, side), mode="bilinear", antialias=True)
    colour, cover = small[:, :3], small[:, 3:]
    inside = torch.ones(1, 4, *frames.shape[2:])
    per_channel = torch.cat([colour.square() / cover.clamp_min(1e-3), cover], 1)
    sums = F.conv2d(inside, torch.cat([per_channel, torch.cat([colour, cover], 1)]), padding=side // 2)[0]
    # a kernel of four channels sums them, so the cover's own sum is taken off what the colours sum to
    area = F.conv2d(inside[:, :1], cover, padding=side // 2)[0].clamp_min(1e-6)
    own, total = sums[: len(cover)] - area, sums[len(cover) :] - area
    cross = F.conv2d(frames, colour, padding=side // 2)
    energy, bright = F.conv2d(torch.stack([frames.square().sum(1), frames.sum(1)], 1).flatten(0, 1)[:, None], cover, padding=side // 2).unflatten(0, (-1, 2)).unbind(1)  # fmt: skip
    error = (energy - 2 * cross + own).clamp_min(0)
    spread = (energy - bright.square() / (3 * area)).clamp_min(0) + (own - total.square() / (3 * area)).clamp_min(0)
    seen = area >= 0.6 * cover.sum((1, 2, 3)).view(-1, 1, 1)
    return (error / (spread + 0.01 * area)).masked_fill(~seen, float("inf"))


def _turned(drawings: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """All drawings (things, D, 4, h, w), mirrored too, as (K, 4, h, w), and each one's thing."""
    flat = torch.cat([drawings, drawings.flip(-1)], 1)
    return flat.flatten(0, 1), [k for k in range(len(drawings)) for _ in range(flat.shape[1])]


@torch.inference_mode()
def find_things(videos: torch.Tensor, drawings: torch.Tensor) -> Things:
    """The thing of each clip and its path.

    videos (B, T, 3, H, W) in [0, 1], square; drawings (things, D, 4, h, w): colour times alpha, and alpha. Raises ValueError for wrong videos.
    """
    videos = check_videos(videos, min_frames=2)
    count, frames = videos.shape[:2]
    scaled = lambda x, side: F.interpolate(x, (side, side), mode="bilinear", antialias=True)  # noqa: E731
    pictures, owner = _turned(drawings)
    middle = scaled(videos[:, frames // 2], SEARCH)
    best = torch.stack([_errors(middle, pictures, radius).flatten(2).amin(2) for radius in RADII], -1)  # (B, K, R)
    found = [_refine(scaled(videos[i, frames // 2 : frames // 2 + 1], FOLLOW), pictures, best[i]) for i in range(count)]
    path = torch.stack([_follow(scaled(clip, FOLLOW), drawing, radius) for clip, (_, drawing, radius, _) in zip(videos, found)])
    return Things([owner[k] for k, *_ in found], torch.tensor([error for *_, error in found]), path)


def _refine(frame: torch.Tensor, pictures: torch.Tensor, best: torch.Tensor) -> tuple[int, torch.Tensor, float, float]:
    """(picture, drawing as it is tilted, radius, error) of the best of a few candidates, looked at more closely.

    frame (1, 3, S, S); pictures (K, 4, h, w); best (K, R) error of each at each of RADII.
    """
    least, at = best.min(1)
    answers = []
    for k in least.argsort()[:CANDIDATES].tolist():
        tilted = torch.cat([_tilt(pictures[k], angle) for angle in TILTS])
        for factor in FACTORS:
            radius = RADII[int(at[k])] * factor
            error, which = _errors(frame, tilted, radius)[0].flatten(1).amin(1).min(0)
            answers.append((float(error), k, int(which), radius, tilted))
    error, k, which, radius, tilted = min(answers, key=lambda a: a[0])
    return k, tilted[which], radius, error


def _tilt(drawing: torch.Tensor, angle: float) -> torch.Tensor:
    """A drawing (4, h, w) turned by `angle` (rad), (1, 4, h, w)."""
    cos, sin = math.cos(angle), math.sin(angle)
    grid = F.affine_grid(torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), [1, *drawing.shape], align_corners=False)
    return F.grid_sample(drawing[None], grid, align_corners=False)


def _follow(frames: torch.Tensor, drawing: torch.Tensor, radius: float) -> torch.Tensor:
    """Centre of one drawing in each frame (T, 2), half views: the least error over sizes near `radius`, to a fraction of a pixel."""
    errors = torch.stack([_errors(frames, drawing[None], radius * s)[:, 0] for s in (0.75, 0.87, 1.0, 1.15, 1.33)], 1).amin(1)
    side = errors.shape[-1]
    flat = errors.flatten(1)
    near = torch.softmax(-flat / (0.1 * flat.amin(1, keepdim=True) + 1e-3), 1)
    x, y = (torch.arange(side) + 0.5) / side * 2 - 1, (torch.arange(side) + 0.5) / side * 2 - 1
    near = near.view(-1, side, side)
    return torch.stack([(near.sum(1) * x).sum(1), (near.sum(2) * y).sum(1)], 1)


def own_travel(path: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
    """(B, 2) how far each thing moves against the place, half views of the middle frame, x right and y down.

    path (B, T, 2) as `Things.path`; camera (B, 4) of `camera_motion`: the content's shift in frame sides, and its growth. The slope of a straight
    line through the path, so that one frame lost does not decide; a place that grows carries what stands beside its middle outwards.
    """
    frames = path.shape[1]
    u = torch.linspace(-0.5, 0.5, frames, dtype=path.dtype)
    growth = torch.exp(camera[:, 2, None] * u)[..., None]
    fixed = path / growth - 2 * camera[:, None, :2] * u.view(1, -1, 1)
    centred = fixed - fixed.mean(1, keepdim=True)
    return (centred * u.view(1, -1, 1)).sum(1) / u.square().sum()


def classify_own_motion(travel: torch.Tensor, names: Sequence[str] = ("still", "left", "right", "up", "down")) -> list[int]:
    """Index into `names` of (B, 2) travel: still below STILL, else the larger component's side."""
    size, axis = travel.abs().max(1)
    positive = travel.gather(1, axis[:, None])[:, 0] > 0
    return torch.where(size < STILL, 0, 1 + 2 * axis + positive.long()).tolist()


def classify_camera(content: torch.Tensor, still: float = 0.14) -> list[int]:
    """(B, 4) content motion of `camera_motion` → 0 still, 1 pans left, 2 pans right, 3 zooms in, 4 zooms out.

    still: frame sides that the average pixel moves over a clip; less is no motion. A camera that pans moves it 0.38 to 0.45, one that zooms 0.2.
    """
    shift, growth = content[:, 0], content[:, 2] * 6**-0.5 * 2
    kind = torch.where(shift.abs() > growth.abs(), torch.where(shift > 0, 1, 2), torch.where(growth > 0, 3, 4))
    return torch.where(torch.maximum(shift.abs(), growth.abs()) < still, 0, kind).tolist()
