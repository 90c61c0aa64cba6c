"""CameraMotion: a real photo under a moving camera, with a caption that states exactly how the camera moves.

    frame_i(x) = photo(c_i + s_i · R(theta_i) · x),   x in [-1, 1]^2

(c, s, theta) move smoothly from the first frame to the last; which of them moves, and in which direction, is the
motion label. Motions describe the *camera*: in "pans left" the content moves right. Photos ship inside scikit-image
(CC0 or public domain) and scikit-learn (CC-BY, see data/README.md), so nothing is downloaded and nothing is committed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

# subject phrase -> (package, picture). Order is the label's index.
PHOTOS = {
    "an astronaut": ("skimage", "astronaut"),
    "a cat": ("skimage", "chelsea"),
    "a cup of coffee": ("skimage", "coffee"),
    "a rocket": ("skimage", "rocket"),
    "distant galaxies": ("skimage", "hubble_deep_field"),
    "a cameraman": ("skimage", "camera"),
    "old coins": ("skimage", "coins"),
    "green grass": ("skimage", "grass"),
    "gray gravel": ("skimage", "gravel"),
    "a brick wall": ("skimage", "brick"),
    "a retina": ("skimage", "retina"),
    "a horse silhouette": ("skimage", "horse"),
    "stained tissue": ("skimage", "immunohistochemistry"),
    "a temple": ("sklearn", "china.jpg"),
    "a flower": ("sklearn", "flower.jpg"),
}
SUBJECTS = list(PHOTOS)
MOTIONS = ["pans left", "pans right", "tilts up", "tilts down", "zooms in", "zooms out", "rolls left", "rolls right"]
# speed word -> share of the full travel that the clip covers
SPEEDS = {"slowly": (0.47, 0.53), "": (0.7, 0.78), "quickly": (0.94, 1.0)}
SHORT_SIDE = 320  # photos are kept at this short side: a view is then about one photo pixel per supersampled pixel
MAX_PAN, MAX_ZOOM, MAX_ROLL = 0.5, math.log(1.7), math.radians(32)


@dataclass(frozen=True)
class Clip:
    """`frames` (T, 3, H, W) uint8, its `caption`, and the labels the caption was made from (indices)."""

    frames: torch.Tensor
    caption: str
    subject: int
    motion: int


@cache
def photo(subject: str) -> torch.Tensor:
    """The photo of one subject, (3, H, W) float32 in [0, 1], short side 320 px."""
    package, name = PHOTOS[subject]
    if package == "skimage":
        import skimage.data

        image = getattr(skimage.data, name)()
    else:
        from sklearn.datasets import load_sample_image

        image = load_sample_image(name)
    image = np.asarray(image)
    image = image.astype(np.float32) / (1.0 if image.dtype == bool else 255.0)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    tensor = torch.from_numpy(image[..., :3]).permute(2, 0, 1)
    scale = SHORT_SIDE / min(tensor.shape[1:])
    size = [round(side * scale) for side in tensor.shape[1:]]
    return F.interpolate(tensor[None], size=size, mode="bilinear", antialias=True)[0]


def caption(subject: int, motion: int, speed: str = "") -> str:
    """The sentence for these labels, e.g. "a cat, the camera pans left slowly"."""
    return f"{SUBJECTS[subject]}, the camera {MOTIONS[motion]}{' ' + speed if speed else ''}"


def labels_of(text: str) -> tuple[int, int]:
    """(subject, motion) indices named in a caption. ValueError where it names none of ours."""
    for s, subject in enumerate(SUBJECTS):
        for m, motion in enumerate(MOTIONS):
            if subject in text and motion in text:
                return s, m
    raise ValueError(
        f"caption {text!r} names no CameraMotion subject and motion; accepted: '<subject>, the camera <motion>' with "
        f"subject one of {SUBJECTS} and motion one of {MOTIONS}"
    )


def camera_path(motion: int, travel: float, num_frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Camera offsets over the clip: (T, 2) shift in half-views (x right, y down), (T,) log scale, (T,) angle (rad)."""
    u = torch.linspace(-0.5, 0.5, num_frames)
    shift, log_scale, angle = torch.zeros(num_frames, 2), torch.zeros(num_frames), torch.zeros(num_frames)
    kind, sign = motion // 2, (-1.0 if motion % 2 == 0 else 1.0)
    if kind == 0:
        shift[:, 0] = sign * u * 2 * MAX_PAN * travel
    elif kind == 1:
        shift[:, 1] = sign * u * 2 * MAX_PAN * travel
    elif kind == 2:  # zooming in shrinks the view
        log_scale = sign * u * MAX_ZOOM * travel
    else:  # a camera that rolls left (counter-clockwise for the viewer) shows content turning clockwise
        angle = sign * u * MAX_ROLL * travel
    return shift, log_scale, angle


def make_clip(subject: int, motion: int, speed: str, generator: torch.Generator, num_frames=9, size=96) -> Clip:
    """One clip. All randomness (view centre, size, exact travel) comes from `generator`."""
    r = torch.rand(5, generator=generator)
    low, high = SPEEDS[speed]
    shift, log_scale, angle = camera_path(motion, low + (high - low) * float(r[0]), num_frames)
    image = photo(SUBJECTS[subject])
    height, width = image.shape[1:]
    # Views vary by a few percent: a small world, in which what is asked (subject, motion, speed) decides what is seen. With
    # views free by ±7% and 60–70% zoom the teacher learned textures but no motion in 45,000 clips (docs/log.md).
    half = (0.64 + 0.02 * float(r[1])) * SHORT_SIDE / 2  # half view in photo pixels
    centre = torch.tensor([width / 2, height / 2]) + (r[2:4] - 0.5) * 0.03 * SHORT_SIDE
    scale, tilt = half * log_scale.exp(), angle + (float(r[4]) - 0.5) * 0.02
    cos, sin = torch.cos(tilt) * scale, torch.sin(tilt) * scale
    origin = centre + shift * half
    # photo pixel = origin + R · x · scale, then to grid_sample's [-1, 1]
    theta = torch.stack([cos, -sin, origin[:, 0], sin, cos, origin[:, 1]], 1).view(-1, 2, 3)
    theta = theta / torch.tensor([width / 2, height / 2]).view(1, 2, 1)
    theta[:, :, 2] -= 1
    grid = F.affine_grid(theta, [num_frames, 3, 2 * size, 2 * size], align_corners=False)
    frames = F.grid_sample(
        image.expand(num_frames, -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    frames = F.avg_pool2d(frames, 2)
    return Clip((frames * 255).round().clamp(0, 255).to(torch.uint8), caption(subject, motion, speed), subject, motion)


def sample_clip(index: int, seed: int, num_frames=9, size=96) -> Clip:
    """Clip number `index` of the endless set `seed`: labels cycle through all captions, the view is random."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    combo = index % (len(SUBJECTS) * len(MOTIONS))
    speed = list(SPEEDS)[int(torch.randint(len(SPEEDS), (1,), generator=generator))]
    return make_clip(combo // len(MOTIONS), combo % len(MOTIONS), speed, generator, num_frames, size)
