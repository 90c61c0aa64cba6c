"""A whole file, looked at but not decoded: what its packets say, and its first picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from cropping import WHOLE, Crop, moov
from decoding import BROKEN, TOLERANCE, Stamps, Trust, Unusable, Video, reason_of

INDEXED = (".mp4", ".mov", ".m4v", ".qt")  # of files whose index, if it counts their pictures, says all that is asked of the decoder before it decodes


@dataclass(frozen=True)
class Scan:
    """What a file shows: `start` and `end` in seconds, when each picture appears (sorted, from 0), and its first frame."""

    start: float
    end: float
    times: np.ndarray
    rate: float
    sar: float
    frame: av.VideoFrame
    codec: str
    sequential: bool  # stamps begin anew somewhere, or there are none: it cannot be seeked in
    crop: Crop = WHOLE


def scan(path: Path) -> Scan:
    """Look at a file: its packets, for headers are often wrong, and its first picture. Raises Unusable."""
    try:
        for quickly in (True, False):
            named = path.suffix.lower() in INDEXED
            with Video(path, for_a_look=quickly and named) as video:
                indexed = video.stream.frames and video.container.format.name.startswith("mov")
                if quickly and named and not indexed:
                    continue
                if found := _scan(video, quickly):
                    return found
    except av.error.InvalidDataError as error:
        raise Unusable(_unreadable(path) or reason_of(error)) from None
    except BROKEN as error:
        raise Unusable(reason_of(error)) from None
    raise Unusable("corrupt: it holds no picture that can be decoded")


def _scan(video: Video, first_alone: bool) -> Scan | None:
    """None where no picture comes out. first_alone: where the film begins with a key picture, that is decoded and nothing else."""
    base, step = float(video.stream.time_base or 1 / video.rate), 1 / video.rate
    trust, stamps, first = Trust(video, listening=False), Stamps(1, video.decoded_order), None
    seen: list[tuple[int, int]] = []
    count, with_pts = 0, True

    def look(packet):
        for frame in trust.decode(packet):
            stamp = stamps.best(frame)
            if trust.begins(stamp):
                return stamp, frame, video.sar
        return None

    for packet in video.packets():
        if first is None and first_alone and not count and _begins_with(packet, video):
            frame = _alone(packet, video.decoder)
            if frame is None:
                return None
            first = packet.pts, frame, video.sar
        elif first is None:
            first = look(packet)
        count += 1
        pts = None if video.decoded_order else packet.pts
        stamp = packet.dts if pts is None else pts
        if stamp is None or packet.is_discard:
            continue
        with_pts &= pts is not None
        seen.append((stamp, packet.duration or 0))
    first = first or look(None)
    if first is None:
        return None
    stamp, frame, sar = first
    codec = video.stream.codec_context.name
    if not seen:  # raw streams have no stamps: their pictures are counted
        return Scan(0.0, count * step, np.arange(count) * step, video.rate, sar, frame, codec, True, video.crop)
    start = stamp * base
    order = np.array([pts for pts, _ in seen], np.float64) * base
    if video.decoded_order:  # a picture comes out some packets after its own went in, and the last ones after the end
        late = int(np.searchsorted(order, start - TOLERANCE))
        order = np.append(order[late:], order[-1] + step * np.arange(1, late + 1))
    keep = order >= (start if with_pts else order.min()) - TOLERANCE
    shown = order[keep]
    last = int(np.flatnonzero(keep)[shown.argmax()])
    steps = shown[1:] - shown[:-1]
    reordered = bool((steps < 0).any())
    times = np.unique(shown) if reordered or not steps.all() else shown
    duration = seen[last][1] * base or step
    if reordered and len(times) > 1:
        # pictures are stored in another order: a packet's duration is then the time to the next packet
        duration = min(duration, median(times[1:] - times[:-1]), float(times[-1] - times[-2]))
    origin = start if with_pts else times[0]
    end = start + float(times[-1] - origin) + duration
    return Scan(start, end, times - origin, video.rate, sar, frame, codec, video.spliced, video.crop)


def _begins_with(packet: av.Packet, video: Video) -> bool:
    """Whether a first packet holds the first picture that is shown, whole: a key picture, progressive, with the stamp of its display, not cut off by an edit list."""
    return not video.decoded_order and packet.is_keyframe and packet.pts is not None and not packet.is_discard and video.decoder.field_order <= 1


def _alone(packet: av.Packet, decoder) -> av.VideoFrame | None:
    """The picture of a packet without those after it, for which a decoder waits to know the order; None where it is not to be had so."""
    try:
        frames = [*decoder.decode(packet), *decoder.decode(None)]
    except av.FFmpegError:
        return None
    return frames[0] if len(frames) == 1 and frames[0].pts == packet.pts else None


def median(values: np.ndarray) -> float:
    """numpy's, of a few numbers: its own takes 40 µs to begin."""
    values = np.sort(values)
    return float(values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def _unreadable(path: Path) -> str:
    """Why FFmpeg finds nothing in a file, as far as its first bytes say; "" where they do not."""
    with open(path, "rb") as file:
        head = file.read(12)
        file.seek(0)
        if not head:
            return "corrupt: it is empty, 0 bytes; copy it again"
        if head[4:8] in (b"ftyp", b"mdat", b"wide", b"free", b"skip") and b"trak" not in moov(file):
            return "corrupt: it has no index (moov), as a recording that was interrupted or a copy that was cut off; record or copy it again"
    return ""
