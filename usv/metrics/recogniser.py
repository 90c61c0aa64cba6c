"""Which thing is seen in a clip, where it is, and how it moves on its own beside the camera.

    frames 48 px --network--> which thing, where in each frame;   own travel = its travel over the clip − the background's there, by optical flow

Nearest prototypes tell fifteen photographs apart; drawings that turn, shrink and stand anywhere they do not. What and where are learnt by
data/train_recogniser.py, on clips with the damage that generation leaves, from a stream that no model sees; motion is geometry.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from usv.metrics.checks import check_videos
from usv.metrics.motion import MOTIONS, STATIC, camera_motion, classify_motion

SIDE, WIDTH, STEM = 48, 64, 24  # px that clips are brought to, channels
OWN_TRAVEL = 0.15  # frame sides; things that stand are seen to travel up to 0.10, those that move 0.21 and more (120 real clips, docs/log.md)
CAMERA = {STATIC: 0, **{MOTIONS.index(name): label for label, name in enumerate(("pan left", "pan right", "zoom in", "zoom out"), 1)}}


class Block(torch.nn.Module):
    """A residual step over time, then space."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.GroupNorm(8, width)
        self.over_time = torch.nn.Conv1d(width, width, 3, padding=1)
        self.over_space = torch.nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """(B · T, C, h, w) -> the same shape."""
        h, w = x.shape[2:]
        inner = F.silu(self.norm(x)).view(-1, frames, x.shape[1], h * w).permute(0, 3, 2, 1)
        inner = F.silu(self.over_time(inner.flatten(0, 1)))
        inner = inner.view(-1, h * w, x.shape[1], frames).permute(0, 3, 2, 1).reshape(x.shape)
        return x + self.over_space(inner)


class Recogniser(torch.nn.Module):
    """What is seen and where. subjects: how many things there are to tell apart."""

    def __init__(self, subjects: int, depth: int = 3):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, STEM, 5, 2, 2), torch.nn.SiLU(), torch.nn.Conv2d(STEM, WIDTH, 3, 2, 1), torch.nn.SiLU(), torch.nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        )
        self.blocks = torch.nn.ModuleList(Block(WIDTH) for _ in range(depth))
        self.where = torch.nn.Conv2d(WIDTH, 1, 1)
        self.what = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.SiLU(), torch.nn.Linear(2 * WIDTH, subjects))

    def forward(self, videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Videos (B, T, 3, H, W) in [0, 1] -> logits (B, subjects), and logits (B, T, 12, 12) of where the thing is."""
        count, frames = videos.shape[:2]
        x = videos.flatten(0, 1)
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = self.stem(x * 2 - 1)
        for block in self.blocks:
            x = block(x, frames)
        x = F.silu(x)
        where = self.where(x)
        thing = torch.einsum("np,ncp->nc", where.flatten(1).softmax(1), x.flatten(2)).view(count, frames, -1).mean(1)
        return self.what(thing), where.view(count, frames, *x.shape[2:])

    @torch.no_grad()
    def recognise(self, videos: torch.Tensor, batch_size: int = 16) -> tuple[list[int], torch.Tensor]:
        """The thing of each clip, and its path (B, T, 2) in frame sides from the middle, x to the right and y down.

        videos: float (B, T, 3, H, W) in [0, 1], T ≥ 3; ValueError otherwise.
        """
        found, paths = [], []
        for part in check_videos(videos, min_frames=3).split(batch_size):
            logits, where = self(part)
            found += logits.argmax(1).tolist()
            cover = where.sigmoid().square()  # squared: what is faintly seen all over does not draw it to the middle
            axis = (torch.arange(cover.shape[-1]) + 0.5) / cover.shape[-1] - 0.5
            centre = torch.stack([(cover.sum(2) * axis).sum(2), (cover.sum(3) * axis).sum(2)], -1)
            paths.append(centre / cover.sum((2, 3))[..., None].clamp_min(1e-6))
        return found, torch.cat(paths)

    def save(self, path: Path, note: dict) -> None:
        """As safetensors in fp16, with a note (how it was trained, what it reaches) in the metadata."""
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        shape = {"subjects": self.what[-1].out_features, "depth": len(self.blocks)}
        save_file(weights, path, {"shape": json.dumps(shape), "note": json.dumps(note)})


def load_recogniser(path: str | Path) -> Recogniser:
    """What `save` wrote, in fp32, ready to be asked. OSError where there is none."""
    with safe_open(path, "pt") as file:
        network = Recogniser(**json.loads(file.metadata()["shape"]))
    network.load_state_dict(load_file(path))
    return network.float().eval().requires_grad_(False)


def motions(paths: torch.Tensor, content: torch.Tensor) -> list[tuple[int, int | None]]:
    """(the thing's own, the camera's) of each clip, as labels of MovingThings; None: a camera motion that it has not.

    paths: of `Recogniser.recognise`. content (B, 4): the background's motion over the clip (`camera_motion`).
    """
    time = torch.linspace(-0.5, 0.5, paths.shape[1])
    travel = torch.einsum("btc,t->bc", paths, time) / time.square().sum()  # of a line of least squares
    own = travel - (content[:, :2] + content[:, 2:3].expm1() * paths.mean(1))
    size, axis = own.abs().max(1)
    label = torch.where(size < OWN_TRAVEL, 0, 1 + 2 * axis + (own.gather(1, axis[:, None])[:, 0] > 0))
    return [(mine, CAMERA.get(camera)) for mine, camera in zip(label.tolist(), classify_motion(content))]


def told(network: Recogniser, videos: torch.Tensor, flow=None) -> tuple[list[int], list[tuple[int, int | None]]]:
    """Subjects and motions of clips (B, T, 3, H, W) in [0, 1]; flow: their `optical_flow`, where it is known."""
    subjects, paths = network.recognise(videos)
    return subjects, motions(paths, camera_motion(videos, flow))
