"""Training-free patterns against the dense teacher, at equal seeds and equal executed density; resumable.

    python -m usv.compare_patterns --model data/wan-mini --clips 32 --densities 0.5 0.3 0.2 --out data/results/patterns_wan_mini.json

For each density and pattern: settings are found that execute it (`usv.evaluation.matched_density`), every prompt is generated, and one row
is written: fidelity to the dense twin, subject and motion accuracy, Fréchet distance to real clips, attention recall and
seconds by stage. The JSON is complete after every row; the same command goes on where it was cut off, other settings or another
model begin anew, other --clusters only svg2. Beside the JSON stand a table (.md) and a plot (.png). Seconds are of the sparse calls, a clip; the total is
denoising without the time of measuring.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import usv
from usv.config import ModelConfig, SettingError
from usv.cpu import keep_freed_memory
from usv.evaluation.arguments import check
from usv.evaluation.clips import real_clips, requests
from usv.evaluation.evaluate import commit, machine
from usv.evaluation.judge import finite
from usv.evaluation.matched_density import TOLERANCE, settings_for, svg_densities
from usv.evaluation.worlds import world_of
from usv.files import check_folder, write_text
from usv.metrics import evaluate_videos, features
from usv.metrics.fidelity import find_ffmpeg
from usv.metrics.frechet import MIN_CLIPS
from usv.patterns import PATTERNS
from usv.patterns.processors import token_grid
from usv.sampling.generate import Generation, best_place, generate, latent_size, load_pipeline
from usv.sampling.patterns import PatternRecord, calls_report
from usv.sparse.grid import TokenGrid

CALIBRATION_SEED = 10**6  # seeds of the prompts on which settings are found; those of the comparison begin at 0
PROXY = "+proxy"  # behind the name of a pattern: with its option proxy
WITH_PROXY = ("svg+proxy", "svg2+proxy")
STAGES = ("profile", "cluster", "select", "permute", "attention")


class Comparison:
    """One comparison on disk: settings, rows, and the dense videos that the rows are measured against."""

    def __init__(self, out: Path, cache: Path, settings: dict, clusters: dict):
        self.out, self.settings, self.clusters = out, settings, clusters
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.dense_file = cache / f"dense-{mark}.safetensors"
        self.report = {"settings": settings, "calibration": {}, "dense": None, "rows": []}
        if out.exists():
            try:
                found = json.loads(out.read_text())
            except ValueError as error:
                raise SettingError(f"--out: got {out}, which is no JSON ({error}), accepted: a new name, or remove that file") from None
            if isinstance(found, dict) and found.get("settings") == settings:
                self.report = found
                found["rows"] = [row for row in found["rows"] if self._of_these_clusters(row["options"])]
                found["calibration"] = {k: o for k, o in found["calibration"].items() if self._of_these_clusters(o)}
            else:
                earlier = out.with_name(f"{out.stem}-{int(out.stat().st_mtime)}{out.suffix}")
                os.replace(out, earlier)
                print(f"{out}: of other settings or another model, begun anew; it is kept as {earlier}")

    def _of_these_clusters(self, options: dict) -> bool:
        return "q_clusters" not in options or {k: options[k] for k in self.clusters} == self.clusters

    def done(self, density: float, name: str) -> bool:
        return any(row["method"] == name and row["wanted"] == density for row in self.report["rows"])

    def save(self) -> None:
        self.report |= {"commit": commit(), "machine": machine(best_place()[1]), "command": "python -m usv.compare_patterns " + " ".join(sys.argv[1:])}
        write_text(self.out, json.dumps(self.report, indent=1) + "\n")


class Setup:
    """The pipeline, its prompts, and how a method is run on them."""

    def __init__(self, model: ModelConfig, clips: int, batch_size: int, warm_up: dict, recall_rows: int):
        self.pipe = load_pipeline(model.path, *best_place())
        self.model, self.batch_size, self.warm_up, self.recall_rows = model, batch_size, warm_up, recall_rows
        self.prompts, self.subjects, self.motions, _ = requests(model, clips)
        self.seeds = list(range(clips))

    def grid(self) -> TokenGrid:
        """The token grid of a video."""
        return token_grid(self.pipe.transformer, torch.empty(1, 1, *latent_size(self.pipe, self.model), device="meta"))

    def run(self, label: str, prompts: list[str], seeds: list[int], name: str | None = None, options: dict | None = None):
        """(Generation, PatternRecord or None) of a pattern, or of the dense model where name is None."""
        if name is not None:
            usv.enable(self.pipe, attention=name.removesuffix(PROXY), recall_rows=self.recall_rows, **self.warm_up, **options)
        try:
            with tqdm(total=len(prompts), desc=label, unit="video") as bar:
                generation = generate(self.pipe, self.model, prompts, seeds, self.batch_size, progress=bar)
            return generation, None if name is None else self.pipe._usv.record
        finally:
            usv.disable(self.pipe)

    def calibrated(self, name: str, density: float, clips: int, options: dict) -> dict:
        """Options of a pattern that execute `density`, measured on `clips` prompts of other seeds where need be."""

        def measure(tried: dict) -> tuple[float, float]:
            seeds = list(range(CALIBRATION_SEED, CALIBRATION_SEED + clips))
            _, record = self.run(f"{name} {density} settings", self.prompts[:clips], seeds, name, tried)
            return record.sparse_density(), temporal_share(record, tried, self.grid())

        if name.endswith(PROXY):
            options = options | {"proxy": True}
        return settings_for(name.removesuffix(PROXY), density, self.grid(), measure, options)


def temporal_share(record: PatternRecord, options: dict, grid: TokenGrid) -> float:
    """The share of temporal heads that svg's executed density tells: the first frame is kept by spatial heads only."""
    if set(options) - {"proxy"} != {"density", "block"}:
        return 0.0  # not svg
    spatial, temporal = svg_densities(grid, options["density"], options["block"])
    return min(max((spatial - record.sparse_density()) / max(spatial - temporal, 1e-9), 0.0), 1.0)


def measured(setup: Setup, generation: Generation, twins: torch.Tensor | None, reference: tuple) -> dict:
    """Quality of the videos of one method."""
    prototypes, real = reference
    intervals = len(setup.prompts) >= 2 * MIN_CLIPS
    quality = evaluate_videos(
        generation.videos, setup.subjects, setup.motions, real, twins, prototypes=prototypes, intervals=intervals
    )  # fmt: skip
    return {name: finite(value) for name, value in quality.items()}


def row_of(name: str, wanted: float, options: dict, record: PatternRecord, generation: Generation, clips: int) -> dict:
    """What was executed, and seconds a clip."""
    report = calls_report(record.calls)
    seconds = report.pop("pattern_seconds")
    measuring = seconds.pop("measure")
    dense = report.pop("dense_attention_seconds")
    return {
        "method": name, "wanted": wanted, "options": options, "executed": report["sparse_density"],
        "matched": abs(report["sparse_density"] / wanted - 1) <= TOLERANCE, "density_with_warm_up": round(record.mean_density(), 4),
        "recall": report["recall"], "attention_calls": report["attention_calls"],
        "seconds": {stage: round(value / clips, 6) for stage, value in seconds.items()}
        | {"warm_up_attention": round(dense / clips, 6), "total": round((generation.seconds["denoise"] - measuring) / clips, 6)},
    }  # fmt: skip


def dense_twins(comparison: Comparison, setup: Setup, reference: tuple) -> torch.Tensor:
    """The dense videos, generated or from the cache."""
    if comparison.report["dense"] is not None and comparison.dense_file.exists():
        return load_file(comparison.dense_file)["videos"]
    generation, _ = setup.run("dense", setup.prompts, setup.seeds)
    comparison.dense_file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"videos": generation.videos.contiguous()}, comparison.dense_file)
    quality = measured(setup, generation, None, reference)
    seconds = round(generation.seconds["denoise"] / len(setup.prompts), 4)
    comparison.report["dense"] = {"seconds": {"total": seconds}, "forwards": generation.forwards, **quality}
    comparison.save()
    return generation.videos


def compare(comparison: Comparison, setup: Setup, methods: list[str], densities: list[float], calibration: int) -> dict:
    """Every row that is still missing. Returns the report."""
    from usv.evaluation.compare_report import publish

    find_ffmpeg()  # VMAF's absence shows now, not after the first method
    keep_freed_memory()
    real, real_subjects = real_clips(setup.model, 240)
    reference = world_of(setup.model).teller(real, real_subjects), features(real) if len(setup.prompts) >= MIN_CLIPS else None
    twins = dense_twins(comparison, setup, reference)
    for density in densities:
        for name in methods:
            if comparison.done(density, name):
                continue
            key = f"{name} {density}"
            options = comparison.report["calibration"].get(key)
            if options is None:
                options = setup.calibrated(name, density, calibration, comparison.clusters if name.removesuffix(PROXY) == "svg2" else {})
                comparison.report["calibration"][key] = options
                comparison.save()
            generation, record = setup.run(key, setup.prompts, setup.seeds, name, options)
            row = row_of(name, density, options, record, generation, len(setup.prompts)) | {"commit": commit()}
            comparison.report["rows"].append(row | measured(setup, generation, twins, reference))
            comparison.save()
            publish(comparison.report, comparison.out)
    return comparison.report


def fingerprint(path: str) -> str:
    """A digest of the transformer's weights, so that results of another model are not continued."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("transformer/*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/wan-mini")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2], help="executed by the sparse calls")
    parser.add_argument("--methods", nargs="+", default=list(PATTERNS), choices=[*PATTERNS, *WITH_PROXY],
                        help="svg+proxy and svg2+proxy: with proxy=true")  # fmt: skip
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dense-layers", type=float, default=0.03, help="fraction of the first layers that stay dense, for all")
    parser.add_argument("--dense-steps", type=float, default=0.2, help="fraction of the first steps that stay dense, for all")
    parser.add_argument("--clusters", type=int, nargs=2, default=[100, 200], help="svg2: of queries and of keys")
    parser.add_argument("--recall-rows", type=int, default=16, help="query rows a call on which recall is measured")
    parser.add_argument("--calibration-clips", type=int, default=2, help="prompts on which settings of a density are found")
    parser.add_argument("--out", type=Path, default=Path("outputs/patterns.json"), help="JSON; .md and .png stand beside it")
    parser.add_argument("--cache", type=Path, default=Path("outputs/compare_patterns"), help="folder for the dense videos")
    args = parser.parse_args(words)
    if bad := [d for d in args.densities if not 0 < d < 1]:
        parser.error(f"--densities: got {bad[0]}, accepted: fractions in (0, 1)")
    if not 1 <= args.calibration_clips <= args.clips:
        parser.error(f"--calibration-clips: got {args.calibration_clips}, accepted: 1..{args.clips} (--clips)")
    return args


def main(words: list[str] | None = None, model: ModelConfig | None = None) -> dict:
    """The command; `model` gives another shape than Wan-mini's."""
    from usv.evaluation.compare_report import publish, table

    args = parse(words)
    try:
        check(args)
        check_folder(args.cache, "--cache")
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    model = model or ModelConfig(path=args.model)
    model.path, model.num_inference_steps, model.guidance_scale = args.model, args.steps, args.guidance
    warm_up = {"dense_layers": args.dense_layers, "dense_steps": args.dense_steps}
    names = ("model", "clips", "steps", "guidance", "batch_size", "recall_rows", "calibration_clips")
    prompts = hashlib.sha256("\n".join(requests(model, args.clips).prompts).encode()).hexdigest()[:16]
    settings = {name: getattr(args, name) for name in names} | warm_up | {"weights": fingerprint(args.model), "prompts": prompts}
    clusters = dict(zip(("q_clusters", "k_clusters"), args.clusters))
    try:
        setup = Setup(model, args.clips, args.batch_size, warm_up, args.recall_rows)
        comparison = Comparison(args.out, args.cache, settings, clusters)
        report = compare(comparison, setup, args.methods, args.densities, args.calibration_clips)
    except (SettingError, ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    publish(report, args.out)
    print(table(report))
    print(args.out)
    return report
