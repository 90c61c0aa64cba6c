"""The README's tables, made from results: each replaces the table that begins with the same line."""

from __future__ import annotations

from pathlib import Path

from usv import evaluate
from usv.peers import __main__ as peers
from usv.report.inputs import Inputs

QUALITIES = (("subject_accuracy", 3), ("motion_accuracy", 3), ("frechet_distance", 0))
TABLES = {"usv_mini.json": evaluate.markdown, "peers.json": peers.markdown}  # in data/results


def tables(inputs: Inputs) -> list[str]:
    """The tables of the results that a README shows, as Markdown."""
    reports = inputs.results["comparison"].items()
    found = [TABLES[Path(file).name](report) for file, report in reports if Path(file).name in TABLES]
    return found + [axes_markdown(times, quality) for times, quality in axes_of(inputs)]


def axes_of(inputs: Inputs) -> list[tuple[dict, dict]]:
    """The reports of `usv.bench denoise`, each with the methods of a comparison that has all of its rows, {} without one."""
    comparisons = [report["methods"] for report in inputs.results["comparison"].values()]
    return [(times, next((c for c in comparisons if set(times["methods"]) <= set(c)), {})) for times in inputs.results["axes"].values()]


def axes_markdown(times: dict, quality: dict) -> str:
    """Each axis alone and together: what it does to the time of a clip, and to quality."""
    lines = ["| row | axes | forwards | s/forward | density | merged | denoising s | denoising × | subject | motion | Fréchet |", "|---" * 11 + "|"]
    for name, r in times["methods"].items():
        good, batch = quality.get(name, {}), times["batch_size"]
        values = [f"{good[key]:.{digits}f}" if good.get(key) is not None else "–" for key, digits in QUALITIES]
        lines.append(
            f"| {name} | {r['axes'] or 'guidance folded in'} | {r['forwards']} | {r['seconds_per_forward']['p50'] / batch:.4f} | {r['density']:.3f} | {r['merged']:.0%} "
            f"| {r['denoise_seconds']['p50'] / batch:.3f} | {r['denoise_speedup']:.1f} | " + " | ".join(values) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def refreshed(text: str, table: str) -> str:
    """`text` with the rows of `table` in place of those under the same heading; unchanged where there is no such heading."""
    lines, heading = text.split("\n"), table.split("\n")[0]
    if heading not in lines:
        return text
    begin = end = lines.index(heading)
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:begin], *table.split("\n"), *lines[end:]])
