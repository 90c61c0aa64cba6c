"""Batches of one latent shape each, from folders of several shapes: buckets of resolution and of frame count.

    next batch: of the bucket with the least  (samples handed out + one global batch) / share,     share: its samples, or its weights

A bucket is all folders of one latent shape, read by a ShardDataset of its own: an endless shuffled stream that resumes exactly.
Which bucket is next follows from the streams' positions alone, so all ranks take the same one, any number of ranks gives the same
global batches, and the shares hold to one batch at every moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from usv.training.data import ShardDataset
from usv.training.remote import DataError, Remote, masked
from usv.training.shards import named_paths, read_index


def of_shape(source) -> dict[tuple[int, ...], list]:
    """The folders and shards that `source` (see ShardDataset) names, by latent shape (C, T, h, w), in order of appearance."""
    groups: dict[tuple[int, ...], list] = {}
    for path in named_paths(source):
        folder = path.parent if path.name.endswith(".tar") else path
        groups.setdefault(tuple(read_index(folder)["latent_shape"]), []).append(
            path.url if isinstance(path, Remote) else path
        )
    return groups


def open_shards(
    source,
    batch_size: int,
    *,
    weights: Sequence[float] | None = None,
    latent_shape: tuple[int, ...] | None = None,
    **settings,
):
    """A ShardDataset where `source` has one latent shape, else Buckets.

    Args:
        source, batch_size, weights, settings: as ShardDataset takes them.
        latent_shape: of the run's configured size; must be among those found. DataError.
    """
    groups = of_shape(source)
    if len(groups) == 1:
        return ShardDataset(source, batch_size, weights=weights, latent_shape=latent_shape, **settings)
    if latent_shape is not None and tuple(latent_shape) not in groups:
        raise DataError(
            f"{masked(source)}: holds latents {', '.join(map(str, groups))}, this run is configured for {tuple(latent_shape)}; one of the "
            "buckets must have the configured height, width and number of frames: costs are counted and students validated there"
        )
    share_of = dict(zip(_names(source), weights)) if weights is not None else {}
    if weights is not None and share_of.keys() != {str(p) for paths in groups.values() for p in paths}:
        raise DataError(
            f"{masked(source)}: with weights and several latent shapes, name every folder by itself; a pattern is not accepted"
        )
    buckets, shares, seed = [], [], settings.pop("seed", 0)
    for number, paths in enumerate(groups.values()):
        mine = [share_of[str(p)] for p in paths] if share_of else None
        buckets.append(ShardDataset(paths, batch_size, weights=mine, seed=seed + 104_729 * number, **settings))
        shares.append(sum(mine) if mine else buckets[-1].num_samples)
    return Buckets(buckets, shares)


def _names(source) -> list[str]:
    """Entries as `named_paths` spells them."""
    entries = [source] if isinstance(source, (str, Path)) else list(source)
    return [str(e).rstrip("/") if "://" in str(e) else str(Path(e)) for e in entries]


class Buckets:
    """Endless batches from several ShardDatasets of one batch size, each of one shape.

    Batches are those of the datasets, `index` counted over all of them. Raises DataError for texts of different length or width.
    """

    def __init__(self, buckets: Sequence[ShardDataset], shares: Sequence[float]):
        first, *others = buckets
        for other in others:
            for name in ("text_length", "text_dim"):
                if getattr(first, name) != getattr(other, name):
                    raise DataError(
                        f"{first.shards[0].path.parent} and {other.shards[0].path.parent} cannot be mixed: {name} is "
                        f"{getattr(first, name)} in one and {getattr(other, name)} in the other; prepare both with the same settings"
                    )
        self.buckets, self.shares, self.empty = list(buckets), list(shares), first.empty
        self.shapes = [bucket.latent_shape for bucket in buckets]
        self.num_samples = sum(bucket.num_samples for bucket in buckets)

    def describe(self) -> str:
        """One line: shape, samples and share of every bucket."""
        total = sum(self.shares)
        return "buckets: " + ", ".join(
            f"{shape} {bucket.num_samples} samples {share / total:.0%}"
            for shape, bucket, share in zip(self.shapes, self.buckets, self.shares)
        )

    def following(self) -> int:
        """The bucket of the next batch."""
        lag = [
            (b.epoch * b.num_samples + b.position + b.batch_size * b.world_size) / share
            for b, share in zip(self.buckets, self.shares)
        ]
        return lag.index(min(lag))

    def __iter__(self) -> Iterator[dict]:
        streams = [iter(bucket) for bucket in self.buckets]
        begins = [sum(b.num_samples for b in self.buckets[:i]) for i in range(len(self.buckets))]
        while True:
            number = self.following()
            batch = next(streams[number])
            batch["index"] += begins[number]
            yield batch

    def state_dict(self) -> dict:
        """The state of every bucket by its shape; equal on every rank."""
        names = ["x".join(map(str, shape)) for shape in self.shapes]
        return {"buckets": {name: b.state_dict() for name, b in zip(names, self.buckets)}, "shares": dict(zip(names, self.shares))}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state, also one saved with another number of ranks. DataError where shapes, shares, data or seed are others."""
        own = self.state_dict()
        then, now = state.get("buckets"), own["buckets"]
        if then is None or then.keys() != now.keys():
            raise DataError(
                f"cannot continue the data order: latent shapes were {'one' if then is None else list(then)} when the state was saved "
                f"and are {list(now)} now; use the same data, or start a new run"
            )
        shares = state.get("shares", own["shares"])  # which earlier states do not say
        part = lambda shares, name: shares[name] / sum(shares.values())  # noqa: E731
        if any(abs(part(shares, name) - part(own["shares"], name)) > 1e-9 for name in now):
            raise DataError(
                f"cannot continue the data order: shares of the latent shapes were {shares} when the state was saved and are {own['shares']} now, and what "
                "was drawn by the old ones would be caught up with; use the same data.mix, or start a new run"
            )
        for bucket, name in zip(self.buckets, now):
            bucket.load_state_dict(then[name])
