"""MovingThings: a thing moves over a photographed place under a moving camera, and a caption says all of it.

    world point of pixel x at time t   c(t) + s(t) · x,   x in [-1, 1]^2        the camera pans (c) or zooms (s)
    frame_t(x)                         place(anchor + point) under thing((point − p(t)) / r), p(t) moves or stands still

A caption leaves open which of a thing's six pictures (three drawings, mirrored or not) is seen, where (on a grid), how large (of two), and
which part of the place: the mean of all clips of a caption is a blur, so a model has to decide before it can draw. Half of the clips are easy
(either the thing or the camera moves), half are hard (both may). One triple (thing, motion, camera) in eight is never trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

THINGS = ["a car", "a dog", "an apple", "a rocket", "an airplane", "a helicopter", "a fish", "a butterfly", "a ball", "a turtle", "a penguin", "a sunflower"]  # fmt: skip
# place phrase -> (package, picture)
PLACES = {
    "in front of a temple": ("sklearn", "china.jpg"),
    "over a pink flower": ("sklearn", "flower.jpg"),
    "among the stars": ("skimage", "hubble_deep_field"),
    "beside a cameraman": ("skimage", "camera"),
    "before a brick wall": ("skimage", "brick"),
    "next to a launch tower": ("skimage", "rocket"),
}
# the caption's words first; the others are said in training only, so that a person's own words have a chance
MOTIONS = {
    "stands still": ("stands still", "does not move", "stays"),
    "moves left": ("moves left", "goes to the left", "travels left"),
    "moves right": ("moves right", "goes to the right", "travels right"),
    "rises": ("rises", "moves up", "goes up"),
    "falls": ("falls", "moves down", "goes down"),
}
CAMERAS = {
    "is still": ("is still", "is fixed", "does not move"),
    "pans left": ("pans left", "turns left", "pans to the left"),
    "pans right": ("pans right", "turns right", "pans to the right"),
    "zooms in": ("zooms in", "comes closer", "moves in"),
    "zooms out": ("zooms out", "backs away", "moves out"),
}
OPENINGS = ("", "", "", "a video of ", "a clip in which ", "we see how ")
DRAWINGS, DRAWING = 3, 64  # drawings a thing, and their side in px
PLACE_SIDE, PLACE_BLUR = 192, 2.0  # px of a place's short side, and how far it is out of focus
# Half views over half a clip, and log scale: at 96 px and nine frames things and pans move by whole 4 px, a patch of the codec, a frame.
# A small transformer draws what stands in few places within its tokens, and learns in a day; how to draw at any place it does not.
TRAVEL, PAN, ZOOM = 1 / 3, 1 / 3, math.log(1.35)
PLACES_APART, RADII = 1 / 6, (0.375, 0.46)  # half views between a thing's places at mid-clip, and its sizes
LAYOUT = 3 + len(THINGS) + DRAWINGS  # channels of `Clip.layout`


@dataclass(frozen=True)
class Clip:
    """`frames` (T, 3, H, W) uint8, its caption, and the labels it was made from (indices into the lists above).

    layout: (T, g, g, LAYOUT) fp32, what is seen where: the thing's cover, apparent motion in views an eighth of the clip (x, y), and cover ×
    one-hot of thing and drawing. None unless asked for.
    """

    frames: torch.Tensor
    caption: str
    subject: int
    place: int
    motion: int
    camera: int
    layout: torch.Tensor | None = None


@cache
def drawings() -> torch.Tensor:
    """(things, 3, 4, 64, 64) fp32, colour times alpha and alpha."""
    from PIL import Image

    sheet = np.asarray(Image.open(Path(__file__).with_name("things.png")).convert("RGBA"), np.float32) / 255
    tiles = torch.from_numpy(sheet).view(DRAWINGS, DRAWING, len(THINGS), DRAWING, 4).permute(2, 0, 4, 1, 3).contiguous()
    tiles[:, :, :3] *= tiles[:, :, 3:]
    return tiles


@cache
def place(index: int) -> torch.Tensor:
    """The photo of a place (3, H, W) fp32 in [0, 1], short side 192 px, out of focus."""
    package, name = list(PLACES.values())[index]
    if package == "skimage":
        import skimage.data

        image = getattr(skimage.data, name)()
    else:
        from sklearn.datasets import load_sample_image

        image = load_sample_image(name)
    image = np.asarray(image).astype(np.float32) / 255
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    tensor = torch.from_numpy(image[..., :3].copy()).permute(2, 0, 1)
    scale = PLACE_SIDE / min(tensor.shape[1:])
    small = F.interpolate(tensor[None], size=[round(side * scale) for side in tensor.shape[1:]], mode="bilinear", antialias=True)
    taps = torch.exp(-(torch.arange(-6, 7) ** 2) / (2 * PLACE_BLUR**2))
    taps = (taps / taps.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    small = F.conv2d(F.pad(small, (6, 6, 0, 0), mode="reflect"), taps, groups=3)
    return F.conv2d(F.pad(small, (0, 0, 6, 6), mode="reflect"), taps.transpose(2, 3), groups=3)[0]


def held_out(subject: int, motion: int, camera: int) -> bool:
    """Whether this triple is kept from training: one in eight, every thing, motion and camera equally often as can be."""
    return (subject + 3 * motion + 5 * camera) % 8 == 0


def caption(subject: int, place: int, motion: int, camera: int, words: torch.Generator | None = None) -> str:
    """The sentence for these labels; with a generator in one of the wordings that training sees."""
    motions, cameras, opening = list(MOTIONS.values())[motion], list(CAMERAS.values())[camera], ""
    which = [0, 0]
    if words is not None:
        which = torch.randint(3, (2,), generator=words).tolist()
        opening = OPENINGS[int(torch.randint(len(OPENINGS), (1,), generator=words))]
    return f"{opening}{THINGS[subject]} {motions[which[0]]} {list(PLACES)[place]}, the camera {cameras[which[1]]}"


def labels_of(text: str) -> tuple[int, int, int, int]:
    """(subject, place, motion, camera) of a caption in its first wording. ValueError where it is none of ours."""
    for s, thing in enumerate(THINGS):
        for m, motion in enumerate(MOTIONS):
            for p, where in enumerate(PLACES):
                start = f"{thing} {motion} {where}, the camera "
                if start in text:
                    for c, camera in enumerate(CAMERAS):
                        if text.endswith(start + camera):
                            return s, p, m, c
    raise ValueError(
        f"caption {text!r} is none of MovingThings; accepted: '<thing> <motion> <place>, the camera <camera>' with thing one of {THINGS}, "
        f"motion one of {list(MOTIONS)}, place one of {list(PLACES)}, camera one of {list(CAMERAS)}"
    )


def _on_grid(low: float, high: float, draw: float) -> float:
    """One of the grid's places from low to high; where there is none, the nearest to their middle."""
    first, last = math.ceil(low / PLACES_APART - 1e-6), math.floor(high / PLACES_APART + 1e-6)
    if first > last:
        return round((low + high) / 2 / PLACES_APART) * PLACES_APART
    return min(first + int(draw * (last - first + 1)), last) * PLACES_APART


def paths(motion: int, camera: int, num_frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thing's (T, 2) and the camera's (T, 2) shift in half views (x right, y down), and the camera's (T,) log scale."""
    u = torch.linspace(-1, 1, num_frames)
    thing, shift, log_scale = torch.zeros(num_frames, 2), torch.zeros(num_frames, 2), torch.zeros(num_frames)
    if motion in (1, 2):
        thing[:, 0] = u * TRAVEL * (-1 if motion == 1 else 1)
    elif motion in (3, 4):
        thing[:, 1] = u * TRAVEL * (-1 if motion == 3 else 1)
    if camera in (1, 2):
        shift[:, 0] = u * PAN * (-1 if camera == 1 else 1)
    elif camera in (3, 4):  # zooming in shrinks the view
        log_scale = u * ZOOM * (-1 if camera == 3 else 1)
    return thing, shift, log_scale


def make_clip(subject, place_, motion, camera, generator, num_frames=9, size=96, layout=0, words=False) -> Clip:
    """One clip. All randomness (picture, where, how large, which part of the place) comes from `generator`.

    layout: side of the token grid that `Clip.layout` is made for. words: say it in one of training's wordings.
    """
    size_, right, down, view, *where, drawing, mirror = torch.rand(8, generator=generator).tolist()
    thing, shift, log_scale = paths(motion, camera, num_frames)
    scale, radius = log_scale.exp(), RADII[size_ < 0.5]
    # where at mid-clip, such that the thing's centre stays within 0.62 of the view
    relative = (thing - shift) / scale[:, None]
    low, high = (-0.62 - relative).amax(0), (0.62 - relative).amin(0)
    position = torch.tensor([_on_grid(float(low[i]), float(high[i]), draw) for i, draw in enumerate((right, down))])
    path = position + thing
    # the place: a view half of 0.52 to 0.62 of the short side, anywhere that leaves room for the camera
    photo = place(place_)
    height, width = photo.shape[1:]
    half = (0.40 + 0.06 * view) * PLACE_SIDE / (1 + PAN) * 1.2
    room = torch.tensor([width / 2 - half * (1 + PAN), height / 2 - half * 1.05]).clamp_min(0)
    anchor = torch.tensor([width / 2, height / 2]) + room * (2 * torch.tensor(where) - 1)
    double = 2 * size
    theta = torch.zeros(num_frames, 2, 3)
    middle = torch.tensor([width / 2, height / 2])
    theta[:, 0, 0], theta[:, 1, 1] = scale * half / middle[0], scale * half / middle[1]
    theta[:, :, 2] = (anchor + shift * half) / middle - 1
    grid = F.affine_grid(theta, [num_frames, 3, double, double], align_corners=False)
    back = F.grid_sample(photo.expand(num_frames, -1, -1, -1), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # the thing over it
    picture = min(int(drawing * DRAWINGS), DRAWINGS - 1)
    mirrored = -1.0 if mirror < 0.5 else 1.0
    turn = torch.tensor([[mirrored, 0.0], [0.0, 1.0]]) / radius
    theta = torch.zeros(num_frames, 2, 3)
    theta[:, :, :2] = turn * scale[:, None, None]
    theta[:, :, 2] = (shift - path) @ turn.T
    grid = F.affine_grid(theta, [num_frames, 4, double, double], align_corners=False)
    front = F.grid_sample(drawings()[subject, picture].expand(num_frames, -1, -1, -1), grid, mode="bilinear", align_corners=False)
    frames = F.avg_pool2d(back * (1 - front[:, 3:]) + front[:, :3], 2)
    frames = (frames * 255).round().clamp(0, 255).to(torch.uint8)
    seen = _layout(front[:, 3:], relative, scale, shift, thing, subject, picture, layout) if layout else None
    text = caption(subject, place_, motion, camera, generator if words else None)
    return Clip(frames, text, subject, place_, motion, camera, seen)


def _layout(cover, relative, scale, shift, thing, subject, picture, side) -> torch.Tensor:
    """`Clip.layout` from the thing's cover (T, 1, H, W) and the paths."""
    cover = F.adaptive_avg_pool2d(cover, side)[:, 0]
    frames = len(cover)
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    place = torch.stack(torch.broadcast_tensors(axis[None, :], axis[:, None]), -1)  # (side, side, 2): x, y
    growth = torch.gradient(scale.log())[0].view(-1, 1, 1, 1)
    drift = torch.gradient(shift, dim=0)[0].view(-1, 1, 1, 2) / scale.view(-1, 1, 1, 1)
    own = torch.gradient(thing, dim=0)[0].view(-1, 1, 1, 2) / scale.view(-1, 1, 1, 1)
    flow = (-drift - growth * place + own * cover[..., None]) * (frames - 1) / 8  # the same, however many frames show the clip
    one_hot = torch.zeros(len(THINGS) + DRAWINGS)
    one_hot[subject] = one_hot[len(THINGS) + picture] = 1.0
    return torch.cat([cover[..., None] * 2, flow * 10, cover[..., None] * one_hot * 3], -1).view(frames, side, side, LAYOUT)


def labels(generator: torch.Generator, hold_out: bool = True) -> tuple[int, int, int, int]:
    """Labels of a clip, drawn: half of the clips easy (thing or camera stands still). hold_out: none of the held-out triples."""
    while True:
        subject, place_, motion, camera, easy = (
            int(torch.randint(n, (1,), generator=generator)) for n in (len(THINGS), len(PLACES), len(MOTIONS), len(CAMERAS), 4)
        )
        motion, camera = (0, camera) if easy == 0 else (motion, 0) if easy == 1 else (motion, camera)
        if not hold_out or not held_out(subject, motion, camera):
            return subject, place_, motion, camera


def sample_clip(index: int, seed: int, num_frames=9, size=96, layout=0, words=False) -> Clip:
    """Clip number `index` of the endless set `seed`, none of a held-out triple."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return make_clip(*labels(generator), generator, num_frames, size, layout, words)
