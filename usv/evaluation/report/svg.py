"""SVG drawn by hand: axes, marks, polylines and labels as text. Colours are classes of the page's stylesheet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 44, 56  # of the frame around the plot
FONT = 15


def tag(name: str, content: str = "", **attributes) -> str:
    """One element; a trailing underscore of an attribute is dropped, inner ones become dashes, None leaves it out."""
    words = (f'{k.rstrip("_").replace("_", "-")}="{escape(_plain(v))}"' for k, v in attributes.items() if v is not None)
    opening = " ".join([name, *words])
    return f"<{opening}>{content}</{name}>" if content else f"<{opening}/>"


def _plain(value) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def figure(title: str, description: str, body: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """An <svg> with an accessible name and description."""
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f'<svg role="img" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">{words}{body}</svg>'


@dataclass(frozen=True)
class Axis:
    """Values [low, high] on pixels [start, end]; the value axis of a picture runs from its bottom to its top. flipped: low at
    the end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    flipped: bool = False

    @classmethod
    def around(cls, values: list[float], start: float, end: float, log=False, flipped=False, pad: float = 0.06) -> Axis:
        """The axis that holds all values, with room on both sides."""
        low, high = min(values), max(values)
        if log:
            low, high = max(low, 1e-9), max(high, 1e-9)
            margin = max((high / low) ** pad, 1.1)
            return cls(low / margin, high * margin, start, end, True, flipped)
        room = (high - low) * pad or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end, False, flipped)

    def at(self, value: float) -> float:
        """The pixel of a value, kept inside the axis."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return self.start + (1 - share if self.flipped else share) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the axis: 1, 2, 5 × 10^n."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            digits = (1, 2, 5) if self.high > 12 * self.low else (1, 1.5, 2, 3, 4, 5, 6, 8)
            candidates = [m * 10.0**n for n in range(first, last + 1) for m in digits]
            found = [v for v in candidates if self.low <= v <= self.high]
            return found if len(found) <= 9 else [v for v in found if math.isclose(10 ** round(math.log10(v)), v)]
        rough = (self.high - self.low) / wanted
        base = 10.0 ** math.floor(math.log10(rough))
        step = next(m * base for m in (1, 2, 5, 10) if m * base >= rough)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9) + 1
        return [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count)]


def number(value: float) -> str:
    """A short number for a tick: 0.05, 1.5, 2000."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Grid lines, tick labels and axis titles."""
    parts = []
    for value in x.ticks():
        at = x.at(value)
        parts.append(tag("line", x1=at, x2=at, y1=y.end, y2=y.start, class_="grid"))
        parts.append(tag("text", number(value), x=at, y=y.start + 20, class_="tick", text_anchor="middle"))
    for value in y.ticks():
        at = y.at(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", number(value), x=x.start - 8, y=at + 5, class_="tick", text_anchor="end"))
    parts.append(tag("text", escape(x_label), x=(x.start + x.end) / 2, y=y.start + 46, class_="axis", text_anchor="middle"))
    parts.append(tag("text", escape(y_label), x=8, y=y.end - 22, class_="axis name"))  # turned text would cross tick labels on a phone
    return "".join(parts)


def line(points: list[tuple[float, float]], **attributes) -> str:
    """A polyline through pixels; nothing for fewer than two."""
    if len(points) < 2:
        return ""
    return tag("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in points), fill="none", **attributes)


def mark(shape: str, x: float, y: float, size: float = 6.5, **attributes) -> str:
    """A mark that tells families apart without colour; shapes: see SHAPES."""
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=size, **attributes)
    corners = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in SHAPES[shape])
    return tag("polygon", points=corners, **attributes)


def _star() -> list[tuple[float, float]]:
    radii = (1.5, 0.65) * 5
    return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]


SHAPES = {
    "circle": [],
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    "up": [(0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
    "down": [(0, 1.2), (1.15, -0.85), (-1.15, -0.85)],
    "cross": [(-1.1, -0.4), (-0.4, -0.4), (-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4), (0.4, 1.1),
              (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4)],
    "star": _star(),
}  # fmt: skip


class Labels:
    """Places texts beside points so that none covers another or a mark; what finds no room stays away."""

    def __init__(self, x: Axis, y: Axis):
        self.bounds = (x.start, y.end, x.end, y.start)
        self.taken: list[tuple[float, float, float, float]] = []

    def avoid(self, x: float, y: float, size: float = 8) -> None:
        self.taken.append((x - size, y - size, x + size, y + size))

    def place(self, text: str, x: float, y: float, **attributes) -> str:
        width, height = 0.6 * FONT * len(text), FONT
        for dx, dy in ((11, -7), (11, 14), (-11 - width, -7), (-11 - width, 14), (-width / 2, -13), (-width / 2, 24), (16, 4), (-16 - width, 4)):
            box = (x + dx, y + dy - height + 3, x + dx + width, y + dy + 3)
            inside = box[0] >= self.bounds[0] and box[1] >= self.bounds[1] and box[2] <= self.bounds[2] and box[3] <= self.bounds[3]
            if inside and not any(box[0] < c and a < box[2] and box[1] < d and b < box[3] for a, b, c, d in self.taken):
                self.taken.append(box)
                return tag("text", escape(text), x=x + dx, y=y + dy, **attributes)
        return ""
