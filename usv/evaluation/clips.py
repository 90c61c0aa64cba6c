"""Which clips are asked for, and real ones to hold videos against."""

from __future__ import annotations

from itertools import islice

import torch

from usv.config import ModelConfig
from usv.evaluation.worlds import Asked, world_of
from usv.training.data import ShardDataset

REAL_SEED, FLOOR_SEED = 3, 4  # neither the teacher's training clips (1) nor the codec's held-out ones (2)
REAL_CLIPS, LOOKUP_CLIPS = 240, 10


def requests(model: ModelConfig, count: int) -> Asked:
    """What `count` clips are asked for, of the model's world."""
    return world_of(model).requests(count)


def real_clips(model: ModelConfig, count: int, seed: int = REAL_SEED) -> tuple[torch.Tensor, list[int]]:
    """Real clips (N, T, 3, H, W) in [0, 1] and their subjects: the reference of the Fréchet distance, and what prototypes are built from."""
    world = world_of(model)
    clips = [world.sampled(i, seed, model) for i in range(count)]
    return torch.stack([frames for frames, _ in clips]).float() / 255, [subject for _, subject in clips]


def asked_clips(model: ModelConfig, labels: list[tuple], seed: int, count: int = 1) -> torch.Tensor:
    """Real clips (N, T, 3, H, W) of `Asked.labels`, each the mean of `count`."""
    world = world_of(model)

    def one(number: int, wanted: tuple) -> torch.Tensor:
        return world.made(wanted, torch.Generator().manual_seed(seed * 1_000_003 + number), model).float() / 255

    return torch.stack([torch.stack([one(count * i + k, wanted) for k in range(count)]).mean(0) for i, wanted in enumerate(labels)])


def held_out(shards: str, batch_size: int, model: str, asked: str, batches: int = 1) -> tuple[list[dict], torch.Tensor]:
    """So many batches of the split val in its order, and the embedding of the empty prompt.

    asked: how the message of a ValueError begins where there are fewer, e.g. "--clips: got 4, accepted: at most".
    """
    data = ShardDataset(shards, batch_size, split="val", drop_text=0.0, shuffle=False, repeat=False, model=model)
    found = list(islice(data, batches))
    if len(found) < batches:
        raise ValueError(f"{asked} the held-out clips of {shards}")
    return found, data.empty
