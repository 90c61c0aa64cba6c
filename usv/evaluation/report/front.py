"""Who is better than whom: rows of a comparison as points, their Pareto fronts, and where a student is beaten."""

from __future__ import annotations

import re
from dataclasses import dataclass

# key of a row -> (name, whether more is better)
QUALITIES = {
    "subject_accuracy": ("subject accuracy", True),
    "motion_accuracy": ("motion accuracy", True),
    "frechet_distance": ("Fréchet distance", False),
    "psnr": ("PSNR against the dense twin, dB", True),
}


NOT_PEERS = {"ours", "fixed density"}  # families; fixed densities run a student's weights


@dataclass(frozen=True)
class Point:
    """One method in one plot. number: its row in the table. low, high: 95% interval of value; fast, slow: of seconds."""

    number: int
    name: str
    family: str
    seconds: float
    value: float
    low: float | None = None
    high: float | None = None
    fast: float | None = None
    slow: float | None = None


def family_of(name: str, row: dict) -> str:
    """`usv.evaluate` says none: its rows are the dense model, dense_N and dense_N_unguided (--dense), lookup (--lookup), and students."""
    if "family" in row:
        return row["family"]
    if name == "dense":
        return "dense"
    if name == "lookup" and "denoise_seconds" not in row:
        return "no model"
    return "fewer steps" if re.fullmatch(r"dense_\d+(_unguided)?", name) else "ours"


def points_of(report: dict, key: str) -> list[Point]:
    """The rows that have this quality and were timed."""
    found = []
    for index, (name, row) in enumerate(report["methods"].items(), 1):
        if row.get(key) is None or not row.get("denoise_seconds"):
            continue
        spread = row.get("denoise_seconds_by_batch", {})
        found.append(
            Point(
                index, name, family_of(name, row), row["denoise_seconds"], row[key], row.get(key + "_low"), row.get(key + "_high"),
                spread.get("p10"), spread.get("p90"),
            )
        )  # fmt: skip
    return found


def front(points: list[Point], more: bool) -> list[Point]:
    """The points that no other is both faster and better than, from fast to slow."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, -p.value if more else p.value)):
        if not kept or (point.value > kept[-1].value if more else point.value < kept[-1].value):
            kept.append(point)
    return kept


def uncovered(points: list[Point], more: bool) -> list[tuple[Point, bool]]:
    """Peers that no student is at once as fast as and as good as; the flag: within the 95% intervals one of them is."""

    def as_good(mine: Point, theirs: Point) -> bool:
        return mine.value >= theirs.value if more else mine.value <= theirs.value

    def perhaps(mine: Point, theirs: Point) -> bool:
        if None in (mine.low, mine.high, theirs.low, theirs.high):
            return False
        return mine.high >= theirs.low if more else mine.low <= theirs.high

    ours = [p for p in points if p.family == "ours"]
    found = []
    for peer in (p for p in points if p.family not in NOT_PEERS):
        faster = [mine for mine in ours if mine.seconds <= peer.seconds]
        if not any(as_good(mine, peer) for mine in faster):
            found.append((peer, any(perhaps(mine, peer) for mine in faster)))
    return found
