"""A user's own prompts and clips: what is asked for, at which size, and the real clips that videos are held against.

    python -m usv.evaluate --shards data/shards/mine --ckpt outputs/mine/student            # captions of the held-out clips
    python -m usv.evaluate --shards data/shards/mine --prompts mine.txt --ckpt outputs/mine/student

Real clips come out of the shards through the model's own VAE, so that what the codec cannot show counts against nobody. The
reference is the split `val`; the floor is the split `train` held against it: no method can be asked to be nearer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from usv.config import ModelConfig, SettingError, typed
from usv.evaluation.worlds import ROOT
from usv.metrics import features
from usv.metrics.frechet import MIN_CLIPS
from usv.sampling.checkpoint import read_config
from usv.sampling.generate import decode, prompts_of
from usv.training.data import ShardDataset
from usv.training.shards import named_paths, read_index

MOST_REAL = 240  # real clips decoded for the reference, spread over the split
SIZES = ("height", "width", "num_frames", "max_sequence_length")


@dataclass(frozen=True)
class Own:
    """What a user asks: a prompt for each clip, and a folder of shards with a held-out split (None: nothing real to hold against)."""

    prompts: list[str]
    shards: str | None
    split: str = "val"


def ask(prompts: Path | None, shards: str | None, split: str, clips: int | None, model: str) -> Own:
    """The prompts of a file, else the captions of the held-out clips, in turn until there are `clips` (None: each once).

    SettingError for a file that is none, DataError for shards that cannot be read, were made for another model, or lack the split.
    """
    data = None if shards is None else opened(shards, split, model)
    if prompts is not None:
        texts = prompts_of(prompts, "--prompts ")
    else:
        texts = list(dict.fromkeys(data.sample(i)[2]["caption"] for i in spread(data.num_samples, MOST_REAL)))
        texts = [text for text in texts if text]
        if not texts:
            raise SettingError(f"--shards {shards}: got a split {split} without captions, accepted: --prompts FILE beside it, one prompt a line")
    count = len(texts) if clips is None else clips
    return Own([texts[i % len(texts)] for i in range(count)], shards, split)


def opened(shards: str, split: str, model: str) -> ShardDataset:
    """One split of the user's shards, in its order."""
    return ShardDataset(shards, 1, split=split, drop_text=0.0, shuffle=False, repeat=False, model=model)


def spread(size: int, most: int) -> list[int]:
    """At most so many of `size` numbers, evenly spread: a split lies video by video."""
    return sorted({round(i * (size - 1) / max(1, most - 1)) for i in range(min(size, most))}) if size > most else list(range(size))


def model_of(name: str) -> ModelConfig:
    """A model of conf/model by its name, e.g. wan_1_3b; else a folder or hub id at Wan-mini's settings, or those of its usv.json."""
    known = ROOT / "conf" / "model" / f"{name}.yaml"
    if known.is_file():
        return typed(OmegaConf.load(known), ModelConfig)
    model, own = ModelConfig(path=name), Path(name) / "usv.json"
    try:
        stated = json.loads(own.read_text()) if own.is_file() else {}
        return typed(OmegaConf.create({"path": name, **{key: value for key, value in stated.items() if hasattr(model, key)}}), ModelConfig)
    except (OSError, ValueError, AttributeError) as error:
        raise SettingError(f"--model {name}: its usv.json is not readable ({error})") from None


def sized(model: ModelConfig, shards: str | None, checkpoints: dict[str, str]) -> ModelConfig:
    """The model at the size of the shards, else at that of the first student; without either as it is."""
    if shards is not None:
        found = read_index(named_paths(shards)[0])
    else:
        found = next((read_config(path.partition("@")[0])["sampling"] for path in checkpoints.values()), {})
    for key in (*SIZES, "fps"):
        if found.get(key):
            setattr(model, key, max(1, round(found[key])))
    return model


def real_features(pipe, own: Own, model: ModelConfig) -> tuple[torch.Tensor | None, dict]:
    """Features (n, 2560) of the held-out clips, and a record of them with the floor; (None, why not) with fewer than 16 of either.

    The floor has as many clips as are asked for, where the split `train` has them: compare it with rows of as many.
    """
    if own.shards is None:
        return None, {"reason": "no --shards: nothing real to hold the videos against"}
    held, record = opened(own.shards, own.split, model.path), {"shards": own.shards, "split": own.split}
    record["clips"] = min(held.num_samples, MOST_REAL)
    if min(record["clips"], len(own.prompts)) < MIN_CLIPS:
        few = f"{held.num_samples} clips of split {own.split} and {len(own.prompts)} videos"
        return None, record | {"reason": f"{few}: a Fréchet distance takes {MIN_CLIPS} of each"}
    reference = shown_features(pipe, held, MOST_REAL)
    rest = opened(own.shards, "train", model.path)
    if rest.num_samples >= MIN_CLIPS and own.split != "train":
        floor = shown_features(pipe, rest, len(own.prompts))
        record |= {"floor_clips": len(floor), "floor": floor}
    return reference, record


@torch.no_grad()
def shown_features(pipe, data: ShardDataset, most: int) -> torch.Tensor:
    """Features of at most so many clips of a split, decoded one by one: only features stay in memory."""
    found = []
    for index in spread(data.num_samples, most):
        latents = data.sample(index)[0].float()[None].to(pipe.device)
        found.append(features(decode(pipe, latents).cpu()))
    return torch.cat(found)
