"""Videos of several methods at the same prompts and seeds: quality of each, and how it stands to the dense model; as tables."""

from __future__ import annotations

import math

import torch

from usv.metrics import gap_closed, non_inferior, paired_difference, paired_frechet
from usv.metrics.frechet import MIN_CLIPS
from usv.metrics.summary import measure_videos, summarise

UNLABELLED = ("subject_consistency", "flicker", "flow_warp_error")  # what can be asked of a video without knowing its subject and motion


def judge(shown: dict[str, torch.Tensor], twins: list[str], subjects, motions, prototypes, reference, patch: int, prompts=None) -> dict[str, dict]:
    """Quality of each method's videos, each clip's values, and how it stands to the dense model's at the same prompts and seeds.

    subjects, motions: labels, or None with `prompts`, a prompt a clip: clips of a prompt then stand or fall together.

    twins: methods whose videos are compared with the dense ones frame by frame. Methods of enough clips get intervals and
    `equal_quality`; with a row `dense_N` of a few-step student's steps, the share of the gap to the full teacher that it closes.
    """
    measured, rows = {}, {}
    clips = len(shown["dense"])
    for name, videos in shown.items():
        dense = shown["dense"] if name in twins else None
        measured[name] = each, pooled = measure_videos(videos, subjects, motions, dense, prototypes=prototypes, patch=patch)
        summary = summarise(each, pooled, reference if clips >= MIN_CLIPS else None, subjects, clips >= 2 * MIN_CLIPS)
        rows[name] = {k: finite(v) for k, v in summary.items()} | {"values": {k: [finite(x) for x in v.tolist()] for k, v in each.items()}}
    if clips >= 2 * MIN_CLIPS and len(set(subjects or prompts)) > 1:
        for name, (each, pooled) in measured.items():
            if name == "dense":
                continue
            if subjects is None:
                rows[name]["to_dense"] = {k: [finite(x) for x in d] for k, d in _differences(measured["dense"], (each, pooled), prompts, reference).items()}
                continue
            verdict = non_inferior(measured["dense"][0], each, subjects, (reference, measured["dense"][1], pooled))
            rows[name]["equal_quality"] = verdict.non_inferior
            rows[name]["to_dense"] = {k: [finite(x) for x in d] + [within] for k, (d, within) in verdict.metrics.items()}
    untrained = min((n for n in rows if n.startswith("dense_")), key=lambda n: rows[n].get("frechet_distance", 0), default=None)
    for row in rows.values() if untrained and "frechet_distance" in rows["dense"] else ():
        closed = {m: gap_closed(row[m], rows[untrained][m], rows["dense"][m]) for m in ("subject_accuracy", "motion_accuracy", "frechet_distance") if m in row}
        row["gap_closed"] = {k: finite(v) for k, v in closed.items()} | {"from": untrained}
    return rows


def _differences(dense: tuple, method: tuple, prompts: list, reference) -> dict:
    """Method − dense of what needs no labels, and the ratio of Fréchet distances, with 95% intervals over prompts. No margin: nobody has set one."""
    found = {name: paired_difference(dense[0][name], method[0][name], prompts) for name in UNLABELLED if name in dense[0]}
    return found if reference is None else found | {"frechet_ratio": paired_frechet(reference, dense[1], method[1], clusters=prompts)}


def finite(value: float) -> float | None:
    """Rounded for JSON, which has no infinity: the PSNR of equal videos is None."""
    return round(value, 5) if math.isfinite(value) else None


def cell(row: dict, key: str, form: str = "", unit: str = "") -> str:
    """A value of a row as text; a row that has none (a method without a model) shows a dash."""
    return "–" if row.get(key) is None else f"{row[key]:{form}}{unit}"


def table(report: dict) -> str:
    """The report as a table, one column a method."""
    labelled = any("subject_accuracy" in row for row in report["methods"].values())
    known = (("subject", "subject_accuracy", ".3f", ""), ("motion", "motion_accuracy", ".3f", ""))
    unknown = (
        ("consistency", "subject_consistency", ".3f", ""), ("flicker", "flicker", ".4f", ""), ("warp error", "flow_warp_error", ".4f", ""),
        ("PSNR", "psnr", ".1f", ""), ("SSIM", "ssim", ".3f", ""),
    )  # fmt: skip
    columns = (
        ("forwards", "forwards", "", ""), ("speed-up", "forward_speedup", ".2f", "×"), ("density", "attention_density", ".3f", ""),
        ("merged", "merged", ".0%", ""), ("FLOPs ratio", "flops_ratio", ".2f", "×"), *(known if labelled else unknown), ("Fréchet", "frechet_distance", ".1f", ""), ("coverage", "coverage", ".2f", ""),
        ("grid", "border_ratio", ".2f", ""), ("denoise s", "denoise_seconds", ".3f", ""), ("denoise ×", "denoise_speedup", ".1f", "×"),
        ("total s", "total_seconds", ".3f", ""), ("total ×", "total_speedup", ".1f", "×"),
    )  # fmt: skip
    lines = [("", "s/forward", *(title for title, *_ in columns), "as dense")]
    for name, row in report["methods"].items():
        forward = cell(row.get("seconds_per_forward", {}), "p50", ".4f")
        lines.append((name, forward, *(cell(row, key, form, unit) for _, key, form, unit in columns), {True: "yes", False: "no"}.get(row.get("equal_quality"), "–")))
    width = max(13, *(len(name) + 2 for name in report["methods"]))
    rows = [row for row in zip(*lines) if labelled or row[0] != "as dense"]
    text = "\n".join("".join(f"{value:>{width}}" for value in row) for row in rows)
    return "\n".join((text, *against_dense(report), *floor_of(report)))


def against_dense(report: dict) -> list[str]:
    """How each method without labels stands to the dense model, a line each."""
    words = {"subject_consistency": "consistency {:+.3f} ({:+.3f} to {:+.3f})", "flicker": "flicker {:+.4f} ({:+.4f} to {:+.4f})",
             "flow_warp_error": "warp error {:+.4f} ({:+.4f} to {:+.4f})", "frechet_ratio": "Fréchet × {:.2f} ({:.2f} to {:.2f})"}  # fmt: skip
    found = {name: row["to_dense"] for name, row in report["methods"].items() if "to_dense" in row and "equal_quality" not in row}
    return [f"{name} against dense, same prompts and seeds: " + ", ".join(words[k].format(*v) for k, v in row.items() if k in words and None not in v) for name, row in found.items()]


def floor_of(report: dict) -> list[str]:
    """What the Fréchet distances are to be read beside, or why there are none."""
    real, floor = report.get("real", {}), report.get("floor", {}).get("frechet_distance")
    if "reason" in real:
        return [f"no Fréchet distance: {real['reason']}"]
    if floor is None:
        return []
    if not real:
        return [f"real clips against real clips, as many: Fréchet {floor:.1f}"]
    return [f"{real['floor_clips']} real clips of train against {real['clips']} of {real['split']}: Fréchet {floor:.1f}"]


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
