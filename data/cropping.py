"""The part of the stored picture that a container says is shown: `clap` of mov and mp4, PixelCrop of Matroska.

FFmpeg's programs and players obey it (since FFmpeg 7.1); PyAV decodes the whole picture and does not hand the numbers out, so they
are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import floor
from pathlib import Path
from typing import BinaryIO

Crop = tuple[int, int, int, int]  # stored pixels that are hidden at the left, top, right and bottom
WHOLE: Crop = (0, 0, 0, 0)
MOST = 64 << 20  # bytes of an index that are read
SAMPLE_ENTRY = 86  # bytes of a video sample entry before the boxes within it (ISO 14496-12)
EBML, SEGMENT, CLUSTER, TRACKS, ENTRY, VIDEO = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xE0
HIDDEN = (0x54CC, 0x54BB, 0x54DD, 0x54AA)  # PixelCropLeft, Top, Right, Bottom


def hidden(path: Path, kind: str, number: int) -> Crop:
    """What is hidden of the stream `number` of a file whose format FFmpeg calls `kind`; nothing where it does not say, or not soundly."""
    read = _mov if kind.startswith("mov") else _matroska if kind.startswith("matroska") else None
    if read is None:
        return WHOLE
    try:
        with open(path, "rb") as file:
            return read(file, number)
    except (OSError, ValueError, IndexError, struct.error, ZeroDivisionError, StopIteration):
        return WHOLE


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte within, end) of the boxes of a range."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        inside = at + 8
        if size == 1:
            [size] = struct.unpack_from(">Q", data, inside)
            inside += 8
        size = size or end - at
        if at + size > end or at + size < inside:
            return
        yield kind, inside, at + size
        at += size


def _mov(file: BinaryIO, number: int) -> Crop:
    data = moov(file)
    if b"clap" not in data:
        return WHOLE
    at, end = [(a, e) for kind, a, e in _boxes(data, 0, len(data)) if kind == b"trak"][number]
    for name in (b"mdia", b"minf", b"stbl", b"stsd"):
        at, end = next((a, e) for kind, a, e in _boxes(data, at, end) if kind == name)
    _, at, end = next(_boxes(data, at + 8, end))  # the first sample entry
    width, height = struct.unpack_from(">HH", data, at + 24)
    clap = next((a for kind, a, _ in _boxes(data, at - 8 + SAMPLE_ENTRY, end) if kind == b"clap"), None)
    if clap is None:
        return WHOLE
    numbers = struct.unpack_from(">IIIIiIiI", data, clap)
    wide, high, right, down = (top / bottom for top, bottom in zip(numbers[::2], numbers[1::2]))
    across, along = (width - wide) / 2, (height - high) / 2  # the offsets are of the centre
    return _sound(tuple(floor(x + 0.5) for x in (across + right, along + down, across - right, along - down)), width, height)


def moov(file: BinaryIO) -> bytes:
    """The index of a mov or mp4, b"" where there is none."""
    while len(header := file.read(16)) >= 8:
        size, kind = struct.unpack(">I4s", header[:8])
        length = 8
        if size == 1:
            [size], length = struct.unpack(">Q", header[8:]), 16
        file.seek(length - len(header), 1)
        if kind == b"moov":
            return file.read(min(size - length, MOST) if size else MOST)
        if size < length:
            break
        file.seek(size - length, 1)
    return b""


def _number(file: BinaryIO, whole: bool) -> int:
    """A variable-length number of EBML; whole: with the bits that say its length, as identifiers are written. -1: not known."""
    first = file.read(1)[0]
    length = 9 - first.bit_length()
    if length > 8:
        raise ValueError("no EBML")
    rest = int.from_bytes(file.read(length - 1), "big")
    if whole:
        return first << 8 * (length - 1) | rest
    value = (first & (0xFF >> length)) << 8 * (length - 1) | rest
    return -1 if value == (1 << 7 * length) - 1 else value


def _elements(file: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
    """(identifier, end) of the elements up to `end`, the file standing at each one's content."""
    while file.tell() < end:
        kind, size = _number(file, True), _number(file, False)
        stop = end if size < 0 else file.tell() + size
        yield kind, stop
        if size < 0:
            return
        file.seek(stop)


def _matroska(file: BinaryIO, number: int) -> Crop:
    end = file.seek(0, 2)
    file.seek(0)
    entries: list[dict[int, int]] = []
    for kind, stop in _elements(file, end):
        for inner, last in _elements(file, stop) if kind == SEGMENT else ():
            if inner == CLUSTER:
                break
            entries += [_entry(file, until) for track, until in _elements(file, last) if track == ENTRY] if inner == TRACKS else []
        if kind == SEGMENT:
            break
    found = entries[number]
    return _sound(tuple(found.get(name, 0) for name in HIDDEN), found.get(0xB0, 0), found.get(0xBA, 0))


def _entry(file: BinaryIO, end: int) -> dict[int, int]:
    """The numbers of a track's video settings."""
    numbers = {}
    for kind, stop in _elements(file, end):
        for name, until in _elements(file, stop) if kind == VIDEO else ():
            numbers[name] = int.from_bytes(file.read(min(8, until - file.tell())), "big")
    return numbers


def _sound(crop: Crop, width: int, height: int) -> Crop:
    left, top, right, bottom = crop
    return crop if min(crop) >= 0 and left + right < width and top + bottom < height else WHOLE
