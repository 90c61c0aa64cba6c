"""Which thing is seen in a clip, how it moves and how the camera moves: a small network that learnt it from the world's own labels.

    frames 48 px --stem--> (T, 12, 12) features --blocks over space and time--> where the thing is, what it is, both motions

Nearest prototypes tell fifteen photographs apart; drawings that turn, shrink and stand anywhere they do not, and two motions at once are
more than one flow's fit. Trained by data/train_recogniser.py on clips with the damage that generation leaves, on streams no model sees.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from usv.metrics.checks import check_videos

SIDE, WIDTH, STEM = 48, 64, 24  # px that clips are brought to, channels


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
    """Logits of a clip's labels. classes: how many there are of each, by name, e.g. {"subject": 12, "motion": 5, "camera": 5}."""

    def __init__(self, classes: dict[str, int], depth: int = 3):
        super().__init__()
        self.classes = dict(classes)
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, STEM, 5, 2, 2), torch.nn.SiLU(), torch.nn.Conv2d(STEM, WIDTH, 3, 2, 1), torch.nn.SiLU(), torch.nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        )
        self.place = torch.nn.Conv2d(2, 2 * WIDTH, 1)  # a zoom is left on the left and right on the right: none, to a mean that knows no place
        self.blocks = torch.nn.ModuleList(Block(WIDTH) for _ in range(depth))
        self.where = torch.nn.Conv2d(WIDTH, 1, 1)
        self.norm = torch.nn.LayerNorm(2 * WIDTH)
        self.hidden = torch.nn.Linear(2 * WIDTH + 2, 2 * WIDTH)
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(2 * WIDTH, count) for name, count in classes.items()})

    def forward(self, videos: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Videos (B, T, 3, H, W) in [0, 1] -> {name: logits (B, count)}, and logits (B, T, 12, 12) of where the thing is."""
        count, frames = videos.shape[:2]
        x = videos.flatten(0, 1)
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = self.stem(x * 2 - 1)
        axis = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        place = torch.stack(torch.broadcast_tensors(axis, axis[:, None]))
        scale, shift = self.place(place[None]).chunk(2, 1)
        for number, block in enumerate(self.blocks):
            x = block(x, frames)
            if number == 0:
                x = x * (1 + scale) + shift
        x = F.silu(x)
        where = self.where(x)
        weight = where.flatten(1).softmax(1)
        thing = torch.einsum("np,ncp->nc", weight, x.flatten(2)).view(count, frames, -1).mean(1)
        centre = (weight @ place.flatten(1).T).view(count, frames, 2)
        slope = torch.einsum("btc,t->bc", centre, torch.linspace(-1, 1, frames, device=x.device)) / frames
        seen = torch.cat([self.norm(torch.cat([thing, x.mean((2, 3)).view(count, frames, -1).mean(1)], 1)), 8 * slope], 1)
        hidden = F.silu(self.hidden(seen))
        return {name: head(hidden) for name, head in self.heads.items()}, where.view(count, frames, *x.shape[2:])

    @torch.no_grad()
    def recognise(self, videos: torch.Tensor, batch_size: int = 16) -> dict[str, list[int]]:
        """{name: label of each clip}. videos: float (B, T, 3, H, W) in [0, 1], T ≥ 3; ValueError otherwise."""
        found: dict[str, list[int]] = {name: [] for name in self.classes}
        for part in check_videos(videos, min_frames=3).split(batch_size):
            for name, logits in self(part)[0].items():
                found[name] += logits.argmax(1).tolist()
        return found

    def save(self, path: Path, note: dict) -> None:
        """As safetensors in fp16, with its classes and a note (how it was trained, what it reaches) in the metadata."""
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, path, {"classes": json.dumps(self.classes), "depth": str(len(self.blocks)), "note": json.dumps(note)})


def load_recogniser(path: str | Path) -> Recogniser:
    """What `save` wrote, in fp32, ready to be asked. OSError where there is none."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    network = Recogniser(json.loads(metadata["classes"]), int(metadata["depth"]))
    network.load_state_dict(load_file(path))
    return network.float().eval().requires_grad_(False)
