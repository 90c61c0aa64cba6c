"""Shards: tar files of samples `<key>.safetensors` (latents, text) and `<key>.json` (caption and labels).

A shard is written beside its name and renamed when complete, so whatever stands under its name is whole. webdataset
reads them as they are; the last member, `__shard__`, which webdataset passes over, is the report of what was left out
and why: samples and report become visible in one rename.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load, save

REPORT = "__shard__"  # webdataset skips members named __like_this__
TEMPORARY = ".*.tmp"  # glob of what a killed writer leaves behind


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or none: a temporary name, flushed to disk, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, torch.Tensor], dict]], report=None) -> int:
    """Write (key, tensors, info) samples to one tar; returns how many. Atomic: a temporary name, then a rename.

    Args:
        samples: keys without dots (webdataset splits a name at its first dot); tensors of any dtype, saved as they are.
        report: anything JSON can hold, read when `samples` is exhausted (so a generator may fill it); None writes none.

    Raises OSError as the file system does (disk full, read-only); the name then holds what it held before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for key, tensors, info in samples:
                    tensors = {name: value.contiguous() for name, value in tensors.items()}
                    _add(tar, f"{key}.safetensors", save(tensors))
                    _add(tar, f"{key}.json", _json(info))
                    count += 1
                if report is not None:
                    _add(tar, REPORT, _json(report))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
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
    with tarfile.open(path, "r:") as tar:
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
    with tarfile.open(path, "r:") as tar:
        last = tar.getmembers()[-1:]
        return json.loads(tar.extractfile(last[0]).read()) if last and last[0].name == REPORT else None
