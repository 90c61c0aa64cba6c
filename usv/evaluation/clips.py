"""Which clips are asked for, and real ones to hold videos against."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import torch

from usv.config import ModelConfig
from usv.training.data import ShardDataset

ROOT = Path(__file__).resolve().parents[2]
REAL_SEED, FLOOR_SEED = 3, 4  # neither the teacher's training clips (1) nor the codec's held-out ones (2)
REAL_CLIPS, LOOKUP_CLIPS = 240, 10


def camera_motion():
    """The module data/camera_motion.py, which is no part of the installed package."""
    if str(ROOT / "data") not in sys.path:
        sys.path.insert(0, str(ROOT / "data"))
    import camera_motion

    return camera_motion


def requests(count: int) -> tuple[list[str], list[int], list[int]]:
    """`count` captions with their labels. 120 cover every subject with every motion; fewer still cover all subjects."""
    world = camera_motion()
    subjects, motions = len(world.SUBJECTS), len(world.MOTIONS)
    pairs = [(i % subjects, (i % subjects + i // subjects) % motions) for i in range(count)]
    return [world.caption(s, m) for s, m in pairs], [s for s, _ in pairs], [m for _, m in pairs]


def real_clips(model: ModelConfig, count: int, seed: int = REAL_SEED) -> tuple[torch.Tensor, list[int]]:
    """Real clips (N, T, 3, H, W) in [0, 1] and their subjects: the reference of the Fréchet distance and the prototypes."""
    world = camera_motion()
    clips = [world.sample_clip(i, seed, model.num_frames, model.height) for i in range(count)]
    return torch.stack([c.frames for c in clips]).float() / 255, [c.subject for c in clips]


def asked_clips(model: ModelConfig, subjects: list[int], motions: list[int], seed: int, count: int = 1) -> torch.Tensor:
    """Real clips (N, T, 3, H, W) of these labels, each the mean of `count`."""
    world = camera_motion()

    def one(number: int, subject: int, motion: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        speed = list(world.SPEEDS)[int(torch.randint(len(world.SPEEDS), (1,), generator=generator))]
        return world.make_clip(subject, motion, speed, generator, model.num_frames, model.height).frames.float() / 255

    pairs = enumerate(zip(subjects, motions))
    return torch.stack([torch.stack([one(count * i + k, s, m) for k in range(count)]).mean(0) for i, (s, m) in pairs])


def held_out(shards: str, batch_size: int, model: str, asked: str, batches: int = 1) -> tuple[list[dict], torch.Tensor]:
    """So many batches of the split val in its order, and the embedding of the empty prompt.

    asked: how the message of a ValueError begins where there are fewer, e.g. "--clips: got 4, accepted: at most".
    """
    data = ShardDataset(shards, batch_size, split="val", drop_text=0.0, shuffle=False, repeat=False, model=model)
    found = list(islice(data, batches))
    if len(found) < batches:
        raise ValueError(f"{asked} the held-out clips of {shards}")
    return found, data.empty
