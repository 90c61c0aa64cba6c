"""The run: every method on every prompt, batches interleaved so that a noisy machine hurts all alike; then the rows.

Of several processes (torchrun) each makes every so-manieth batch of all methods, and the first has the rows of all.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from diffusers import WanPipeline
from tqdm import tqdm

from usv.config import ModelConfig
from usv.evaluation.clips import real_clips, requests
from usv.evaluation.evaluate import machine
from usv.evaluation.judge import finite
from usv.evaluation.peers.methods import Method
from usv.evaluation.worlds import world_of
from usv.files import write_text
from usv.metrics import evaluate_videos, features
from usv.metrics.frechet import MIN_CLIPS
from usv.sampling.generate import best_place, generate, load_pipeline
from usv.sampling.ranks import Crew, in_turn, join
from usv.training.run import commit
from usv.video import magnified, write_mp4

PACKAGES = ("torch", "diffusers", "transformers", "cache-dit", "usv")
SHOWN = 6  # prompts whose videos are written


@dataclass
class Result:
    """What one method has done so far. seconds: of denoising, by batch and clip. reason: why it has no further batches."""

    videos: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    decode: float = 0.0
    forwards: int = 0
    executed: list[tuple[float, float]] = field(default_factory=list)
    reason: str | None = None


class Pipelines:
    """The shared pipeline, and one of its own for each method that leaves traces."""

    def __init__(self, path: str):
        self.path, self.shared, self.own = path, load_pipeline(path, *best_place()), {}

    def of(self, method: Method) -> WanPipeline:
        if not method.own_pipeline:
            return self.shared
        if method.name not in self.own:
            self.own[method.name] = load_pipeline(self.path, *best_place())
        return self.own[method.name]


def run_methods(model: ModelConfig, methods: list[Method], clips: int, batch_size: int, say: Callable = print, crew: Crew = Crew()) -> dict[str, Result] | None:
    """{name: Result}. A method that raises keeps its reason and is left out from there on; the others go on. Of several processes
    the first has all results, the others get None."""
    pipelines, results = Pipelines(model.path), {method.name: Result() for method in methods}
    prompts = requests(model, clips).prompts
    mine = crew.mine(clips, batch_size)
    for method in methods:  # caches are built, settings are found and what cannot run says so, before anything is timed
        for size in {batch_size, clips % batch_size or batch_size} if method.compiles else {1}:
            first = prompts[:size]
            attempt(pipelines, model, method, first, list(range(len(first))), results[method.name], trial=True)
        if results[method.name].reason and crew.first:
            say(f"{method.name}: {results[method.name].reason}")
    with tqdm(total=len(mine) * sum(r.reason is None for r in results.values()), unit="video", disable=not crew.first) as bar:
        for start in mine[::batch_size]:
            part = prompts[start : start + batch_size]
            for method in methods:
                if results[method.name].reason is None:
                    bar.set_description(method.name)
                    attempt(pipelines, model, method, part, list(range(start, start + len(part))), results[method.name])
                    bar.update(len(part))
    everyone = crew.gather(results)
    return {name: together([theirs[name] for theirs in everyone]) for name in results} if crew.first else None


def together(results: list[Result]) -> Result:
    """What several processes have done of one method, as if one had made all batches in their order; a reason of any is that of all."""
    reason = next((result.reason for result in results if result.reason is not None), None)
    if reason is not None:
        return Result(reason=reason)
    each = {name: in_turn([getattr(result, name) for result in results]) for name in ("videos", "seconds", "clips", "executed")}
    return Result(**each, decode=sum(result.decode for result in results), forwards=max(result.forwards for result in results))


def attempt(pipelines: Pipelines, model: ModelConfig, method: Method, prompts: list[str], seeds: list[int], result: Result, trial=False) -> None:
    """One batch of one method, added to `result`; a trial runs few steps and adds nothing but a reason."""
    try:
        pipe = pipelines.of(method)
        with method.enter(pipe) as running:
            steps = running.steps or model.num_inference_steps
            if trial and method.family != "ours" and method.family != "fixed density":  # students have their own number
                steps = min(steps, 4)
            made = generate(pipe, model, prompts, seeds, len(prompts), steps)
            if not made.videos.isfinite().all():
                raise ValueError("its videos hold values that are not finite")
            if trial:
                return
            result.videos.append(made.videos)
            result.seconds.append((made.seconds["denoise"] - running.measuring()) / len(prompts))
            result.clips.append(len(prompts))
            result.decode += made.seconds["decode"]
            result.forwards = made.forwards
            result.executed.append(running.executed())
    except Exception as error:  # a peer's failure is a row of the table, not the end of the run
        known = type(error).__name__ == "Unavailable"
        result.reason = str(error) if known else f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        result.videos.clear()


def rows_of(model: ModelConfig, methods: list[Method], results: dict[str, Result], clips: int) -> dict[str, dict]:
    """One row a method: what it is, then figures or the reason why there are none."""
    _, subjects, motions, _ = requests(model, clips)
    real, real_subjects = real_clips(model, 240)
    prototypes, reference = world_of(model).teller(real, real_subjects), features(real) if clips >= MIN_CLIPS else None
    twins = torch.cat(results["dense"].videos) if results["dense"].reason is None else None
    rows = {}
    for method in methods:
        result = results[method.name]
        row = {"family": method.family, "settings": method.settings}
        rows[method.name] = row
        if result.reason is not None:
            row["reason"] = result.reason
            continue
        videos = torch.cat(result.videos)
        against = twins if method.training_free else None
        quality = evaluate_videos(videos, subjects, motions, reference, against, prototypes=prototypes, intervals=clips >= 2 * MIN_CLIPS)
        row |= speed(result) | {key: finite(value) for key, value in quality.items()}
    dense = rows["dense"].get("denoise_seconds")
    for row in rows.values():
        if dense and "denoise_seconds" in row:
            row["denoise_speedup"] = round(dense / row["denoise_seconds"], 4)
    return rows


def speed(result: Result) -> dict:
    """Seconds a clip (mean, and quantiles over batches), forwards, executed density and merging."""
    clips = sum(result.clips)
    quantiles = torch.tensor(result.seconds).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    density, merged = (sum(x * n for x, n in zip(column, result.clips)) / clips for column in zip(*result.executed))
    return {
        "forwards": result.forwards,
        "attention_density": round(density, 5),
        "merged": round(merged, 5),
        "denoise_seconds": sum(s * n for s, n in zip(result.seconds, result.clips)) / clips,
        "denoise_seconds_by_batch": dict(zip(("p10", "p50", "p90"), quantiles)),
        "decode_seconds": result.decode / clips,
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what was compared."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_videos(folder: Path, prompts: list[str], results: dict[str, Result], fps: int) -> None:
    """One mp4 for each method and shown prompt, and videos.json, which says what they are."""
    entries = []
    for index in range(min(SHOWN, len(prompts))):
        for name, result in results.items():
            if result.reason is None:
                file = f"{index:02d}-{name}.mp4"
                videos = torch.cat(result.videos)
                write_mp4(folder / file, videos[index], fps, scale=magnified(videos.shape[-1], 2))
                entries.append({"file": file, "prompt": prompts[index], "seed": index, "methods": [name]})
    write_text(folder / "videos.json", json.dumps(entries, indent=1) + "\n")


def compare(model: ModelConfig, methods: list[Method], clips: int, batch_size: int, videos: Path | None = None) -> dict | None:
    """The report: machine, versions, commit, and a row for each method. Of several processes (torchrun) the first has it, the others None."""
    crew = join()
    try:
        results = run_methods(model, methods, clips, batch_size, crew=crew)
    finally:
        crew.leave()
    if results is None:
        return None
    if videos is not None:
        write_videos(videos, requests(model, clips).prompts, results, model.fps)
    rows = rows_of(model, methods, results, clips)
    settings = {"clips": clips, "batch_size": batch_size, "steps": model.num_inference_steps, "guidance": model.guidance_scale, "processes": crew.world}
    return {"commit": commit(), "machine": machine(best_place()[1]), "versions": versions(), **settings, "methods": rows}
