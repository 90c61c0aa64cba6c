"""Which files of a folder are videos, and their captions."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from captions import plain, read_tables, text_beside

EXTENSIONS = {
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif", ".flv", ".wmv", ".mts", ".m2ts",
    ".m2t", ".3gp", ".3g2", ".ogv", ".ogg", ".vob", ".mxf", ".dv", ".asf", ".f4v", ".mpe", ".m1v", ".m2v", ".mp2v", ".qt",
    ".y4m", ".nut", ".rm", ".rmvb", ".divx", ".h264", ".264", ".h265", ".hevc", ".265", ".apng", ".ivf", ".wtv", ".mjpeg",
}  # fmt: skip
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".exr", ".dpx"}
OTHERS = PICTURES | {
    ".txt", ".caption", ".csv", ".tsv", ".json", ".jsonl", ".toml", ".yaml", ".yml", ".md", ".html", ".pdf", ".py", ".sh",
    ".srt", ".vtt", ".ass", ".sub", ".wav", ".mp3", ".aac", ".m4a", ".flac", ".opus", ".npz", ".npy", ".pt", ".safetensors",
    ".parquet", ".arrow", ".xlsx", ".ndjson", ".tar", ".zip", ".gz", ".lock", ".log", ".ini", ".db", ".part", ".tmp", ".xml", ".nfo", ".lrv", ".thm", "",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One captioned video: path relative to the folder, caption, what else its table says, and further captions."""

    file: str
    caption: str
    labels: dict = field(default_factory=dict)
    more: list[str] = field(default_factory=list)

    @property
    def captions(self) -> list[str]:
        return [self.caption, *self.more]


def skip(file: str, reason: str, clip: int | None = None) -> dict:
    """A line of skipped.jsonl; `clip` None means the whole file."""
    return {"file": file, "clip": clip, "reason": reason}


def find_videos(folder: Path, default_caption: str | None = None) -> tuple[list[Source], list[dict]]:
    """All captioned videos below `folder` in order of their names, and what has to be left out.

    A caption comes from a table (see captions.py), else from clip.txt beside clip.mp4, else it is `default_caption`.
    Sub-folders that are symbolic links are followed. ValueError when the folder does not exist or a table is no table.
    """
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: no such folder; name a folder of videos with captions beside them")
    folders, files = [], []
    for place, names in _walk(folder):
        folders.append(place)
        files += [place / name for name in names]
    length = len(str(folder)) + 1 if str(folder) != "." else 0
    by_name = {plain(str(path)[length:]): path for path in files}
    table = read_tables(folder, folders, {**_stems(by_name), **dict(zip(by_name, by_name))})
    skipped = [skip(name, reason) for name, reason in table.skipped]
    sources = []
    for path in sorted(files):
        name = str(path)[length:]
        row = table.rows.get(plain(name)) if table.rows else None
        kind = _suffix(name)
        if kind not in EXTENSIONS and row is None and (kind in OTHERS or not path.with_suffix(".txt").is_file()):
            if kind in PICTURES and plain(os.path.splitext(name)[0] + ".txt") in by_name:
                skipped.append(skip(name, "not a video: a picture with a caption; pictures, moving ones of this kind too, are not read"))
            elif kind not in OTHERS:
                skipped.append(skip(name, f"not a video: {path.suffix} is none of the extensions that are read; name the "
                                          "file in a table of captions to have it tried"))  # fmt: skip
            continue
        try:
            captions = (row or {}).get("captions") or [text_beside(path) or default_caption or ""]
        except ValueError as error:
            skipped.append(skip(name, f"no caption: {error}"))
            continue
        if not captions[0]:
            read = f" ({', '.join(table.sources)} read)" if table.sources else ""
            if table.unread:
                read += f" ({', '.join(table.unread[:3])} is there, of a kind that is not read; save it as captions.csv with the columns file and caption)"
            skipped.append(skip(name, f"no caption: neither {path.stem}.txt, captions.csv, captions.jsonl, metadata.csv, "
                                      f"metadata.jsonl{read} nor --caption"))  # fmt: skip
            continue
        labels = {key: value for key, value in (row or {}).items() if key not in ("file", "caption", "captions")}
        sources.append(Source(name, captions[0], labels, captions[1:]))
    missing = [name for name in table.rows if name not in by_name]
    skipped += [skip(name, "missing: named by the captions, but no such video in the folder") for name in missing]
    skipped += _folders_of_frames(folder, folders, files)
    return sources, skipped


def _stems(names: dict[str, Path]) -> dict[str, str]:
    """Plain name without its extension -> plain name, of videos that alone have it."""
    found: dict[str, str] = {}
    for name in names:
        if (kind := _suffix(name)) in EXTENSIONS:
            stem = name[: -len(kind)]
            found[stem] = "" if stem in found else name
    return {stem: name for stem, name in found.items() if name}


def _suffix(name: str) -> str:
    """Path(name).suffix.lower(), which takes longer than all else that is asked of a file's name."""
    dot, begin = name.rfind("."), name.rfind(os.sep) + 1
    return name[dot:].lower() if begin < dot < len(name) - 1 else ""


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below `folder`, real ones before links to others, each once, with the names of their files."""
    seen = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop(0)
        real = os.path.realpath(place)
        if real in seen:  # a link back to where we come from
            continue
        seen.add(real)
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        # macOS leaves a ._clip.mp4 beside clip.mp4 on foreign disks; it is no video
        yield place, [e.name for e in entries if e.is_file() and not e.name.startswith("._")]
        # .ipynb_checkpoints holds yesterday's captions, .Trash-1000 deleted films, .cache what a hub's program notes of its files
        below = [e for e in entries if e.is_dir() and not e.name.startswith(".")]
        waiting += [place / e.name for e in sorted(below, key=lambda e: e.is_symlink())]


def _folders_of_frames(folder: Path, folders: list[Path], files: list[Path]) -> list[dict]:
    """Folders of numbered pictures: listed, for nothing says at what rate they are to be shown."""
    found, inside = [], defaultdict(list)
    kinds = {path: kind for path in files if (kind := _suffix(path.name)) in PICTURES or kind in EXTENSIONS}
    if PICTURES.isdisjoint(kinds.values()):
        return found
    for path in kinds:
        inside[path.parent].append(path)
    for place in folders:
        pictures = [p for p in inside[place] if kinds[p] in PICTURES and p.stem[-1:].isdigit()]
        if len(pictures) >= 3 and not any(kinds[p] in EXTENSIONS for p in inside[place]):
            name = place.relative_to(folder).as_posix()
            reason = f"not a video: a folder of {len(pictures)} pictures; make a video of it, e.g. ffmpeg -framerate 24 "
            found.append(skip(name, reason + f"-pattern_type glob -i '*{pictures[0].suffix}' clip.mp4"))
    return found
