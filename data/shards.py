"""Shards: tar files of samples `<key>.safetensors` (latents, text) and `<key>.json` (caption and labels).

A shard is written beside its name and renamed when complete, so whatever stands under its name is whole; so in a local folder and in any
store that fsspec reaches (`place`). webdataset
reads them as they are; the last member, `__shard__`, which webdataset passes over, is the report of what was left out
and why: samples and report become visible in one rename.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load, save

from usv.training.remote import masked

REPORT = "__shard__"  # webdataset skips members named __like_this__
TEMPORARY = ".*.tmp"  # glob of what a killed writer leaves behind


def place(name: str | Path) -> Path:
    """A folder as pathlib has it: a local one, or of a URL (s3://…, gs://…, memory://…) a `UPath`. ValueError where that cannot be had."""
    if "://" not in str(name):
        return Path(name)
    try:
        from upath import UPath
    except ImportError:
        raise ValueError(f'{masked(name)}: a store needs the package universal_pathlib; pip install "usv[store]", or name a local folder') from None
    try:
        found = UPath(str(name))
        found.fs.ls  # noqa: B018 - made here: its own package may be missing
        return found
    except (ImportError, ValueError) as error:
        raise ValueError(f"{masked(name)}: {error}") from None


def is_local(path: Path) -> bool:
    return isinstance(path, os.PathLike) and type(path).__module__.startswith("pathlib")


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name, by a rename, when everything is in it, and is none otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if is_local(path):
                os.fsync(file.fileno())
        if is_local(path):
            os.replace(temporary, path)
        else:
            path.fs.mv(temporary.path, path.path)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or none: a temporary name, flushed to disk, then a rename."""
    with whole(path) as file:
        file.write(data)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, torch.Tensor], dict]], report=None) -> int:
    """Write (key, tensors, info) samples to one tar; returns how many. Atomic: a temporary name, then a rename.

    Args:
        samples: keys without dots (webdataset splits a name at its first dot); tensors of any dtype, saved as they are.
        report: anything JSON can hold, read when `samples` is exhausted (so a generator may fill it); None writes none.

    Raises OSError as the file system does (disk full, read-only); the name then holds what it held before.
    """
    count = 0
    with whole(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for key, tensors, info in samples:
            tensors = {name: value.contiguous() for name, value in tensors.items()}
            _add(tar, f"{key}.safetensors", save(tensors))
            _add(tar, f"{key}.json", _json(info))
            count += 1
        if report is not None:
            _add(tar, REPORT, _json(report))
    return count


def _json(value) -> bytes:
    # a file's name may be no UTF-8; its odd bytes are then written as JSON writes them
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time stays 0: equal samples give equal files
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, torch.Tensor], dict]]:
    """Yield the (key, tensors, info) samples of one shard in order."""
    tensors: dict = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.name == REPORT:
                continue
            key, suffix = member.name.rsplit(".", 1)
            data = tar.extractfile(member).read()
            if suffix == "safetensors":
                tensors = load(data)
            else:
                yield key, tensors, json.loads(data)


def read_report(path: Path):
    """The report that write_shard was given, None where it was given none. Reads headers only."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        last = tar.getmembers()[-1:]
        return json.loads(tar.extractfile(last[0]).read()) if last and last[0].name == REPORT else None
