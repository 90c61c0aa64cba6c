"""Folders of shards as data/prepare.py writes them, made without any model."""

import itertools
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import shards

SHAPE, LENGTH, WIDTH = (4, 3, 2, 2), 6, 5


def latents_of(number: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).half()


def text_of(number: int) -> torch.Tensor:
    return torch.full((1 + number % LENGTH, WIDTH), float(number + 1))


def make_folder(folder: Path, counts=(5, 3, 6), first=0, labels=True, text=True, shape=SHAPE, **changes) -> Path:
    """A folder as data/prepare.py writes it: sample n has latents_of(n), text_of(n), caption `clip n`."""
    number, names = first, {}
    for i, count in enumerate(counts):

        def samples(start=number, count=count):
            for n in range(start, start + count):
                info = {"caption": f"clip {n}", **({"subject": n % 3, "motion": n % 2} if labels else {})}
                yield f"{n:08d}", {"latents": latents_of(n, shape), **({"text": text_of(n)} if text else {})}, info

        names[f"train-{i:05d}.tar"] = shards.write_shard(
            folder / f"train-{i:05d}.tar", samples(), report={"skipped": []}
        )
        number += count
    index = {
        "format": 1, "model": {"name": "m", "vae": "v", "text_encoder": "t"}, "latent_shape": list(shape),
        "text_dim": WIDTH if text else None, "max_sequence_length": LENGTH,
        "splits": {"train": {"num_samples": number - first, "shards": names}}, **changes,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    save_file({"text": torch.full((1, WIDTH), -1.0)}, folder / "empty.safetensors")
    return folder


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) if k != "captions" else x[k] == y[k] for k in x)
        for x, y in zip(a, b)
    )
