"""The pictures of the report: Pareto plots, plan heatmaps, training curves, kernel speed."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from usv.evaluation.report.front import Point, front
from usv.evaluation.report.svg import (
    BOTTOM,
    FONT,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Labels,
    figure,
    frame,
    line,
    mark,
    number,
    tag,
)
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, SparsityPlan, bin_of

MARKS = {
    "dense": "square", "fewer steps": "diamond", "cache": "up", "merging": "down", "pattern": "cross", "fixed density": "circle",
    "ours": "star",
}  # fmt: skip
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LEGEND_ROW = 24
SERIES = 6  # colours of curves in the stylesheet


def css(family: str) -> str:
    """The class of a family."""
    return "f-" + family.replace(" ", "-")


def legend_mark(family: str) -> str:
    """A family's mark, for the legend."""
    shape = mark(MARKS.get(family, "circle"), 9, 9, 5.5, class_=css(family))
    return f'<svg aria-hidden="true" width="18" height="18" viewBox="0 0 18 18">{shape}</svg>'


def pareto(points: list[Point], name: str, more: bool, legend: bool = False) -> str:
    """Quality against measured seconds on a log axis, up and left is better, with intervals and both fronts; legend: below, for a
    picture that stands alone."""
    x = Axis.around([p.seconds for p in points], LEFT, WIDTH - RIGHT, log=True)
    ends = [v for p in points for v in (p.value, p.low, p.high) if v is not None]
    y = Axis.around(ends, HEIGHT - BOTTOM, TOP, flipped=not more)
    parts = [frame(x, y, "seconds a clip, denoising", name if more else f"{name} (less is better, flipped)")]
    for chosen, kind in ((lambda p: p.family != "ours", "theirs"), (lambda p: p.family == "ours", "ours")):
        steps = _staircase(front([p for p in points if chosen(p)], more), x, y)
        parts.append(line(steps, class_=f"front {kind}"))
    labels = Labels(x, y)
    for p in points:
        labels.avoid(x.at(p.seconds), y.at(p.value))
    drawn = sorted(points, key=lambda p: p.family in ("dense", "ours"))  # the last ones lie on top
    parts += [_point(p, x, y, name) for p in drawn]
    for p in reversed(drawn):
        words = p.name if p.family in ("dense", "ours") else str(p.number)
        place = lambda words, p=p: labels.place(words, x.at(p.seconds), y.at(p.value), class_=f"label {css(p.family)}")  # noqa: E731
        parts.append(place(words) or place(str(p.number)))
    text = "; ".join(f"{p.name}: {number(p.value)} at {p.seconds:.2f} s" for p in points)
    rows = _legend(dict.fromkeys(p.family for p in points)) if legend else []
    return figure(f"{name} against seconds a clip", text, "".join(parts + rows), height=HEIGHT + LEGEND_ROW * len(rows))


def _legend(families: Iterable[str]) -> list[str]:
    """Rows under a picture: marks of the families in it, and of both fronts."""
    sample = lambda kind: lambda x, y: line([(x - 8, y), (x + 8, y)], class_=f"front {kind}")  # noqa: E731
    entries = [(f, lambda x, y, f=f: mark(MARKS[f], x, y, 5.5, class_=css(f))) for f in MARKS if f in families]
    entries += [("front of ours", sample("ours"))] if "ours" in families else []
    entries += [("front of all others", sample("theirs"))] if {*families} - {"ours"} else []
    rows, x = [""], LEFT
    for words, draw in entries:
        width = 30 + 0.56 * FONT * len(words)
        if x + width > WIDTH - RIGHT:
            rows, x = [*rows, ""], LEFT
        y = HEIGHT + LEGEND_ROW * (len(rows) - 0.5)
        rows[-1] += draw(x, y) + tag("text", escape(words), x=x + 14, y=y + 5, class_="tick")
        x += width
    return rows


def _staircase(points: list[Point], x: Axis, y: Axis) -> list[tuple[float, float]]:
    """Pixels of a front: at any time the best that is reached by then."""
    path: list[tuple[float, float]] = []
    for p in points:
        at = (x.at(p.seconds), y.at(p.value))
        path += [(at[0], path[-1][1]), at] if path else [at]
    return path + ([(x.end, path[-1][1])] if path else [])


def _point(p: Point, x: Axis, y: Axis, name: str) -> str:
    """A mark with its intervals; its title is what a pointer shows."""
    at, parts = (x.at(p.seconds), y.at(p.value)), []
    interval = ""
    if p.low is not None and p.high is not None:
        parts.append(tag("line", x1=at[0], x2=at[0], y1=y.at(p.low), y2=y.at(p.high), class_="interval"))
        interval = f" ({number(p.low)}–{number(p.high)})"
    if p.fast is not None and p.slow is not None:
        parts.append(tag("line", x1=x.at(p.fast), x2=x.at(p.slow), y1=at[1], y2=at[1], class_="interval"))
    parts.append(mark(MARKS.get(p.family, "circle"), *at))
    title = tag("title", escape(f"{p.number}. {p.name}: {name} {number(p.value)}{interval}, {p.seconds:.3f} s a clip"))
    return tag("g", title + "".join(parts), class_=f"point {css(p.family)}")


def heatmap(plan: SparsityPlan, kind: str, timesteps: list[float]) -> str:
    """Layer × timestep. kind: "density" (stronger computes more) or "merge" (stronger merges more). timesteps: marked as run."""
    bins, layers = len(plan.edges), plan.num_layers
    cell_w, cell_h = (WIDTH - 60) / bins, max(26.0, min(36.0, 320 / layers))
    parts, chosen = [], {bin_of(t, plan.edges) for t in timesteps}
    for column, (edge, row) in enumerate(zip(plan.edges, plan.rungs)):
        left = 50 + column * cell_w
        for layer, rung in enumerate(row):
            if kind == "density":
                words, share = f"1/{2**rung.density}" if rung.density else "1", 1 - rung.density / (len(DENSITY_LADDER) - 1)
            else:
                words, share = f"{MERGE_LADDER[rung.merge]:.0%}", MERGE_LADDER[rung.merge] / MERGE_LADDER[-1]
            top = 30 + layer * cell_h
            title = f"<title>layer {layer}, timesteps up to {edge:.0f}: {kind} {words}</title>"
            cell = tag("rect", x=left, y=top, width=cell_w - 2, height=cell_h - 2, rx=3, class_="cell", fill_opacity=0.06 + 0.8 * share)
            value = tag("text", words, x=left + cell_w / 2 - 1, y=top + cell_h / 2 + 4, text_anchor="middle", class_="value" + (" on" if share > 0.5 else ""))
            parts.append(tag("g", title + cell + value))
        bottom = 30 + layers * cell_h
        parts.append(tag("text", f"{edge:.0f}", x=left + cell_w / 2, y=bottom + 18, text_anchor="middle", class_="tick"))
        if column in chosen:
            parts.append(mark("down", left + cell_w / 2, 18, 5, class_="f-ours"))
    for layer in range(layers):
        parts.append(tag("text", str(layer), x=42, y=30 + layer * cell_h + cell_h / 2 + 4, text_anchor="end", class_="tick"))
    height = int(30 + layers * cell_h + 46)
    parts.append(tag("text", "timesteps up to (1000 is pure noise)", x=50 + (WIDTH - 60) / 2, y=height - 6, text_anchor="middle", class_="axis"))
    parts.append(tag("text", "layer", x=4, y=20, class_="axis"))
    text = f"{kind} of {layers} layers in {bins} bins of timesteps"
    return figure(f"Plan: {kind} by layer and timestep", text, "".join(parts), WIDTH, height)


def curves(series: dict[str, list[tuple[float, float]]], title: str, x_label: str, y_label: str, log: bool = False) -> str:
    """Lines over steps: faint as logged, strong smoothed (mean of nine neighbours) where there are twenty or more."""
    xs, ys = [a for v in series.values() for a, _ in v], [b for v in series.values() for _, b in v]
    x = Axis.around(xs, LEFT, WIDTH - RIGHT, pad=0.02)
    y = Axis.around(ys, HEIGHT - BOTTOM, TOP, log=log)
    parts = [frame(x, y, x_label, y_label)]
    for index, values in enumerate(series.values()):
        kind = f"s{index % SERIES}"
        parts.append(line([(x.at(a), y.at(b)) for a, b in thinned(values)], class_=f"curve faint {kind}"))
        smooth = [(x.at(a), y.at(b)) for a, b in thinned(smoothed(values) if len(values) >= 20 else values)]
        parts.append(line(smooth, class_=f"curve {kind}") or mark("circle", *smooth[0], 3, class_=kind))
    return figure(title, ", ".join(f"{name}: {number(v[0][1])} to {number(v[-1][1])}" for name, v in series.items()), "".join(parts))


def smoothed(values: list[tuple[float, float]], reach: int = 4) -> list[tuple[float, float]]:
    """Each value the mean of its neighbours; ends have fewer of them, so nothing is shifted."""
    out = []
    for i, (a, _) in enumerate(values):
        near = min(reach, i, len(values) - 1 - i)
        window = [b for _, b in values[i - near : i + near + 1]]
        out.append((a, sum(window) / len(window)))
    return out


def thinned(values: list, most: int = 240) -> list:
    """At most `most` of them, evenly, the last one kept."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def speed_bars(rows: list[dict]) -> str:
    """Kernel speed-up over dense SDPA of the same run, the ideal 1 / density as a mark."""
    rows_height, left = 54, 12
    height = len(rows) * rows_height + 46
    ends = [max(row["speedup_over_sdpa"], 1 / row["density"]) for row in rows]
    x = Axis(0, max(ends) * 1.12, left, WIDTH - 60)
    parts = []
    for value in x.ticks():
        parts.append(tag("line", x1=x.at(value), x2=x.at(value), y1=8, y2=height - 38, class_="grid"))
        parts.append(tag("text", f"{number(value)}×", x=x.at(value), y=height - 20, class_="tick", text_anchor="middle"))
    for index, row in enumerate(rows):
        top, speed, ideal = 10 + index * rows_height, row["speedup_over_sdpa"], 1 / row["density"]
        words = f"{row['pass']} {SHORT.get(row['dtype'], row['dtype'])} S {row['S']} D {row['D']} density {row['density']:.3g}"
        parts.append(tag("text", escape(words), x=left, y=top + 12, class_="axis"))
        parts.append(tag("rect", x=left, y=top + 19, width=x.at(speed) - left, height=17, rx=3, class_="bar"))
        parts.append(tag("line", x1=x.at(ideal), x2=x.at(ideal), y1=top + 15, y2=top + 40, class_="ideal"))
        parts.append(tag("text", f"{speed:.2f}×", x=x.at(speed) + 6, y=top + 33, class_="label"))
    text = "; ".join(f"{row['pass']} {row['dtype']} {row['speedup_over_sdpa']:.2f}× of ideal {1 / row['density']:g}×" for row in rows)
    return figure("Block-sparse attention over dense attention", text, "".join(parts), WIDTH, height)
