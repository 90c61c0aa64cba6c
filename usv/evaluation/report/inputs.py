"""What the report is made of: results as JSON, students' plans, training logs and videos, each read or listed as unreadable."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from usv.sampling.checkpoint import CheckpointError, read_config
from usv.sparse.plan import SparsityPlan

KINDS = ("comparison", "axes", "patterns", "policies", "kernels", "other")


@dataclass(frozen=True)
class Video:
    """An mp4 with the prompt and seed it was made from, and its methods, left to right."""

    path: Path
    prompt: str = ""
    seed: int | None = None
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudentPlan:
    """The plan of a student folder, the timesteps it is sampled at ([]: the teacher's sampler), and its training record."""

    plan: SparsityPlan
    timesteps: list[float]
    steps: int | None
    training: dict


@dataclass
class Inputs:
    """results: kind -> {file: report}. problems: what could not be read, and why."""

    results: dict[str, dict[str, dict]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    students: dict[str, StudentPlan] = field(default_factory=dict)
    curves: dict[str, list[dict]] = field(default_factory=dict)
    videos: list[Video] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def kind_of(report: dict) -> str:
    """Which program wrote a JSON, by what it holds."""
    if {"methods", "interaction"} <= set(report):
        return "axes"  # usv.bench denoise
    if "methods" in report:
        return "comparison"  # usv.evaluate, usv.peers
    if {"rows", "calibration"} <= set(report):
        return "patterns"  # usv.compare_patterns
    if {"rows", "runs", "seeds"} <= set(report):
        return "policies"  # usv.compare_policies
    return "kernels" if {"rows", "gate"} <= set(report) else "other"


def axes_of(inputs: Inputs) -> list[tuple[dict, dict]]:
    """The reports of `usv.bench denoise`, each with the methods of a comparison that has all of its rows, {} without one."""
    comparisons = [report["methods"] for report in inputs.results["comparison"].values()]
    return [(times, next((c for c in comparisons if set(times["methods"]) <= set(c)), {})) for times in inputs.results["axes"].values()]


def gather(results: list[Path], students: dict[str, Path], curves: list[Path], videos: list[Path]) -> Inputs:
    """Read everything; what is missing or damaged is a problem in words, never an exception."""
    inputs = Inputs()
    for path in results:
        report = _json(path, inputs.problems)
        if isinstance(report, dict):
            inputs.results[kind_of(report)][str(path)] = report
        elif report is not None:
            inputs.problems.append(f"{path}: got a {type(report).__name__}, accepted: a JSON object")
    for name, path in students.items():
        try:
            record = read_config(path)
            sampling, plan = record["sampling"], SparsityPlan.from_dict(record["plan"])
        except (CheckpointError, ValueError, KeyError, OSError) as error:
            inputs.problems.append(f"{path}: {error}")
            continue
        timesteps = list(sampling.get("student_timesteps") or plan.student_timesteps())
        inputs.students[name] = StudentPlan(plan, timesteps, sampling.get("num_inference_steps"), record["training"])
    for path in curves:
        if lines := _lines(path, inputs.problems):
            inputs.curves[str(path)] = lines
    for folder in videos:
        inputs.videos += _videos(folder, inputs.problems)
    return inputs


def _json(path: Path, problems: list[str]):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        problems.append(f"{path}: not readable ({error})")
        return None


def _lines(path: Path, problems: list[str]) -> list[dict]:
    """Rows of a jsonl; a line cut off by a kill is left out."""
    rows = []
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not readable ({error})")
        return []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            problems.append(f"{path}: a line that is no JSON, left out")
    return [row for row in rows if isinstance(row, dict)]


def _videos(folder: Path, problems: list[str]) -> list[Video]:
    """mp4s of a folder, described by its videos.json where there is one."""
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder of videos")
        return []
    described = _json(folder / "videos.json", problems) if (folder / "videos.json").exists() else None
    if not isinstance(described, list):
        return [Video(path) for path in sorted(folder.glob("*.mp4"))]
    entries = [entry for entry in described if isinstance(entry, dict) and isinstance(entry.get("file"), str)]
    problems += [f"{folder}/videos.json: an entry without a file"] * (len(described) - len(entries))
    found = [Video(folder / e["file"], e.get("prompt", ""), e.get("seed"), tuple(e.get("methods", ()))) for e in entries]
    problems += [f"{video.path}: named in videos.json and missing" for video in found if not video.path.exists()]
    return [video for video in found if video.path.exists()]
