"""Files as programs leave them: whole or not at all, by one writer at a time, as readable as the folder they lie in.

A file is written under a temporary name in its folder, flushed to the disk and renamed; so is a folder. A kill, an error or a full
disk at any moment leaves what stood there before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RENAMES = 100  # attempts of a writer whose folder readers put back


class FileError(OSError):
    """A file or folder that cannot be written or is another's; the message says why and what to do."""


def reason_of(error: BaseException) -> str:
    """An error in a line: of the system its words, else its first line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return words.splitlines()[0][:200] if words.strip() else type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in here, the serialisers' own errors included, becomes one FileError that says what the disk has left."""
    try:
        yield
    except FileError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        told = not isinstance(error, OSError) or error.errno is None or error.errno in FULL  # the serialisers name no errno
        room = f"; the disk has {_room(path)} left, make room" if told else ""
        raise FileError(f"{path}: cannot be written ({reason_of(error)}{room}); what stood there before still stands") from error


def _room(path: Path) -> str:
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
    return "an unknown number of MiB"


def temporary_name(path: Path) -> Path:
    """A sibling that no other process takes; it keeps the suffix, by which libraries choose formats."""
    return path.with_name(f".{path.stem[:100]}.{os.getpid()}.tmp{path.suffix}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling to write; it takes the place of `path` when the block ends well."""
    path = Path(path)
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Bring a file to the disk: a rename may reach it before the contents do."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- folders ---------------------------------------------------------------------------------------------------------


def atomic_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary sibling by `write(folder)`, then put it in the place of `path`; the old one stands until then."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        settle(path)
        fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        try:
            write(fresh)
            for file in fresh.rglob("*"):
                if file.is_file():
                    file.chmod(fresh.stat().st_mode & 0o666)  # safetensors makes its files for the owner alone
                    flush(file)
            for attempt in range(RENAMES):
                if path.exists():
                    os.replace(path, old)
                try:
                    os.replace(fresh, path)
                    break
                except OSError as error:  # a reader found the old one aside and put it back
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == RENAMES - 1:
                        raise
        finally:
            settle(path)
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def settle(path: Path) -> None:
    """Put the old folder back where a kill or an error came between the two renames of `atomic_folder`."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        with suppress(OSError):  # another process was quicker, or this one may only read
            os.replace(old, path)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it when the process ends, however it ends. FileError where another holds it."""
    if fcntl is None:
        print(f"{folder}: this system has no file locks; take care that no other run writes there")
        yield
        return
    name = Path(folder) / ".lock"
    while True:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise FileError(f"output_dir={folder}: another run writes there ({holder or 'it does not say which'}); end it, or take another output_dir") from None
            print(f"{folder}: its file system has no locks ({reason_of(error)}); take care that no other run writes there")
            yield
            return
        try:
            same = os.stat(name).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(descriptor)  # the one that held it removed the name between our opening and our locking
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.unlink(name)
        os.close(descriptor)


# ---- results ---------------------------------------------------------------------------------------------------------

JSON = ("{", "[")


def check_output(path: Path | None, option: str = "--out", begins: tuple[str, ...] | None = JSON) -> None:
    """Prove before the work that a result can be written at `path`. FileError where a folder or a file of another kind stands there.

    begins: what a file that may be replaced begins with; None: any.
    """
    if path is None:
        return
    path = Path(path)
    if not path.name or path.is_dir():
        raise FileError(f"{option}: got {str(path)!r}, a folder, accepted: the name of a file in it, e.g. {path / 'result.json'}")
    if path.exists() and not path.is_file():
        raise FileError(f"{option}: got {path}, which is no ordinary file, accepted: the name of a file")
    if begins is not None and path.is_file() and path.stat().st_size:
        try:
            with open(path, "rb") as file:
                head = file.read(64).decode(errors="replace").lstrip().lower()
        except OSError as error:
            raise FileError(f"{option}: got {path}, which cannot be read ({reason_of(error)}), accepted: a new name") from None
        if not head.startswith(begins):
            raise FileError(f"{option}: got {path}, where a file stands that no earlier result is, accepted: a new name, or remove that file")
    check_folder(path.parent, option)


def check_folder(folder: Path | None, option: str = "--out") -> None:
    """Make a folder and prove that files can be written in it. FileError."""
    if folder is None:
        return
    probe = Path(folder) / f".writable.{os.getpid()}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        probe.unlink(missing_ok=True) if Path(folder).is_dir() and probe.exists() else None
        raise FileError(f"{option}={folder}: cannot be written ({reason_of(error)}); give a folder you may write to") from None


def write_result(path: Path, report: dict, **options) -> None:
    """A result as JSON, whole or not at all."""
    write_text(path, json.dumps(report, **{"indent": 1, **options}) + "\n")
    print(path)
