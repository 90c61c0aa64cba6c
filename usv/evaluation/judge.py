"""Videos of several methods at the same prompts and seeds: quality of each, and how it stands to the dense model; as tables."""

from __future__ import annotations

import math

import torch

from usv.metrics import gap_closed, non_inferior
from usv.metrics.frechet import MIN_CLIPS
from usv.metrics.summary import measure_videos, summarise


def judge(shown: dict[str, torch.Tensor], twins: list[str], subjects, motions, prototypes, reference, patch: int) -> dict[str, dict]:
    """Quality of each method's videos, each clip's values, and how it stands to the dense model's at the same prompts and seeds.

    twins: methods whose videos are compared with the dense ones frame by frame. Methods of enough clips get intervals and
    `equal_quality`; with a row `dense_N` of a few-step student's steps, the share of the gap to the full teacher that it closes.
    """
    measured, rows = {}, {}
    clips = len(subjects)
    for name, videos in shown.items():
        dense = shown["dense"] if name in twins else None
        measured[name] = each, pooled = measure_videos(videos, subjects, motions, dense, prototypes=prototypes, patch=patch)
        summary = summarise(each, pooled, reference if clips >= MIN_CLIPS else None, subjects, clips >= 2 * MIN_CLIPS)
        rows[name] = {k: finite(v) for k, v in summary.items()} | {"values": {k: [finite(x) for x in v.tolist()] for k, v in each.items()}}
    if clips >= 2 * MIN_CLIPS and len(set(subjects)) > 1:
        for name, (each, pooled) in measured.items():
            if name == "dense":
                continue
            verdict = non_inferior(measured["dense"][0], each, subjects, (reference, measured["dense"][1], pooled))
            rows[name]["equal_quality"] = verdict.non_inferior
            rows[name]["to_dense"] = {k: [finite(x) for x in d] + [within] for k, (d, within) in verdict.metrics.items()}
    untrained = min((n for n in rows if n.startswith("dense_")), key=lambda n: rows[n].get("frechet_distance", 0), default=None)
    for row in rows.values() if untrained and "frechet_distance" in rows["dense"] else ():
        closed = {m: gap_closed(row[m], rows[untrained][m], rows["dense"][m]) for m in ("subject_accuracy", "motion_accuracy", "frechet_distance")}
        row["gap_closed"] = {k: finite(v) for k, v in closed.items()} | {"from": untrained}
    return rows


def finite(value: float) -> float | None:
    """Rounded for JSON, which has no infinity: the PSNR of equal videos is None."""
    return round(value, 5) if math.isfinite(value) else None


def cell(row: dict, key: str, form: str = "", unit: str = "") -> str:
    """A value of a row as text; a row that has none (a method without a model) shows a dash."""
    return "–" if row.get(key) is None else f"{row[key]:{form}}{unit}"


def table(report: dict) -> str:
    """The report as a table, one column a method."""
    columns = (
        ("forwards", "forwards", "", ""), ("speed-up", "forward_speedup", ".2f", "×"), ("density", "attention_density", ".3f", ""),
        ("merged", "merged", ".0%", ""), ("FLOPs ratio", "flops_ratio", ".2f", "×"), ("subject", "subject_accuracy", ".3f", ""),
        ("motion", "motion_accuracy", ".3f", ""), ("Fréchet", "frechet_distance", ".1f", ""), ("coverage", "coverage", ".2f", ""),
        ("grid", "border_ratio", ".2f", ""), ("denoise s", "denoise_seconds", ".3f", ""), ("denoise ×", "denoise_speedup", ".1f", "×"),
        ("total s", "total_seconds", ".3f", ""), ("total ×", "total_speedup", ".1f", "×"),
    )  # fmt: skip
    lines = [("", "s/forward", *(title for title, *_ in columns), "as dense")]
    for name, row in report["methods"].items():
        forward = cell(row.get("seconds_per_forward", {}), "p50", ".4f")
        lines.append((name, forward, *(cell(row, key, form, unit) for _, key, form, unit in columns), {True: "yes", False: "no"}.get(row.get("equal_quality"), "–")))
    width = max(13, *(len(name) + 2 for name in report["methods"]))
    text = "\n".join("".join(f"{value:>{width}}" for value in row) for row in zip(*lines))
    floor = report.get("floor", {}).get("frechet_distance")
    return text if floor is None else f"{text}\nreal clips against real clips, as many: Fréchet {floor:.1f}"


def markdown(report: dict) -> str:
    """The report as the README shows it: a row for each method, 95% intervals where they were computed."""
    lines = ["| method | forwards | s/forward | forward × | density | merged | subject | motion | Fréchet | denoising s | denoising × |"]
    lines.append("|---" * 11 + "|")
    for name, r in report["methods"].items():
        between = lambda key: f" ({r[key + '_low']:.2f}–{r[key + '_high']:.2f})" if key + "_low" in r else ""  # noqa: B023, E731
        values = (
            name, cell(r, "forwards"), cell(r.get("seconds_per_forward", {}), "p50", ".4f"), cell(r, "forward_speedup", ".2f"),
            cell(r, "attention_density", ".3f"), cell(r, "merged", ".0%"), cell(r, "subject_accuracy", ".3f") + between("subject_accuracy"),
            cell(r, "motion_accuracy", ".3f") + between("motion_accuracy"), cell(r, "frechet_distance", ".0f"), cell(r, "denoise_seconds", ".2f"),
            cell(r, "denoise_speedup", ".1f"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)
