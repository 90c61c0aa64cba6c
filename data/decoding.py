"""A video file as frames in the order of display, each with the moment it appears and whether it can be trusted.

PyAV demuxes and decodes; this file decides what players decide between the two: which stream is the film, which stamp
is a frame's, where decoding may begin, and which pictures a damaged stream has spoilt. `scan` looks at a whole file
and decodes no more than its first picture.
"""

from __future__ import annotations

import os
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
from cropping import WHOLE, Crop, hidden

TOLERANCE = 1e-3  # seconds by which two time stamps may differ and still mean the same moment
MAX_PIXELS = 8192 * 8192  # a stored picture may have: twice 8K; a decoder holds up to 17 of them
JUMP = 10.0  # seconds by which stamps jump where two recordings were joined (FFmpeg's bound)
LONGEST_HOLD = 30.0  # seconds for which one picture may stand before the next stamp is doubted
NO_STAMPS = 0x80  # AVFMT_NOTIMESTAMPS: a bare stream, of which FFmpeg's average rate is its own guess of 25
JOINED = ("mpegts", "mpeg", "dvd", "vob")  # formats whose stamps may begin anew in the middle
PICTURES = (av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails | av.stream.Disposition.still_image).value
NOT_CODED = 8  # bytes that a packet of MPEG-4 has at most which only says that the picture before stays (vop_coded = 0)
HIDDEN = ("vp8", "vp9", "av1")  # codecs with packets that show no picture


class Unusable(Exception):
    """A file or clip that has to be left out; the text is `<kind>: <reason>`."""


BROKEN = (av.FFmpegError, OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, MemoryError, Unusable)


def reason_of(error: Exception) -> str:
    """Why a file or clip is left out. FileNotFoundError goes on: a lost disk must stop the run, not empty the shards."""
    if isinstance(error, FileNotFoundError):
        raise error
    if isinstance(error, Unusable):
        return str(error)
    # what the system says, without its number and the path, which stands beside it
    said = getattr(error, "strerror", None) or _first_line(error)
    return f"corrupt: {type(error).__name__}: {said}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


@dataclass(frozen=True)
class Moment:
    """A decoded frame: seconds after the start of the video, how long it lasts if nothing follows, and what is wrong.

    `spoilt` says why the picture cannot be trusted; `lost`: pictures are missing between this one and the next. `group`
    numbers the group of pictures, between two key pictures; `ruined` are the groups, of all decoded up to now, in which
    the decoder complained: what is wrong in a group may be wrong before it is noticed.
    """

    time: float
    duration: float
    frame: av.VideoFrame
    sar: float
    crop: Crop = WHOLE  # what the container hides of the frame
    spoilt: str = ""
    lost: bool = False
    group: int = 0
    ruined: dict[int, str] = field(default_factory=dict)


class Video:
    """An open file: `container`, the film's `stream`, and the `decoder` of one thread that reads it.

    for_a_look: FFmpeg decodes pictures when it opens a file, to learn what the index of an mp4 has said already; not then.
    """

    def __init__(self, path: Path, for_a_look: bool = False):
        # "file:" keeps a:b.mp4 from being a URL; a name that is not UTF-8 can only be opened by Python
        name = os.path.abspath(path)
        try:
            name.encode()
            source, self._file = "file:" + name, None
        except UnicodeEncodeError:
            source = self._file = open(name, "rb")
        options = {"max_pixels": str(MAX_PIXELS), **({"skip_frame": "all"} if for_a_look else {})}
        self.container = av.open(source, options=options, metadata_errors="replace")
        try:
            self.stream = _film(self.container)
            self.decoder = _decoder(self.stream)
        except BaseException:
            self.close()
            raise
        average, guessed = self.stream.average_rate, self.stream.guessed_rate  # the second asks the codec as well
        self.rate = float((guessed or average if self.container.format.flags & NO_STAMPS else average or guessed) or 25)
        self.joined = self.container.format.name in JOINED
        self.decoded_order = self.container.format.name == "avi"  # holds no time of display: FFmpeg makes up a pts, wrong by a picture or two
        self.spliced = self.joint = False
        self._first_sar = self.decoder.sample_aspect_ratio
        self.crop = hidden(Path(name), self.container.format.name, self.stream.index)

    def close(self) -> None:
        self.container.close()
        if self._file:
            self._file.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def sar(self) -> float:
        """Width of a stored pixel over its height: the container's word, until the stream changes its own."""
        now, stated = self.decoder.sample_aspect_ratio, self.stream.sample_aspect_ratio
        ratio = now if now and self._first_sar and now != self._first_sar else stated or now
        return float(ratio) if ratio and ratio > 0 else 1.0

    def packets(self) -> Iterator[av.Packet]:
        """Packets of the film that hold something; stamps of joined recordings go on where the one before ended."""
        offset, due = 0, None
        if not self.joined:
            yield from (packet for packet in self.container.demux(self.stream) if packet.size)
            return
        for packet in self.container.demux(self.stream):
            stamp = packet.pts if packet.dts is None else packet.dts
            if packet.size and stamp is not None:
                self.joint = due is not None and abs(stamp + offset - due) * packet.time_base > JUMP
                if self.joint:  # a new recording also counts its packets anew, which looks like a loss
                    offset, self.spliced = due - stamp, True
                due = stamp + offset + (packet.duration or int(1 / self.rate / packet.time_base))
                if offset:
                    packet.pts = None if packet.pts is None else packet.pts + offset
                    packet.dts = None if packet.dts is None else packet.dts + offset
            if packet.size:
                yield packet


def _film(container) -> av.VideoStream:
    """The stream a player shows: no cover art, no thumbnails; the default one, then the largest."""
    streams = [stream for stream in container.streams.video if not stream.disposition.value & PICTURES]
    if not streams:
        raise Unusable(f"corrupt: it has {'only cover art' if container.streams.video else 'no video stream'}")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise Unusable("no decoder: this build of FFmpeg does not know its codec; convert it, e.g. to H.264")
    best = max(known, key=lambda s: (bool(s.disposition & av.stream.Disposition.default), s.width * s.height, -s.index))
    if best.width * best.height > MAX_PIXELS:
        raise Unusable(f"too large: {best.width} x {best.height}, {MAX_PIXELS} pixels are accepted; scale it down")
    return best


def _decoder(stream):
    """The stream's decoder. FFmpeg's own decoders of VP8 and VP9 pass over alpha, libvpx does not."""
    context = stream.codec_context
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(context.name)
    if name and stream.metadata.get("alpha_mode") == "1" and name in av.codec.codecs_available:
        context = av.codec.CodecContext.create(name, "r")
        context.extradata = stream.codec_context.extradata
    if context.name == "rawvideo" and context.pix_fmt == "bgra" and stream.container.format.name == "avi":
        context.pix_fmt = "bgr0"  # Windows bitmaps of 32 bits do not use the fourth byte, which is 0 as a rule
    context.thread_count = 1  # --workers sets the number of busy cores
    context.options = {**context.options, "max_pixels": str(MAX_PIXELS)}
    return context


# ---- frames in the order of display ----------------------------------------------------------------------------------


def moments(path: Path, start: float, since: float = 0.0, sequential: bool = False) -> Iterator[Moment]:
    """Frames in the order of display, the first of them at or before `since` seconds after `start`.

    The frames from `since` on do not depend on `since`: where seeking lands behind it, in the middle of damage or
    nowhere (streams without random access), decoding begins further ahead, at last with the file. `sequential` never
    seeks.
    """
    for back in () if sequential or since <= 0 else (0.5, 15.0):
        with Video(path) as video:
            try:
                target = int((start + since - back) / video.stream.time_base)
                video.container.seek(target, stream=video.stream)
            except av.FFmpegError:
                break
            found = _ordered(video, start)
            # two frames: what a deinterlacer makes of one depends on the one before
            head = [moment for _, moment in zip(range(2), found)]
            if len(head) == 2 and head[1].time <= since + TOLERANCE and not any(moment.spoilt for moment in head):
                yield from head
                yield from found
                return
    with Video(path) as video:
        yield from _ordered(video, start)


def _ordered(video: Video, start: float) -> Iterator[Moment]:
    """Moments from where an open file stands. A stamp that the next frame contradicts is not believed."""
    held = None
    for moment in _decoded(video, start):
        if held is not None and moment.time > held.time:
            yield held
        elif held is not None and moment.time > held.time - JUMP:
            continue  # late by a little: the frame on screen stays
        held = moment  # after one that is late by much: the one before was far ahead, and goes
    if held is not None:
        yield held


def _decoded(video: Video, start: float) -> Iterator[Moment]:
    base, step = video.stream.time_base, 1 / video.rate
    stamps, trust, last = Stamps(round(step / base), video.decoded_order), Trust(video), None
    for packet in _and_none(video.packets()):
        for frame in trust.decode(packet):
            stamp = stamps.best(frame)
            if not trust.begins(stamp):
                continue
            spoilt, group, missing = trust.judge(frame)
            duration = float((frame.duration or 0) * base) or step
            moment = Moment(float(stamp * base) - start, duration, frame, video.sar, video.crop, spoilt, False, group, trust.ruined)
            if last is not None:
                gap = moment.time - last.time > 1.75 * step
                yield replace(last, lost=gap and (missing > trust.tolerated or bool(spoilt and not last.spoilt)))
            last = moment
    if last is not None:
        yield last


def _and_none(packets: Iterator[av.Packet]) -> Iterator[av.Packet | None]:
    yield from packets
    yield None  # asks the decoder for the frames it still holds


class Stamps:
    """A frame's best time stamp, as libavcodec guesses it (PyAV hands out the two it guesses from).

    decoded_order: only the second of the two, the dts, was in the file.
    """

    def __init__(self, step: int, decoded_order: bool = False):
        self.step, self.decoded_order, self.last, self.faulty = step, decoded_order, None, [0, 0]
        self.before = [-(1 << 63), -(1 << 63)]  # pts, dts

    def best(self, frame: av.VideoFrame) -> int:
        pts, dts = frame.pts, frame.dts
        if self.decoded_order:  # the last pictures, which come out when all packets are in, have neither
            pts = None
        for i, (own, other) in enumerate(((pts, dts), (dts, pts))):
            if own is not None:
                self.faulty[i] += own <= self.before[i]
                self.before[i] = own
            elif other is not None:
                self.before[i] = other
        best = pts if pts is not None and (self.faulty[0] <= self.faulty[1] or dts is None) else dts
        if best is None:
            best = 0 if self.last is None else self.last + self.step
        self.last = best
        return best


class Trust:
    """Which pictures a damaged stream has spoilt: all that were decoded between a complaint and the next key picture.

    FFmpeg hands out what it could make of damaged data; what it says is the log, and flags on packets and frames.
    listening: to the log, which is FFmpeg's own and of all threads: where several read files, each would print what the others cause.
    """

    def __init__(self, video: Video, listening: bool = True):
        self.listening = listening
        self.video, self.decoder, self.codec = video, video.decoder, video.stream.codec_context.name
        self.first_key: int | None = None
        self.unstamped_key = False  # a key picture of a stream without stamps has come
        self.started, self.keys_are_clean = False, True
        self.spoilt, self.leading, self.leading_end = "", "", -(1 << 63)
        self.verdicts: dict[int, tuple[str, int]] = {}
        self.group, self.ruined = 0, {}
        self.keys: set[int] = set()
        self.expected: list[int] = []  # stamps of packets whose picture has not come out, sorted
        # one packet without a picture: VP8's hidden ones, a second field of its own
        self.tolerated = 1 if self.codec in HIDDEN or video.decoder.field_order > 1 else 0

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        stamp = None
        if packet is not None:
            stamp = packet.dts if packet.pts is None else packet.pts
            if packet.is_keyframe and self.keys_are_clean:
                self.leading, self.leading_end = self.spoilt, stamp or 0
                self.spoilt, self.group = "", self.group + 1
                self.unstamped_key |= stamp is None
                if self.first_key is None and stamp is not None:
                    self.first_key = packet.dts if self.video.decoded_order else stamp
            if packet.is_corrupt and not self.video.joint:
                self.spoilt = "lost or damaged packets"
            if packet.is_keyframe and stamp is not None:
                self.keys.add(stamp)
            if packet.pts is not None and not packet.is_discard and not (self.codec == "mpeg4" and packet.size <= NOT_CODED):
                insort(self.expected, packet.pts)
        frames, complaint = self._decode(packet)
        if complaint and (self.started or self.first_key is not None):
            self.spoilt = self.ruined[self.group] = complaint
        if stamp is not None:  # leading pictures need the group before as well
            leading = stamp < self.leading_end
            self.verdicts[stamp] = self.spoilt or (self.leading if leading else ""), self.group - leading
        return frames

    def _decode(self, packet) -> tuple[list[av.VideoFrame], str]:
        complaint = ""
        if not self.listening:
            try:
                return self.decoder.decode(packet), ""
            except av.FFmpegError:
                return [], ""
        av.logging.set_skip_repeated(False)
        av.logging.set_level(av.logging.INFO)
        try:
            with av.logging.Capture() as log:
                frames = self.decoder.decode(packet)
        except av.error.EOFError:
            frames = []
        except av.FFmpegError as error:
            frames, complaint = [], _first_line(error)
        finally:
            av.logging.set_level(None)
        # a slice that ends too early is no error to FFmpeg: it says how much it has concealed, for information
        said = [text.strip() for level, _, text in log if level <= av.logging.ERROR or text.startswith("concealing")]
        return frames, complaint or (said[0] if said else "")

    def begins(self, stamp: int) -> bool:
        """Whether frames are shown yet: a stream cut within a group of pictures begins with ruins."""
        if not self.started:
            # H.264's decoder itself waits for the end of an intra refresh, which has no key picture
            self.started = self.codec == "h264" or self.unstamped_key if self.first_key is None else stamp >= self.first_key
        return self.started

    def judge(self, frame: av.VideoFrame) -> tuple[str, int, int]:
        """(why the picture is spoilt or "", its group, how many pictures should have come out before it and did not)."""
        if frame.pts is None:
            return self.spoilt or ("damaged frame" if frame.is_corrupt else ""), self.group, 0
        missing = 0
        while self.expected and self.expected[0] < frame.pts:
            self.verdicts.pop(self.expected.pop(0), None)
            missing += 1
        if self.expected and self.expected[0] == frame.pts:
            self.expected.pop(0)
        if frame.pts in self.keys:
            self.keys.discard(frame.pts)
            # an intra refresh marks where it begins, not where pictures are whole again
            self.keys_are_clean &= frame.pict_type in (0, 1, 5, 7) or self.codec not in ("h264", "hevc")
        verdict, group = self.verdicts.pop(frame.pts, (self.spoilt, self.group))
        if frame.is_corrupt and not verdict:
            verdict = self.spoilt = self.ruined[group] = "damaged frame"
        return verdict, group, missing
