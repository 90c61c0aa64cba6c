"""Files of a dataset that may lie anywhere fsspec reaches (s3://…, gs://…, https://…), fetched once, whole, into a local folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """Training data that cannot be used; the message says why, what is accepted and what to do."""


@dataclass(frozen=True)
class Remote:
    """A file or folder that fsspec reaches; as much of Path as is needed here."""

    url: str

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rstrip("/").rsplit("/", 1)[0])

    def read_bytes(self) -> bytes:
        """DataError where it cannot be read."""
        import fsspec

        try:
            with fsspec.open(self.url, "rb") as file:
                return file.read()
        except Exception as error:  # every file system raises its own kinds
            raise DataError(
                f"{self.url}: cannot be read ({type(error).__name__}: {error}); check the URL and your access"
            ) from None


def fetched(path: Path | Remote, cache: Path) -> Path:
    """A local file with the contents of `path`: itself, or fetched into `cache`, complete or not at all. DataError."""
    if isinstance(path, Path):
        return path
    import fsspec

    target = cache / f"{hashlib.sha256(path.url.encode()).hexdigest()[:16]}-{path.name}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")  # ranks may fetch the same shard at once
        try:
            with fsspec.open(path.url, "rb") as remote, open(temporary, "wb") as local:
                shutil.copyfileobj(remote, local, 1 << 22)
            os.replace(temporary, target)
        except Exception as error:
            raise DataError(
                f"{path.url}: cannot be fetched ({type(error).__name__}: {error}); check the URL and your access"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
    return target
