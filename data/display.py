"""A decoded frame as a player shows it: upright, in square pixels, sRGB-like, opaque, progressive, at the clip's size.

    stored frame → deinterlace → crop to the shape of the clip → scale → R'G'B' → (HDR: to SDR) (alpha: onto white) → turn

Cropping and scaling run on stored 8- to 16-bit pictures in FFmpeg's filter graph, before anything becomes float: at 4K
that is 6 ms a frame on one core, where converting and scaling the whole picture took 130.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import av
import numpy as np
import torch
from cropping import WHOLE, Crop
from decoding import Unusable

# AVCOL_SPC_…: what the `scale` filter calls a matrix, and its Kr, Kb
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
CONSTANTS = {"bt709": (0.2126, 0.0722), "fcc": (0.30, 0.11), "bt601": (0.299, 0.114), "smpte240m": (0.212, 0.087),
             "bt2020": (0.2627, 0.0593)}  # fmt: skip
YCGCO, ICTCP = 8, 14
PQ, HLG = 16, 18  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
WHITE = 203.0  # cd/m² of reference white (ITU-R BT.2408): 255 in the clip; brighter highlights are clipped
PRIMARIES = {  # AVCOL_PRI_…: x, y of red, green, blue, white
    1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),
}
EXACT = "accurate_rnd+full_chroma_int+full_chroma_inp"
SCALE = f"bilinear+{EXACT}"  # as torch's antialiased bilinear
CONVERT = f"neighbor+{EXACT}"  # chroma as ffmpeg shows it where nobody asks for more: repeated
REPEATED = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gray")  # formats of which that is true, where the height is even
COARSE = ("rgb555", "bgr555", "rgb565", "bgr565", "rgb444", "bgr444", "rgb8", "bgr8", "rgb4", "bgr4")  # of which FFmpeg makes G, B, R without filling the low bits: white 248
HALVED = ("420", "422", "411", "410", "nv12", "p010")
BESIDE = ":in_chroma_loc=left"  # where every codec since MPEG-2 puts chroma unless it says otherwise, and JPEG does not; FFmpeg's scaler takes it for between two columns
FINE = 2.0  # pictures scaled down by less are made R'G'B' first; beyond, chroma has detail enough (10 ms at 1080p against 3)


@dataclass(frozen=True)
class Look:
    """All that decides how a stored frame is shown; frames of one look share a filter graph."""

    width: int
    height: int
    format: str
    sar: float
    turn_matrix: tuple[int, ...] | None  # the display matrix, 9 numbers of 16.16 fixed point
    matrix: int
    transfer: int
    primaries: int
    full_range: bool
    deep: bool  # more than 8 bits
    guessed: bool  # the matrix is a guess: nothing states it
    crop: Crop = WHOLE  # hidden of the stored frame, which is so much larger than width and height

    @property
    def turned_first(self) -> bool:
        """Turned before it is scaled and not after, where its width is to change."""
        return self.sar != 1 and turn(self.turn_matrix).transpose

    @property
    def hdr(self) -> str:
        """'PQ', 'HLG' or ''."""
        return {PQ: "PQ", HLG: "HLG"}.get(self.transfer, "")


def look(frame: av.VideoFrame, sar: float, turning: tuple[int, ...] | None | str = "unread", crop: Crop = WHOLE) -> Look:
    """The look of a frame whose pixels are `sar` times as wide as high; `turning`: its display matrix, if known; crop: what the container hides."""
    name = frame.format.name
    turning = display_matrix(frame) if isinstance(turning, str) else turning
    matrix, rgb = frame.colorspace, _is_rgb(frame)
    guessed = not rgb and matrix in (2, 3) or (matrix == 0 and not rgb)
    if guessed:  # the players' rule
        if frame.color_trc in (PQ, HLG) or frame.color_primaries == 9:
            matrix = 9
        else:
            matrix = 1 if frame.height >= 720 or frame.width >= 1280 else 6
    if matrix == ICTCP or (not rgb and matrix not in MATRICES and matrix != YCGCO):
        raise Unusable(f"colour: pictures stored with matrix number {matrix} of ITU-T H.273 are not read; convert them")
    full = frame.color_range == 2 or name.startswith(("yuvj", "gray", "ya"))
    left, right = _on_chroma(crop[0], crop[2], frame.width, frame.format.chroma_width)
    top, bottom = _on_chroma(crop[1], crop[3], frame.height, frame.format.chroma_height)
    crop = left, top, right, bottom
    return Look(frame.width - left - right, frame.height - top - bottom, name, sar, turning, 0 if rgb else matrix, frame.color_trc,
                frame.color_primaries, full, frame.format.components[0].bits > 8, bool(guessed) and "gray" not in name and "mono" not in name, crop)  # fmt: skip


def _on_chroma(before: int, after: int, length: int, chroma) -> tuple[int, int]:
    """What is hidden on two sides, so that whole samples of chroma stay, as ffmpeg does it; nothing of a frame that is too small."""
    shown, step = length - before - after, next((n for n in (4, 2) if chroma(n) == 1), 1)
    if shown < step:
        return 0, 0
    before, shown = (before, shown) if shown == length else (before - before % step, shown - shown % step)
    return before, length - before - shown


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The 9 numbers by which a frame is turned; Unusable for what cannot be shown without Dolby Vision's own data.

    PyAV's side data and the frame hold each other: each frame that is asked lives until Python's collector comes by,
    12 MB at 4K. One a video is asked.
    """
    turning = None
    for data in frame.side_data.keys():
        kind = getattr(getattr(data, "type", data), "name", "")
        if kind == "DISPLAYMATRIX":
            turning = tuple(int(value) for value in np.frombuffer(bytes(data), np.int32)[:9])
        if kind.startswith("DOVI") and frame.colorspace in (2, ICTCP) and frame.color_trc not in (PQ, HLG):
            raise Unusable("HDR: Dolby Vision without a base layer that others can show; convert it to HDR10 or SDR")
    return turning


def _is_rgb(frame: av.VideoFrame) -> bool:
    return frame.format.is_rgb or frame.format.has_palette


def has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


@dataclass(frozen=True)
class Turn:
    """How a stored picture is turned upright: transposed, then mirrored; `angle`: degrees clockwise that are neither."""

    transpose: bool = False
    hflip: bool = False
    vflip: bool = False
    angle: float = 0.0


def turn(matrix: tuple[int, ...] | None) -> Turn:
    """The turn that a display matrix asks for, as ffmpeg reads it."""
    if matrix is None:
        return Turn()
    a, b, c, d = (matrix[i] / 65536 for i in (0, 1, 3, 4))
    scale = math.hypot(a, c), math.hypot(b, d)
    if not all(scale):
        return Turn()
    angle = math.degrees(math.atan2(b / scale[1], a / scale[0])) % 360
    if abs(angle - 90) < 1:
        return Turn(True, hflip=c <= 0)
    if abs(angle - 180) < 1:
        return Turn(hflip=a < 0, vflip=d < 0)
    if abs(angle - 270) < 1:
        return Turn(True, hflip=c < 0, vflip=True)
    if 1 < angle < 359:
        return Turn(angle=angle)
    return Turn(vflip=d < 0)


def shown_size(look: Look) -> tuple[int, int]:
    """(height, width) of the whole picture as displayed, in square pixels."""
    height, width, sar = look.height, look.width, look.sar
    if turn(look.turn_matrix).transpose:
        height, width, sar = width, height, 1 / sar
    return height, max(1, round(width * sar))


def cover(shown: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part in the middle of a `shown` picture (H, W) that has the shape of `size`."""
    scale = max(size[0] / shown[0], size[1] / shown[1])
    height, width = (min(own, max(1, round(want / scale))) for own, want in zip(shown, size))
    return (shown[0] - height) // 2, (shown[1] - width) // 2, height, width


class Display:
    """Frames of one video as pictures (3, H, W) uint8 of `size` (H, W): scaled to cover it and cropped in the middle."""

    def __init__(self, size: tuple[int, int]):
        self.size, self.graphs = size, {}
        self.rotation, self.turning = None, None

    def picture(self, frame: av.VideoFrame, sar: float, crop: Crop = WHOLE) -> torch.Tensor:
        if frame.rotation != self.rotation:
            self.rotation, self.turning = frame.rotation, display_matrix(frame)
        seen = look(frame, sar, self.turning, crop)
        alpha = has_alpha(frame)
        if seen not in self.graphs:
            self.graphs.clear()  # a stream that changes its size does not change back every frame
            self.graphs[seen] = _graph(seen, self.size, alpha, frame.time_base)
        graph = self.graphs[seen]
        graph.push(frame)
        shown = graph.pull()
        if seen.hdr or seen.matrix == YCGCO:
            pixels = _in_numbers(shown, seen)
        else:
            pixels = _planes(shown, np.uint8, (2, 0, 1))  # stored as G, B, R
            if alpha:
                [clear] = 255 - _planes(shown, np.uint8, (3,))
                pixels = np.minimum(pixels.astype(np.uint16) + clear, 255).astype(np.uint8)
        way = Turn() if seen.turned_first else turn(seen.turn_matrix)
        picture = torch.from_numpy(pixels)
        picture = picture.transpose(1, 2) if way.transpose else picture
        mirrored = [axis for axis, flip in ((1, way.vflip), (2, way.hflip)) if flip]
        return (picture.flip(mirrored) if mirrored else picture).contiguous()


def _graph(look: Look, size: tuple[int, int], alpha: bool, time_base) -> av.filter.Graph:
    way = turn(look.turn_matrix)
    left, top, right, bottom = look.crop
    chain = [f"buffer=video_size={look.width + left + right}x{look.height + top + bottom}:pix_fmt={look.format}:time_base={time_base or '1/1000'}"]
    if look.crop != WHOLE:
        chain.append(f"crop={look.width}:{look.height}:{left}:{top}:exact=1")
    if look.format.startswith(COARSE):
        chain.append("format=rgb24")
    if way.angle:
        chain.append(f"rotate={math.radians(way.angle)}")
    if look.turned_first:
        chain += ["transpose=cclock_flip", *(["hflip"] if way.hflip else []), *(["vflip"] if way.vflip else [])]
        look, way = replace(look, width=look.height, height=look.width, sar=1 / look.sar, turn_matrix=None), Turn()
    whole = shown_size(look)
    top, left, h, w = cover(whole, size)
    top, left = whole[0] - h - top if way.vflip else top, whole[1] - w - left if way.hflip else left
    height, width = size
    if way.transpose:
        top, left, h, w, height, width = left, top, w, h, width, height
    matrix = MATRICES.get(look.matrix, "auto")
    square = max(1, round(look.width * look.sar))
    crop = [f"crop={w}:{h}:{left}:{top}:exact=1"] if (h, w) != (look.height, square) else []
    resize = f"scale=w={width}:h={height}:flags={SCALE}"
    if look.hdr or look.matrix == YCGCO:
        levels = "pc" if look.full_range else "tv"
        same = matrix if look.matrix in MATRICES else "bt709"  # the same on both sides: no matrix is applied
        keep = f"in_color_matrix={same}:out_color_matrix={same}:in_range={levels}:out_range={levels}"
        wide = "gbrp16le" if look.matrix == 0 else "yuv444p16le"
        squared = [f"scale=w={square}:h=ih:flags=bicubic:{keep}"] if square != look.width else []
        return _link([*chain, *squared, *crop, f"{resize}:{keep}", f"format={wide}"])
    colours = f"in_color_matrix={matrix}:out_range=pc"
    if alpha:  # transparent pixels have colours too, which scaling would spread: weighted before
        convert = [f"scale=w={square}:h=ih:flags={CONVERT}:{colours}", "format=gbrap", "premultiply=inplace=1"]
        return _link([*chain, *convert, *crop, resize, "format=gbrap"])
    if h >= FINE * height:
        squared = [f"scale=w={square}:h=ih:flags=bicubic"] if square != look.width else []
        place = "" if look.matrix == 0 or look.format.startswith("yuvj") or not any(kind in look.format for kind in HALVED) else BESIDE
        return _link([*chain, *squared, *crop, f"{resize}:{colours}{place}", "format=gbrp"])
    convert = [f"scale=flags={CONVERT}:{colours}", "format=gbrp"]
    rows = look.width if way.transpose else look.height  # as ffmpeg has it, which turns a picture before
    repeated = look.format in REPEATED and ("444" in look.format or look.format == "gray" or not rows % 2)
    if look.matrix and (square != look.width or not repeated):
        keep = f"in_color_matrix={matrix}:out_color_matrix={matrix}"
        depth = "16le" if look.deep else ""
        chain += [f"scale=w={square}:h=ih:flags=bicubic:{keep}", f"format=yuv{_chroma(look, square)}p{depth}"]
    return _link([*chain, *convert, *crop, resize, "format=gbrp"])


def _chroma(look: Look, width: int) -> str:
    """With how much chroma ffmpeg scales a picture that it shows as R'G'B'."""
    return "444" if "444" in look.format or "gray" in look.format or width % 2 else "422"


def _link(chain: list[str]) -> av.filter.Graph:
    graph = av.filter.Graph()
    nodes = []
    for step in [*chain, "buffersink"]:
        name, _, options = step.partition("=")
        nodes.append(graph.add(name, options or None))
    graph.link_nodes(*nodes)
    graph.configure()
    return graph


def _planes(frame: av.VideoFrame, dtype, order: tuple[int, ...]) -> np.ndarray:
    """(planes, H, W) of a planar frame whose planes are all of its size."""
    planes = [frame.planes[i] for i in order]
    return np.stack([np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width] for plane in planes])


# ---- colour in numbers: HDR, and what FFmpeg's scaler has no matrix for ----------------------------------------------


def _in_numbers(frame: av.VideoFrame, look: Look) -> np.ndarray:
    """(3, H, W) uint8 from 16-bit planes."""
    planes = _planes(frame, np.uint16, (2, 0, 1) if look.matrix == 0 else (0, 1, 2)).astype(np.float32)
    if look.matrix == 0:
        rgb = planes / 65535
    else:
        low, luma, chroma = (0, 65535, 65535) if look.full_range else (16 << 8, 219 << 8, 224 << 8)
        y, cb, cr = (planes[0] - low) / luma, (planes[1] - 32768) / chroma, (planes[2] - 32768) / chroma
        if look.matrix == YCGCO:
            rgb = np.stack([y - cb + cr, y + cb, y - cb - cr])  # Cg is stored second, Co third
        else:
            kr, kb = CONSTANTS[MATRICES[look.matrix]]
            r, b = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
            rgb = np.stack([r, (y - kr * r - kb * b) / (1 - kr - kb), b])
    rgb = rgb.clip(0, 1)
    if look.hdr:
        light = _eotf(look.transfer)[(rgb * 65535 + 0.5).astype(np.uint16)]
        light = np.tensordot(_to_bt709(look.primaries), light, 1)
        rgb = light.clip(0, 1) ** np.float32(1 / 2.4)  # BT.1886, as an SDR display undoes it
    return (rgb * 255 + 0.5).astype(np.uint8)


@lru_cache
def _eotf(transfer: int) -> np.ndarray:
    """(65536,) light of a signal, reference white = 1 (ITU-R BT.2100).

    HLG for a display of 1000 cd/m². Its system gamma of 1.2 is applied to each channel, as zimg and so ffmpeg do, and
    not to luminance: saturated colours come out up to 70 levels stronger than BT.2100's, and equal to ffmpeg's.
    """
    x = np.linspace(0, 1, 65536)
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = x ** (1 / m2)
        light = 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = 1000 * np.where(x <= 0.5, x * x / 3, (np.exp((x - c) / a) + b) / 12) ** 1.2
    return (light / WHITE).astype(np.float32)


@lru_cache
def _to_bt709(primaries: int) -> np.ndarray:
    """(3, 3) linear R'G'B' of other primaries -> of BT.709 (untagged HDR is BT.2020)."""

    def to_xyz(numbers):
        xy = np.array(numbers).reshape(4, 2)
        xyz = np.stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(1)) / xy[:, 1]])
        return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])

    own = PRIMARIES.get(primaries, PRIMARIES[9])
    return (np.linalg.inv(to_xyz(PRIMARIES[1])) @ to_xyz(own)).astype(np.float32)


# ---- interlaced ------------------------------------------------------------------------------------------------------


class Deinterlacer:
    """Frames in, frames out, one for one and in order: interlaced ones woven anew from their fields (bwdif).

    A frame is handed out when the next one is in, as its fields are compared with its neighbours'; until the first
    interlaced one everything passes straight through.
    """

    def __init__(self):
        self.key, self.graph, self.waiting = None, None, deque()

    def push(self, item, frame: av.VideoFrame) -> Iterator[tuple[object, av.VideoFrame]]:
        """(item, frame) pairs that are done, `item` being whatever came in with the frame."""
        key = frame.width, frame.height, frame.format.name
        if self.graph is not None and key != self.key:
            yield from self.flush()
        if self.graph is None:
            if not frame.interlaced_frame:
                yield item, frame
                return
            size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
            self.graph = _link([f"buffer={size}:time_base={frame.time_base or '1/1000'}", "bwdif=send_frame:auto:interlaced"])
            self.key = key
        self.waiting.append((item, frame))
        self.graph.push(frame)
        yield from self._pull()

    def flush(self) -> Iterator[tuple[object, av.VideoFrame]]:
        if self.graph is not None:
            self.graph.push(None)
            yield from self._pull()
            yield from self.waiting
        self.graph, self.waiting = None, deque()

    def _pull(self):
        while self.waiting:
            try:
                woven = self.graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            item, frame = self.waiting.popleft()
            yield item, woven if frame.interlaced_frame else frame
