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
| CogVideoX | labels/clip.txt beside videos/clip.mp4 | the caption; also captions/, prompts/, texts/ |
| video2dataset | clip.json beside clip.mp4 | caption |

A table may lie in any sub-folder; its paths count from there, or are absolute. A name without an extension is the video's that has no other.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

FILE_KEYS = ("file", "file_name", "filename", "file_path", "filepath", "video", "video_path", "videos", "path", "media_path")
CAPTION_KEYS = ("caption", "text", "prompt", "captions", "prompts", "description")
TABLES = ("captions", "metadata", "caption", "prompts")  # names whose tables must be readable; others are if they fit
PAIRS = [(v, c) for v in ("videos.txt", "video.txt") for c in ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")]
TEXT_FOLDERS = ("labels", "captions", "prompts", "texts")  # of texts named as the videos are
NOT_READ = (".parquet", ".arrow", ".xlsx", ".yaml", ".yml")  # kinds of a table of captions that are named where captions are missing
OURS = {"settings", "sources", "parts"}  # of plan.json, where --out lies among the videos
HALF = re.compile("[\ud800-\udfff]")  # half of an emoji, where a text was cut by a program that counts in UTF-16
csv.field_size_limit((1 << 31) - 1)  # a caption may be longer than 131,072 letters


@dataclass
class Table:
    """Rows by normalised path relative to the folder of videos, and lines that could not be read."""

    rows: dict[str, dict] = field(default_factory=dict)  # {"captions": [...], label: value, ...}
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (table, reason)
    sources: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # tables of a kind that is not read


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
    """The caption of clip.mp4 on one line: of clip.txt, clip.caption, clip.mp4.txt or clip.json beside it, else of clip.txt in a folder of texts
    within its folder or beside that; "" where there is none."""
    for text in (path.with_suffix(".txt"), path.with_suffix(".caption"), path.with_name(f"{path.name}.txt")):
        if text.is_file():
            return one_line(read_text(text))
    if caption := _json_beside(path.with_suffix(".json")):
        return caption
    folders = (place / name for place in (path.parent, path.parent.parent) for name in TEXT_FOLDERS)
    text = next((text for folder in folders if (text := folder / f"{path.stem}.txt").is_file()), None)
    return "" if text is None else one_line(read_text(text))


def _json_beside(path: Path) -> str:
    """The caption in a JSON object of one video, as video2dataset writes it; "" where it says none."""
    try:
        content = json.loads(read_text(path)) if path.is_file() else {}
    except (ValueError, RecursionError):
        return ""  # no more than a file beside a video
    text = content.get(_key(content, CAPTION_KEYS)) if isinstance(content, dict) else None
    return one_line(text) if isinstance(text, str) else ""


def one_line(text: str) -> str:
    """A caption without line breaks and halves of letters."""
    return " ".join(HALF.sub("\ufffd", text).split())


def plain(name: str) -> str:
    """A path as tables and folders agree on it: composed accents, no './', forward slashes."""
    name = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    return os.path.normpath(name).replace(os.sep, "/") if name else ""


def read_tables(folder: Path, folders: list[Path], known: dict[str, str]) -> Table:
    """All tables of captions in `folders`, which lie below `folder` (or are it); `known`: plain name or stem -> plain name of its files.

    ValueError names the file: columns that are not there, another encoding, lists of different length.
    """
    table, bare = Table(), {PurePosixPath(name).name for name in known}
    readers = {".json": partial(_json, bare=bare), ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv}
    for place in folders:
        for name in sorted(os.listdir(place)):
            stem, suffix = os.path.splitext(name.lower())
            own = stem in TABLES
            if own and suffix in NOT_READ:
                table.unread.append((place / name).relative_to(folder).as_posix())
            path = place / name if suffix in readers else None
            if path is None or not path.is_file() or name == "skipped.jsonl":
                continue
            try:
                rows = list(readers[suffix](path, table, own))
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
        else:
            table.unread += [(place / name).relative_to(folder).as_posix() for name in dict.fromkeys(c for _, c in PAIRS) if (place / name).is_file()]
    return table


def _without_end(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def _take(table: Table, rows: list, path: Path, folder: Path, known: dict[str, str]) -> None:
    """Add (name, caption or captions, labels) rows of one table."""
    if rows:
        table.sources.append(path.relative_to(folder).as_posix())
    rows = [row for row in rows if row[0].strip()]  # lists of lines may have empty ones in the middle
    found = {name: _beside(name, path.parent, folder, known) for name, *_ in rows}
    sure = any(place in known for place in found.values())  # its paths count from its own folder
    for name, captions, labels in rows:
        captions = [captions] if isinstance(captions, str) else captions
        row = table.rows.setdefault(found[name] if sure else _place(name, path.parent, folder, known), {"captions": []})
        for caption in map(one_line, captions):
            if caption and caption not in row["captions"]:
                row["captions"].append(caption)
        row.update(labels)


def _beside(name: str, beside: Path, folder: Path, known: dict[str, str]) -> str:
    """The plain name, relative to `folder`, of what a table in `beside` calls `name`, whether it is there or not."""
    name = plain(name)
    whole = name if os.path.isabs(name) else os.path.normpath(os.path.join(beside.absolute(), name))
    for root in (folder.absolute(), folder.resolve()):
        inside = plain(os.path.relpath(whole, root))
        if inside in known:
            return known[inside]
    return name if os.path.isabs(name) else plain(os.path.relpath(whole, folder.absolute()))


def _place(name: str, beside: Path, folder: Path, known: dict[str, str]) -> str:
    """Of a table none of whose paths is there as it stands: the plain name of the video it calls `name`."""
    name, here = plain(name), plain(os.path.relpath(beside, folder))
    # a table written on another machine, or for the folder above: the longest end of the path that is here
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
    for first in range(len(parts)):
        end = "/".join(parts[first:])
        for place in (os.path.normpath(f"{here}/{end}"), end):  # beside the table before anywhere else
            if place in known:
                return known[place]
    return name


def _json(path: Path, table: Table, own: bool, bare: set[str]):
    """Rows of a list of objects, of one below a word, of columns, or of an object by file; bare: names and stems of the files that are there."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    named = _key(content, FILE_KEYS) if isinstance(content, dict) else None
    if isinstance(content, dict) and not isinstance(content.get(named), str):  # also {"videos": [...]}, whose key is a word for a file
        lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if OURS <= content.keys():
            raise ValueError(f"{path} is the plan of a folder of shards")
        if len(lists) == 1 and _key(lists[0][0], FILE_KEYS):
            content = lists[0]
        elif columns := _columns(content):
            content = [dict(zip(columns, row)) for row in zip(*columns.values())]
        elif own or any("." in name or PurePosixPath(plain(name)).name in bare for name in content):
            content = [{**(v if isinstance(v, dict) else {"caption": v}), "file": k} for k, v in content.items()]
        else:  # the settings of a program, or what another has noted of one video
            raise ValueError(f"{path} is no table of captions")
    if isinstance(content, dict):
        content = [content]
    yield from _objects(content, path, table, own, "entry")


def _columns(content: dict) -> dict[str, list]:
    """Columns of one length, files and captions among them, as pandas and datasets write a table; {} where it is none."""
    file, text = _key(content, FILE_KEYS), _key(content, CAPTION_KEYS)
    if file is None or text is None or not isinstance(content[file], list | dict):
        return {}
    columns = {name: list(v.values()) if isinstance(v, dict) else v for name, v in content.items() if isinstance(v, list | dict)}
    columns = {name: values for name, values in columns.items() if len(values) == len(columns[file])}
    return columns if text in columns and all(isinstance(name, str) for name in columns[file]) else {}


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
    lines = list(io.StringIO(text, newline=""))
    for delimiter in (",", ";", "\t"):
        rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
        try:
            names = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
            file = next((names[key] for key in FILE_KEYS if key in names), None)
            caption = next((names[key] for key in CAPTION_KEYS if key in names), None)
            if file and caption:
                before = rows.line_num
                for row in rows:
                    first, before = before + 1, rows.line_num
                    if before > first and not _closes(lines[first - 1 : before], delimiter):
                        table.skipped.append((path.name, f"unreadable: line {first} opens a quote that does not close at the end of a column, and lines up to {before} with it; double a quote within a caption"))
                    elif any(part.strip() for part in row.get(None) or ()):
                        table.skipped.append((path.name, f"unreadable: line {rows.line_num} has more columns than the first; a caption with {delimiter!r} in it stands in quotes"))
                    elif row[file]:
                        yield row[file], row[caption] or "", {}
                return
        except csv.Error as error:
            raise ValueError(f"{path}: line {rows.line_num}: {error}") from None
    columns = next(csv.reader(lines), [])
    raise ValueError(
        f"{path} has columns {columns}; its first line has to name 'file' and 'caption' (or {', '.join(FILE_KEYS[1:8])}; "
        f"{', '.join(CAPTION_KEYS[1:3])})"
    )


def _closes(lines: list[str], delimiter: str) -> bool:
    """Whether a row of several lines is one by the rules, and not a stray quote that has swallowed the rows after it."""
    try:
        rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        return sum(map(bool, rows)) == 1  # empty lines before a row count as its own
    except csv.Error:
        return False


def _key(row: dict, keys: tuple[str, ...]) -> str | None:
    """The first of `keys` that a row has, of those with a value if any has one."""
    low = {str(name).lower(): name for name in row}
    there = [low[key] for key in keys if key in low]
    return next((name for name in there if row[name]), there[0] if there else None)
