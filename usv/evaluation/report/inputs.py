"""What the report is made of: results as JSON, students' plans, training logs and videos, each read or listed as unreadable."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from usv.sampling.checkpoint import CheckpointError, read_config
from usv.sparse.plan import SparsityPlan

MOST_BYTES = 64 << 20  # of a file that is read whole: a page is opened in a browser
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
    if "methods" in report and not (isinstance(report["methods"], dict) and all(isinstance(row, dict) for row in report["methods"].values())):
        return "other"
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
            if "methods" in report and kind_of(report) == "other":
                inputs.problems.append(f"{path}: its methods are no rows by name, left out")
            inputs.results[kind_of(report)][str(path)] = report
        elif report is not None:
            inputs.problems.append(f"{path}: got a {type(report).__name__}, accepted: a JSON object")
    for name, path in students.items():
        try:
            record = read_config(path)
            sampling, plan = record["sampling"], SparsityPlan.from_dict(record["plan"])
        except (CheckpointError, ValueError, KeyError, TypeError, OSError) as error:
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
        return clean(json.loads(_text(path)))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: not readable ({error})")
        return None


def _text(path: Path) -> str:
    """OSError for what is no ordinary file, or too long."""
    if path.exists() and not path.is_file():
        raise OSError("no ordinary file")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise OSError(f"{size / 2**20:.0f} MiB, at most {MOST_BYTES >> 20} are read")
    return path.read_text(encoding="utf-8", errors="replace")


def clean(value):
    """JSON as a page can show it: without control characters and halves of characters. ValueError for a number that is not finite."""
    if isinstance(value, str):
        return "".join(c if c >= " " or c in "\n\t" else " " for c in value.encode("utf-8", "replace").decode())
    if isinstance(value, dict):
        return {clean(name): clean(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [clean(entry) for entry in value]
    if isinstance(value, int | float) and not (abs(value) < 1 << 63 and math.isfinite(value)):
        raise ValueError("a number that is not finite")
    return value


def _lines(path: Path, problems: list[str]) -> list[dict]:
    """Rows of a jsonl; a line cut off by a kill is left out."""
    rows = []
    try:
        text = _text(path)
    except OSError as error:
        problems.append(f"{path}: not readable ({error})")
        return []
    for line in filter(str.strip, text.split("\n")):  # splitlines would cut a prompt at U+2028
        try:
            rows.append({name: value for name, value in json.loads(line).items() if not isinstance(value, list | dict)})
        except (ValueError, AttributeError, RecursionError):
            problems.append(f"{path}: a line that is no JSON, left out")
    return rows


def _videos(folder: Path, problems: list[str]) -> list[Video]:
    """mp4s of a folder, described by its videos.json where there is one."""
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder of videos")
        return []
    described = _json(folder / "videos.json", problems) if (folder / "videos.json").exists() else None
    if not isinstance(described, list):
        return [Video(path) for path in sorted(folder.glob("*.mp4")) if _inside(folder, path.name, problems)]
    entries = [entry for entry in described if isinstance(entry, dict) and isinstance(entry.get("file"), str)]
    problems += [f"{folder}/videos.json: an entry without a file"] * (len(described) - len(entries))
    return [_video(folder, entry) for entry in entries if _inside(folder, entry["file"], problems)]


def _video(folder: Path, entry: dict) -> Video:
    """An entry of videos.json; what has another type than it should is left out."""
    prompt, seed, methods = entry.get("prompt"), entry.get("seed"), entry.get("methods")
    return Video(
        folder / entry["file"], prompt if isinstance(prompt, str) else "", seed if type(seed) is int else None,
        tuple(name for name in methods if isinstance(name, str)) if isinstance(methods, list) else (),
    )  # fmt: skip


def _inside(folder: Path, name: str, problems: list[str]) -> bool:
    """Whether a name is an ordinary mp4 of this folder itself: a page that is sent around must hold nothing else of the machine."""
    path = folder / name
    if Path(name).name != name or Path(name).suffix.lower() != ".mp4":
        problems.append(f"{folder}/videos.json: names {name!r}, accepted: an .mp4 in that folder")
    elif path.is_symlink() or (path.exists() and not path.is_file()):
        problems.append(f"{path}: is no ordinary file, a link for example, left out")
    elif not path.exists():
        problems.append(f"{path}: named in videos.json and missing")
    elif path.stat().st_size > MOST_BYTES:
        problems.append(f"{path}: larger than {MOST_BYTES >> 20} MiB, left out")
    else:
        return True
    return False
