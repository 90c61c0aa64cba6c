"""Captions as people keep them: a text beside each clip, or tables as other trainers read them.

| layout | file | what it holds |
|---|---|---|
| this one | captions.csv, captions.jsonl, captions.json | file, caption |
| Hugging Face | metadata.csv, metadata.jsonl | file_name, text |
| musubi-tuner | *.jsonl | video_path, caption |
| VideoX-Fun | metadata.json | [{file_path, text, type}] |
| DiffSynth | metadata.csv | video, prompt |
| diffusion-pipe | captions.json | {file: caption or [captions]} |
| finetrainers | videos.txt and prompts.txt | a path, and a caption, on each line |

A table may lie in any sub-folder; its paths count from there, or are absolute.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

FILE_KEYS = ("file", "file_name", "filename", "file_path", "filepath", "video", "video_path", "videos", "path", "media_path")
CAPTION_KEYS = ("caption", "text", "prompt", "captions", "prompts", "description")
TABLES = ("captions", "metadata", "caption", "prompts")  # names whose tables must be readable; others are if they fit
PAIRS = [(v, c) for v in ("videos.txt", "video.txt") for c in ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")]
HALF = re.compile("[\ud800-\udfff]")  # half of an emoji, where a text was cut by a program that counts in UTF-16
csv.field_size_limit((1 << 31) - 1)  # a caption may be longer than 131,072 letters


@dataclass
class Table:
    """Rows by normalised path relative to the folder of videos, and lines that could not be read."""

    rows: dict[str, dict] = field(default_factory=dict)  # {"captions": [...], label: value, ...}
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (table, reason)
    sources: list[str] = field(default_factory=list)


def read_text(path: Path) -> str:
    """A text in UTF-8 or UTF-16 (with its byte order mark). ValueError that names the file for any other."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8 (from another "
            f"encoding, e.g. iconv -f cp1252 -t utf-8)"
        ) from None


def lines_of(path: Path) -> list[str]:
    """Lines as editors and JSON Lines count them: str.splitlines ends one at U+2028, U+0085 and six others, which may stand in a caption."""
    return read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def text_beside(path: Path) -> str:
    """The caption in clip.txt (or clip.caption) beside clip.mp4, on one line; "" where there is none."""
    for suffix in (".txt", ".caption"):
        text = path.with_suffix(suffix)
        if text.is_file():
            return " ".join(read_text(text).split())
    return ""


def plain(name: str) -> str:
    """A path as tables and folders agree on it: composed accents, no './', forward slashes."""
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    return os.path.normpath(name).replace(os.sep, "/") if name else ""


def read_tables(folder: Path, folders: list[Path], known: set[str]) -> Table:
    """All tables of captions in `folders`, which lie below `folder` (or are it); `known`: plain names of its videos.

    ValueError names the file: columns that are not there, another encoding, lists of different length.
    """
    table = Table()
    for place in folders:
        for name in sorted(os.listdir(place)):
            path = place / name if name.lower().endswith((".csv", ".tsv", ".jsonl", ".json")) else None
            if path is None or not path.is_file() or name == "skipped.jsonl":
                continue
            suffix, own = path.suffix.lower(), path.stem.lower() in TABLES
            try:
                rows = list({".json": _json, ".jsonl": _jsonl}.get(suffix, _csv)(path, table, own))
            except ValueError:
                if own:
                    raise
                continue  # some other file that happens to be a table
            _take(table, rows, path, folder, known)
        for videos, captions in PAIRS:
            if (place / videos).is_file() and (place / captions).is_file():
                names = [line.strip() for line in lines_of(place / videos)]
                texts = [line.strip() for line in lines_of(place / captions)]
                names, texts = _without_end(names), _without_end(texts)
                if len(names) != len(texts):
                    raise ValueError(f"{place / videos} has {len(names)} lines and {captions} {len(texts)}; "
                                     "line by line they belong together")  # fmt: skip
                _take(table, list(zip(names, texts, [{}] * len(names))), place / videos, folder, known)
                break
    return table


def _without_end(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def _take(table: Table, rows: list, path: Path, folder: Path, known: set[str]) -> None:
    """Add (name, caption or captions, labels) rows of one table."""
    if rows:
        table.sources.append(path.relative_to(folder).as_posix())
    rows = [row for row in rows if row[0].strip()]  # lists of lines may have empty ones in the middle
    found = {name: _beside(name, path.parent, folder, known) for name, *_ in rows}
    sure = any(place in known for place in found.values())  # its paths count from its own folder
    for name, captions, labels in rows:
        captions = [captions] if isinstance(captions, str) else captions
        row = table.rows.setdefault(found[name] if sure else _place(name, path.parent, folder, known), {"captions": []})
        for caption in (" ".join(HALF.sub("\ufffd", caption).split()) for caption in captions):
            if caption and caption not in row["captions"]:
                row["captions"].append(caption)
        row.update(labels)


def _beside(name: str, beside: Path, folder: Path, known: set[str]) -> str:
    """The plain name, relative to `folder`, of what a table in `beside` calls `name`, whether it is there or not."""
    name = plain(name)
    whole = name if os.path.isabs(name) else os.path.normpath(os.path.join(beside.absolute(), name))
    for root in (folder.absolute(), folder.resolve()):
        inside = plain(os.path.relpath(whole, root))
        if inside in known:
            return inside
    return name if os.path.isabs(name) else plain(os.path.relpath(whole, folder.absolute()))


def _place(name: str, beside: Path, folder: Path, known: set[str]) -> str:
    """Of a table none of whose paths is there as it stands: the plain name of the video it calls `name`."""
    name, here = plain(name), plain(os.path.relpath(beside, folder))
    # a table written on another machine, or for the folder above: the longest end of the path that is here
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    for first in range(len(parts)):
        end = "/".join(parts[first:])
        for place in (os.path.normpath(f"{here}/{end}"), end):  # beside the table before anywhere else
            if place in known:
                return place
    return name


def _json(path: Path, table: Table, own: bool):
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    named = _key(content, FILE_KEYS) if isinstance(content, dict) else None
    if isinstance(content, dict) and not isinstance(content.get(named), str):  # also {"videos": [...]}, whose key is a word for a file
        lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1 and _key(lists[0][0], FILE_KEYS):
            content = lists[0]
        else:
            content = [{**(v if isinstance(v, dict) else {"caption": v}), "file": k} for k, v in content.items()]
    if isinstance(content, dict):
        content = [content]
    yield from _objects(content, path, table, own, "entry")


def _jsonl(path: Path, table: Table, own: bool):
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError:
                rows.append((number, None))
    yield from _objects([row for _, row in rows], path, table, own, "line", [number for number, _ in rows])


def _objects(rows, path: Path, table: Table, own: bool, what: str, numbers: list[int] | None = None):
    wrong = []
    for number, row in zip(numbers or range(1, len(rows) + 1), rows):
        file = _key(row, FILE_KEYS) if isinstance(row, dict) else None
        text = _key(row, CAPTION_KEYS) if isinstance(row, dict) else None
        captions = row[text] if text else None
        texts = captions if isinstance(captions, list) else [captions]
        if not file or not isinstance(row[file], str) or not text or not all(isinstance(t, str) for t in texts):
            wrong.append((path.name, f'unreadable: {what} {number} is not {{"file": "...", "caption": "..."}} '
                                     f"(file: {', '.join(FILE_KEYS[:8])}; caption: {', '.join(CAPTION_KEYS[:3])})"))  # fmt: skip
            continue
        yield row[file], texts, {key: value for key, value in row.items() if key not in (file, text)}
    if wrong and not own and len(wrong) == len(rows):
        raise ValueError(f"{path} is no table of captions")
    table.skipped += wrong


def _csv(path: Path, table: Table, own: bool):
    text = read_text(path)
    for delimiter in (",", ";", "\t"):
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            names = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
            file = next((names[key] for key in FILE_KEYS if key in names), None)
            caption = next((names[key] for key in CAPTION_KEYS if key in names), None)
            if file and caption:
                for row in rows:
                    if any(part.strip() for part in row.get(None) or ()):
                        table.skipped.append((path.name, f"unreadable: line {rows.line_num} has more columns than the first; a caption with {delimiter!r} in it stands in quotes"))
                    elif row[file]:
                        yield row[file], row[caption] or "", {}
                return
        except csv.Error as error:
            raise ValueError(f"{path}: line {rows.line_num}: {error}") from None
    columns = next(csv.reader(io.StringIO(text)), [])
    raise ValueError(
        f"{path} has columns {columns}; its first line has to name 'file' and 'caption' (or {', '.join(FILE_KEYS[1:8])}; "
        f"{', '.join(CAPTION_KEYS[1:3])})"
    )


def _key(row: dict, keys: tuple[str, ...]) -> str | None:
    low = {str(name).lower(): name for name in row}
    return next((low[key] for key in keys if key in low), None)
