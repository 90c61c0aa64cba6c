"""Files of a dataset that may lie anywhere fsspec reaches (s3://…, gs://…, https://…), fetched once, whole, into a local folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from usv.files import replacing

SECRETS = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?P<user>[^\s/?#@'\"]*@)?(?P<rest>[^\s?#'\"]*)(?P<query>\?[^\s'\"]*)?")
PASSING = {"atime", "accessed", "LastAccessed", "islink", "destination"}  # what a look at a file changes


def masked(text) -> str:
    """A text in which no URL shows its password, its user or its query, where signatures stand."""
    return SECRETS.sub(lambda m: m["scheme"] + ("***@" if m["user"] else "") + m["rest"] + ("?***" if m["query"] else ""), str(text))


def reason(error: Exception, url: str) -> str:
    """What a file system says of a URL, without the URL's user, password and signature, which it may repeat."""
    parts, text = urlsplit(url), f"{type(error).__name__}: {masked(error)}"
    for secret in (parts.netloc.rpartition("@")[0], parts.password, parts.query):
        text = text.replace(secret, "***") if secret else text
    return " ".join(text.split())[:300]


def masked_settings(value):
    """A tree of settings with its texts masked, for logs and reports that others read."""
    if isinstance(value, dict):
        return {masked(name) if isinstance(name, str) else name: masked_settings(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [masked_settings(entry) for entry in value]
    return masked(value) if isinstance(value, str) else value


class DataError(ValueError):
    """Training data that cannot be used; the message says why, what is accepted and what to do."""


@dataclass(frozen=True)
class Remote:
    """A file or folder that fsspec reaches; as much of Path as is needed here."""

    url: str

    def __truediv__(self, name: str) -> Remote:
        return self._at(lambda path: f"{path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return masked(self.url)

    def __repr__(self) -> str:
        return f"Remote({masked(self.url)!r})"

    def _at(self, change) -> Remote:
        """Another path of the same place; a signature stays behind it."""
        parts = urlsplit(self.url)
        if not parts.path and not parts.query:  # s3://bucket
            return Remote(change(self.url))
        return Remote(urlunsplit(parts._replace(path=change(parts.path))))

    @property
    def name(self) -> str:
        return urlsplit(self.url).path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Remote:
        return self._at(lambda path: path.rstrip("/").rsplit("/", 1)[0])

    def read_bytes(self) -> bytes:
        """DataError where it cannot be read."""
        import fsspec

        try:
            with fsspec.open(self.url, "rb") as file:
                return file.read()
        except Exception as error:  # every file system raises its own kinds
            raise DataError(
                f"{self}: cannot be read ({reason(error, self.url)}); check the URL and your access"
            ) from None


def version_of(path: Remote) -> dict:
    """What tells a file from one that was put in its place: size, time, tag, as far as its file system says."""
    import fsspec

    system, place = fsspec.core.url_to_fs(path.url)
    return {name: str(value) for name, value in system.info(place).items() if name not in PASSING and name != "name"}


def fetched(path: Path | Remote, cache: Path) -> Path:
    """A local file with the contents of `path`: itself, or fetched into `cache`, complete or not at all. DataError.

    One that was made anew at the same URL is fetched anew.
    """
    if isinstance(path, Path):
        return path
    import fsspec

    try:
        version = version_of(path)
        mark = hashlib.sha256(json.dumps([path.url.split("?")[0], version], sort_keys=True).encode()).hexdigest()[:16]
        target = Path(cache) / f"{mark}-{path.name}"
        if not target.exists():
            with replacing(target) as temporary:  # ranks may fetch the same shard at once
                with fsspec.open(path.url, "rb") as remote, open(temporary, "wb") as local:
                    shutil.copyfileobj(remote, local, 1 << 22)
                size = version.get("size")
                if size is not None and size.isdigit() and int(size) != temporary.stat().st_size:
                    raise OSError(f"{temporary.stat().st_size} of {size} bytes came")
    except Exception as error:  # every file system raises its own kinds
        raise DataError(
            f"{path}: cannot be fetched ({reason(error, path.url)}); check the URL and your access"
        ) from None
    return target
