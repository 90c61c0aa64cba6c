"""The worlds that embedded models are of: what is asked of them, real clips with labels, and what tells labels from clips.

A model folder says its world in usv.json, {"world": "moving_things"}; none: CameraMotion. The generators are scripts of data/, no part of
the installed package.
"""

from __future__ import annotations

import importlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from usv.config import ModelConfig, SettingError
from usv.metrics import build_prototypes
from usv.metrics.appearance import Prototypes
from usv.metrics.recogniser import Recogniser, load_recogniser

ROOT = Path(__file__).resolve().parents[2]
ASKED_SEED = 6  # whose labels MovingThings' requests are


class Asked(NamedTuple):
    """What is asked, one entry a clip: sentences, the labels that metrics are held to, and all that a real clip of it is made from.

    motions: an index, or (the thing's, the camera's).
    """

    prompts: list[str]
    subjects: list[int]
    motions: list
    labels: list[tuple]


@cache
def generator_of(name: str) -> ModuleType:
    """The script data/NAME.py as a module."""
    if str(ROOT / "data") not in sys.path:
        sys.path.insert(0, str(ROOT / "data"))
    return importlib.import_module(name)


class World(ABC):
    """A world by its script; clip numbers of a seed are an endless stream, and seeds 1 and 2 are training's."""

    name: str

    def __init__(self):
        self.script = generator_of(self.name)

    def sampled(self, index: int, seed: int, model: ModelConfig) -> tuple[torch.Tensor, int]:
        """Frames (T, 3, H, W) uint8 of a clip of the stream, and its subject."""
        clip = self.script.sample_clip(index, seed, model.num_frames, model.height)
        return clip.frames, clip.subject

    @abstractmethod
    def requests(self, count: int) -> Asked:
        """The same for every call; fewer are the first of more."""

    @abstractmethod
    def made(self, labels: tuple, generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
        """Frames (T, 3, H, W) uint8 of a clip of these labels."""

    @abstractmethod
    def teller(self, real: torch.Tensor, subjects: Sequence[int]) -> Prototypes | Recogniser:
        """What tells labels from clips; real clips and their subjects where it has to be built."""


class CameraMotion(World):
    """A photograph under a moving camera."""

    name = "camera_motion"

    def requests(self, count: int) -> Asked:
        """120 captions cover every subject with every motion; fewer still cover all subjects."""
        subjects, motions = len(self.script.SUBJECTS), len(self.script.MOTIONS)
        pairs = [(i % subjects, (i % subjects + i // subjects) % motions) for i in range(count)]
        return Asked([self.script.caption(*pair) for pair in pairs], [s for s, _ in pairs], [m for _, m in pairs], pairs)

    def made(self, labels: tuple, generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
        speeds = list(self.script.SPEEDS)
        speed = speeds[int(torch.randint(len(speeds), (1,), generator=generator))]
        return self.script.make_clip(*labels, speed, generator, model.num_frames, model.height).frames

    def teller(self, real: torch.Tensor, subjects: Sequence[int]) -> Prototypes:
        return build_prototypes(real, subjects)


class MovingThings(World):
    """A thing that moves over a place under a moving camera."""

    name = "moving_things"

    def requests(self, count: int) -> Asked:
        """All things in turn; places, motions and cameras as a clip's are drawn, held-out triples among them."""
        labels = []
        for i in range(count):
            _, place, motion, camera = self.script.labels(torch.Generator().manual_seed(ASKED_SEED * 1_000_003 + i), hold_out=False)
            labels.append((i % len(self.script.THINGS), place, motion, camera))
        return Asked([self.script.caption(*each) for each in labels], [x[0] for x in labels], [x[2:] for x in labels], labels)

    def made(self, labels: tuple, generator: torch.Generator, model: ModelConfig) -> torch.Tensor:
        return self.script.make_clip(*labels, generator, model.num_frames, model.height).frames

    def teller(self, real: torch.Tensor, subjects: Sequence[int]) -> Recogniser:
        return load_recogniser(ROOT / "data" / "moving-things" / "recogniser.safetensors")


WORLDS = {world.name: world for world in (CameraMotion, MovingThings)}


def world_of(model: ModelConfig) -> World:
    """The world of a model folder. SettingError for one that is not known."""
    file = Path(model.path) / "usv.json"
    name = json.loads(file.read_text()).get("world", CameraMotion.name) if file.is_file() else CameraMotion.name
    if name not in WORLDS:
        raise SettingError(f"{file}: got world {name!r}, accepted: {' | '.join(WORLDS)}")
    return WORLDS[name]()
