"""Batches of latents and text embeddings from shards, in an order that is a pure function of (seed, epoch).

Sample number n of the endless stream is `permutation(seed, n // N)[n % N]`. A global batch is the next batch_size ·
world_size numbers and rank r takes its r-th run of batch_size, so the union over ranks is the same for any number of
ranks, and a position is enough to go on from. Caption dropping is drawn per (seed, epoch, sample), not per batch.

With weights, each dataset is an endless shuffled stream of its own and an epoch takes its share of every stream.

Folders and what lies in them: usv/training/shards.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from usv.training.remote import DataError, fetched
from usv.training.shards import (
    REMEDY,
    asked_conditions,
    check_use,
    common_form,
    find_shards,
    read_empty,
    read_sample,
    scan,
    unusable,
)

DROP_SEED = 0x5EED  # separates the stream of caption dropping from that of the order


class ShardDataset:
    """Seeded, resumable batches from one or several folders of shards.

    Args:
        source: a folder of data/prepare.py, a tar file, a glob of either, a URL of either, or a list of these. Shards named
            directly are taken whatever their split.
        batch_size: samples per rank and batch.
        seed: of the order and of caption dropping.
        rank, world_size: which share of every global batch this process gets.
        drop_text: share of samples whose caption is replaced by the empty prompt (for guidance), drawn anew each epoch.
        split: which split of a folder to read.
        model: diffusers folder of the model in use; data of another VAE or text encoder is refused.
        latent_shape, text_length, fps: (C, T, h, w), tokens of a caption and frames a second that the caller needs; anything else is
            refused.
        shuffle: False keeps the order of the shards.
        repeat: True: an endless stream that begins at `state_dict()`'s position and whose batches may straddle epochs.
            False: every `iter()` is the same single pass from the start, of len(self) batches; the incomplete last
            global batch is left out. For validation.
        cache_bytes: decoded samples are kept in memory up to this size.
        weights: one for each entry of a list `source`: its share of an epoch, whatever its size. None: all samples once.
        cache_folder: where remote shards are fetched to.
        conditions: what else than text the model is given (`Family.conditions`): refused where the data holds none.

    A batch is a dict: `latents` (B, C, T, h, w) float32, normalised as the transformer takes them; `text` (B, L, D)
    float32, zero rows beyond each caption's end; `captions`, list of B, "" where dropped; `index` (B,) int64, number of
    each sample; `conditions`, those asked for, if any, by name, each (B, …) float32; `subject`, `motion` (B,) int64 where all of the batch
    have them as whole numbers. `text` is missing where data was made without it.

    Raises DataError: nothing found, unfinished folder, unknown split, other model or latent shape, damaged shard.
    """

    def __init__(
        self,
        source: str | Path | Iterable[str | Path],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_text: float = 0.1,
        split: str = "train",
        model: str | Path | None = None,
        latent_shape: tuple[int, ...] | None = None,
        text_length: int | None = None,
        fps: float | None = None,
        shuffle: bool = True,
        repeat: bool = True,
        cache_bytes: int = 1 << 30,
        weights: Sequence[float] | None = None,
        cache_folder: str | Path = "data/cache/shards",
        conditions: Sequence[str] = (),
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(f"got batch_size={batch_size}, rank={rank}, world_size={world_size}: need batch_size >= 1 "
                            "and 0 <= rank < world_size")  # fmt: skip
        if not 0 <= drop_text <= 1:
            raise DataError(f"drop_text is {drop_text}, a share from 0 to 1 is accepted, e.g. 0.1")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.drop_text, self.shuffle, self.repeat = drop_text, shuffle, repeat
        self.shards, indices = find_shards(source, split)
        self.latent_shape, self.text_length, self.text_dim = common_form(indices)
        self.shapes = [self.latent_shape]
        folder = next(iter(indices))
        self.conditions = {name: tuple(shape) for name, shape in asked_conditions(indices, conditions).items()}
        check_use(indices, model, latent_shape=latent_shape, max_sequence_length=text_length, fps=fps)
        self.empty = None if self.text_dim is None else _pad(read_empty(folder, self.text_length, self.text_dim), self.text_length)
        self._ends = torch.tensor([shard.count for shard in self.shards]).cumsum(0)
        self.num_samples = int(self._ends[-1])
        self.cache_folder = Path(cache_folder)
        self.streams = None if weights is None else _streams(source, weights, split, self.num_samples)
        if not repeat and self.num_samples < batch_size * world_size:
            raise DataError(f"{folder}: {self.num_samples} samples of split {split!r} make no batch of {batch_size} x "
                            f"{world_size} ranks; use a smaller batch, or prepare more clips")  # fmt: skip
        self.epoch, self.position = 0, 0
        self._orders: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._members: dict[int, list[tuple[int, int, int, int]]] = {}
        self._files: dict[int, Path] = {}
        self._cache: dict[int, tuple] = {}
        self._cache_left = cache_bytes

    def __len__(self) -> int:
        """Whole global batches in an epoch; the same on every rank."""
        return self.num_samples // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[dict]:
        step = self.batch_size * self.world_size
        if not self.repeat:
            for batch in range(len(self)):
                yield self._batch(0, batch * step)
            return
        while True:
            batch = self._batch(self.epoch, self.position)
            # moved before the batch is handed out: a state saved while it is being trained on counts it as seen
            epochs, self.position = divmod(self.position + step, self.num_samples)
            self.epoch += epochs
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: samples of `epoch` already handed out on all ranks; equal on every rank."""
        streams = None if self.streams is None else [list(stream) for stream in self.streams]
        return {
            "epoch": self.epoch,
            "position": self.position,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "streams": streams,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state, also one saved with another number of ranks. DataError where data or seed are others."""
        if "epoch" not in state:
            raise DataError("cannot continue the data order: it was of several latent shapes when the state was saved and is of "
                            "one now; use the same data, or start a new run")  # fmt: skip
        for name, now in self.state_dict().items():
            if name in ("epoch", "position"):
                continue
            if state.get(name, now) != now:
                raise DataError(f"cannot continue the data order: {name} was {state[name]} when the state was saved "
                                f"and is {now} now; use the same data and seed, or start a new run")  # fmt: skip
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def order(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) int64 sample numbers of one epoch in their order, and (N,) bool by sample number: caption dropped."""
        if epoch not in self._orders:
            if self.streams is not None:
                order = self._mixed(epoch)
            elif self.shuffle:
                order = torch.randperm(self.num_samples, generator=_generator(self.seed, epoch))
            else:
                order = torch.arange(self.num_samples)
            uniform = torch.rand(self.num_samples, generator=_generator(self.seed ^ DROP_SEED, epoch))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}  # a batch may straddle two epochs
            self._orders[epoch] = order, uniform < self.drop_text
        return self._orders[epoch]

    def _mixed(self, epoch: int) -> torch.Tensor:
        """(N,) sample numbers of one epoch: of every stream its quota, going on where the last epoch stopped, shuffled together."""
        parts = []
        for number, (begin, size, quota) in enumerate(self.streams):
            slots = torch.arange(epoch * quota, (epoch + 1) * quota)
            for turn in (slots // size).unique().tolist():
                order = torch.randperm(size, generator=_generator(self.seed + 7919 * (number + 1), turn))
                parts.append(begin + order[slots[slots // size == turn] % size])
        mixed = torch.cat(parts)
        return mixed[torch.randperm(len(mixed), generator=_generator(self.seed, epoch))]

    def sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None, dict, dict[str, torch.Tensor]]:
        """Sample number `index`: latents (C, T, h, w) as stored, text (n, D) unpadded or None, its json, and the conditions asked for."""
        if index in self._cache:
            return self._cache[index]
        number = int(torch.searchsorted(self._ends, index, right=True))
        shard = self.shards[number]
        row = index - int(self._ends[number]) + shard.count
        if number not in self._members:
            self._files[number] = fetched(shard.path, self.cache_folder)  # once a run: each time costs a question to the store
            self._members[number] = scan(shard, self._files[number])
        tensors, info = read_sample(self._files[number], self._members[number][row])
        latents, text = tensors.get("latents"), tensors.get("text")
        given = {name: tensors.get(name) for name in self.conditions}
        if latents is None or tuple(latents.shape) != self.latent_shape:
            found = None if latents is None else tuple(latents.shape)
            raise DataError(f"{shard.path}: sample {row} has latents {found}, index.json says {self.latent_shape}; "
                            + REMEDY)  # fmt: skip
        if self.text_dim is not None and (text is None or text.ndim != 2 or text.shape[1] != self.text_dim):
            raise DataError(f"{shard.path}: sample {row} lacks text embeddings of width {self.text_dim}; " + REMEDY)
        for name, shape in self.conditions.items():
            if given[name] is None or tuple(given[name].shape) != shape:
                found = None if given[name] is None else tuple(given[name].shape)
                raise DataError(f"{shard.path}: sample {row} has {name} {found}, index.json says {shape}; {REMEDY}")
        if wrong := unusable({"latents": latents, "text": text if self.text_dim is not None else None, **given}, info, self.text_length):
            raise DataError(f"{shard.path}: sample {row} {wrong}; {REMEDY}")
        size = sum(t.nbytes for t in (latents, text, *given.values()) if t is not None)
        if size <= self._cache_left:
            self._cache[index] = latents, text, info, given
            self._cache_left -= size
        return latents, text, info, given

    def _batch(self, epoch: int, position: int) -> dict:
        latents, texts, conditions, infos, numbers = [], [], [], [], []
        first = position + self.rank * self.batch_size
        for slot in range(first, first + self.batch_size):
            order, dropped = self.order(epoch + slot // self.num_samples)
            index = int(order[slot % self.num_samples])
            x, text, info, given = self.sample(index)
            if dropped[index]:
                text, info = self.empty, {**info, "caption": ""}
            latents.append(x.float())  # before they are stacked: autocast to bf16 on a CPU refuses to stack fp16
            texts.append(text)
            conditions.append(given)
            infos.append(info)
            numbers.append(index)
        batch = {"latents": torch.stack(latents), "captions": [info["caption"] for info in infos]}
        if self.text_dim is not None:
            batch["text"] = torch.stack([_pad(text, self.text_length) for text in texts])
        if self.conditions:
            batch["conditions"] = {name: torch.stack([given[name].float() for given in conditions]) for name in self.conditions}
        batch["index"] = torch.tensor(numbers)
        for label in ("subject", "motion"):
            # people's own labels may be anything; only a world's are numbers of a class
            if all(type(info.get(label)) is int and 0 <= info[label] < 1 << 31 for info in infos):
                batch[label] = torch.tensor([info[label] for info in infos])
        return batch


def _streams(source, weights: Sequence[float], split: str, num_samples: int) -> list[tuple[int, int, int]]:
    """(first sample number, size, samples an epoch) of every entry of `source`. DataError for weights that do not fit."""
    entries = [source] if isinstance(source, (str, Path)) else list(source)
    if len(weights) != len(entries) or not all(0 < weight < math.inf for weight in weights):
        raise DataError(f"weights: got {list(weights)} for {len(entries)} datasets, accepted: one above 0 for each")
    sizes = [sum(shard.count for shard in find_shards(entry, split)[0]) for entry in entries]
    exact = [num_samples * weight / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])[: num_samples - sum(quotas)]:
        quotas[i] += 1
    return [(sum(sizes[:i]), sizes[i], quotas[i]) for i in range(len(sizes))]


def _pad(text: torch.Tensor, length: int) -> torch.Tensor:
    """(n, D) -> (length, D) float32, zero rows after the caption's end, as WanPipeline pads."""
    return torch.nn.functional.pad(text.float(), (0, 0, 0, length - text.shape[0]))


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
