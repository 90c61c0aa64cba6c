"""Quality and speed of students against the dense model, at the same prompts and seeds, in one process.

    python -m usv.evaluate --ckpt outputs/usv_mini/student --clips 120 --out data/results/usv_mini.json
    python -m usv.evaluate --ckpt three=outputs/usv_few_step/student --ckpt two=outputs/usv_few_step/student@1000,750

Prompts are CameraMotion captions, every subject with every motion in turn. Batches of the methods are interleaved, so that a
noisy machine hurts all alike. Quality: subject and motion accuracy against the prompt, Fréchet distance to real clips,
consistency, flicker, warp error, with 95% intervals where there are enough clips; and of students that take the teacher's steps
how near each video comes to its dense twin (PSNR, SSIM, perceptual distance).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import usv
from usv.config import ModelConfig
from usv.cpu import keep_freed_memory, processor
from usv.evaluation.arguments import check
from usv.files import write_result, write_text
from usv.metrics import build_prototypes, evaluate_videos, features
from usv.metrics.frechet import MIN_CLIPS
from usv.sampling.checkpoint import CheckpointError, Student, load_student, named
from usv.sampling.generate import Generation, best_place, generate, load_pipeline, now
from usv.sampling.sampler import StudentScheduler
from usv.sparse.cost import ModelShape, plan_cost
from usv.sparse.grid import tile_layout
from usv.training.run import commit
from usv.video import contact_sheet, magnified, write_mp4

ROOT = Path(__file__).resolve().parents[2]
REAL_SEED = 3  # neither the teacher's training clips (1) nor the codec's held-out ones (2)


def camera_motion():
    """The module data/camera_motion.py, which is no part of the installed package."""
    if str(ROOT / "data") not in sys.path:
        sys.path.insert(0, str(ROOT / "data"))
    import camera_motion

    return camera_motion


def requests(count: int) -> tuple[list[str], list[int], list[int]]:
    """`count` captions with their labels. 120 cover every subject with every motion; fewer still cover all subjects."""
    world = camera_motion()
    subjects, motions = len(world.SUBJECTS), len(world.MOTIONS)
    pairs = [(i % subjects, (i % subjects + i // subjects) % motions) for i in range(count)]
    return [world.caption(s, m) for s, m in pairs], [s for s, _ in pairs], [m for _, m in pairs]


def real_clips(model: ModelConfig, count: int) -> tuple[torch.Tensor, list[int]]:
    """Real clips (N, T, 3, H, W) in [0, 1] and their subjects: the reference of the Fréchet distance and the prototypes."""
    world = camera_motion()
    clips = [world.sample_clip(i, REAL_SEED, model.num_frames, model.height) for i in range(count)]
    return torch.stack([c.frames for c in clips]).float() / 255, [c.subject for c in clips]


def generate_all(pipe, model: ModelConfig, methods: dict, prompts: list[str], seeds: list[int], batch_size: int) -> dict:
    """{name: Generation} with batches of all methods interleaved. `methods`: name -> checkpoint or None for dense."""
    parts: dict[str, list[Generation]] = {name: [] for name in methods}
    executed: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    with tqdm(total=len(prompts) * len(methods), unit="video") as bar:
        for start in range(0, len(prompts), batch_size):
            for name, checkpoint in methods.items():
                bar.set_description(name)
                steps = None
                if checkpoint is not None:
                    usv.enable(pipe, checkpoint)
                    steps = pipe._usv.student.sampling["num_inference_steps"]
                part = slice(start, start + batch_size)
                parts[name].append(generate(pipe, model, prompts[part], seeds[part], batch_size, steps, progress=bar))
                if checkpoint is not None:
                    executed[name].append((pipe._usv.record.mean_density(), pipe._usv.record.mean_merged()))
                    usv.disable(pipe)
    result = {}
    for name, generations in parts.items():
        seconds = {k: sum(g.seconds[k] for g in generations) for k in generations[0].seconds}
        runs = executed[name] or [(1.0, 0.0)]
        density, merged = (sum(column) / len(runs) for column in zip(*runs))
        result[name] = (Generation(torch.cat([g.videos for g in generations]), seconds, generations[0].forwards), density, merged)
    return result


def forward_seconds(pipe, model: ModelConfig, methods: dict, batch_size: int, repeats: int = 7) -> dict[str, dict[str, float]]:
    """Seconds of one forward of one clip, quantiles over interleaved repeats, averaged over the sampler's timesteps."""
    frames = (model.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    shape = (batch_size, pipe.transformer.config.in_channels, frames, *(side // pipe.vae_scale_factor_spatial for side in (model.height, model.width)))  # fmt: skip
    place = {"device": pipe.device, "dtype": pipe.transformer.dtype}
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**place)
    text = torch.randn(batch_size, model.max_sequence_length, pipe.transformer.config.text_dim, **place)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, checkpoint in methods.items():
            if checkpoint is not None:
                usv.enable(pipe, checkpoint)
            timesteps = [1000.0]
            if checkpoint is not None:
                student = pipe._usv.student
                timesteps = student.sampling.get("student_timesteps") or [
                    (low + high) / 2 for low, high in zip((0.0, *student.plan.edges), student.plan.edges)
                ]
            begun = now()
            with torch.no_grad():
                for timestep in timesteps:
                    pipe.transformer(latents, torch.full((batch_size,), timestep, device=pipe.device), text, return_dict=False)
            if repeat:
                times[name].append((now() - begun) / len(timesteps) / batch_size)
            usv.disable(pipe)
    return {
        name: {f"p{q}": float(torch.tensor(values).quantile(q / 100)) for q in (10, 50, 90)} for name, values in times.items()
    }


def evaluate(model: ModelConfig, checkpoints: dict[str, str], clips: int, batch_size: int, videos: Path | None = None) -> dict:
    """The report: machine, commit, and one row of quality, speed and executed sparsity for each method."""
    keep_freed_memory()
    pipe = load_pipeline(model.path, *best_place())
    methods = {"dense": None, **{name: opened(pipe, path) for name, path in checkpoints.items()}}
    prompts, subjects, motions = requests(clips)
    seeds = list(range(clips))
    real, real_subjects = real_clips(model, 240)
    prototypes, reference = build_prototypes(real, real_subjects), features(real)
    timing = forward_seconds(pipe, model, methods, batch_size)
    rows = {}
    generated = generate_all(pipe, model, methods, prompts, seeds, batch_size)
    for name, (generation, density, merged) in generated.items():
        student = methods[name]
        same = student is not None and not student.sampling.get("student_timesteps") and student.sampling["num_inference_steps"] == model.num_inference_steps
        twins = generated["dense"][0].videos if same else None
        quality = evaluate_videos(
            generation.videos, subjects, motions, reference if clips >= MIN_CLIPS else None, twins, prototypes=prototypes,
            intervals=clips >= 2 * MIN_CLIPS,
        )
        rows[name] = {
            "forwards": generation.forwards, "seconds_per_forward": timing[name], "attention_density": density, "merged": merged,
            "denoise_seconds": generation.seconds["denoise"] / clips, "decode_seconds": generation.seconds["decode"] / clips,
            "flops_ratio": _flops_ratio(pipe, model, methods[name]), **{k: finite(v) for k, v in quality.items()},
        }  # fmt: skip
    for row in rows.values():
        row["forward_speedup"] = rows["dense"]["seconds_per_forward"]["p50"] / row["seconds_per_forward"]["p50"]
        row["denoise_speedup"] = rows["dense"]["denoise_seconds"] / row["denoise_seconds"]
    if videos is not None:
        show(videos, prompts, {name: g.videos for name, (g, _, _) in generated.items()}, model.fps)
    return {"commit": commit(), "machine": machine(pipe.device), "clips": clips, "checkpoints": checkpoints, "methods": rows}


def finite(value: float) -> float | None:
    """Rounded for JSON, which has no infinity: the PSNR of equal videos is None."""
    return round(value, 5) if math.isfinite(value) else None


def machine(device: str | torch.device = "cpu") -> dict:
    """What a result ran on; device: where the pipeline is."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def _flops_ratio(pipe, model: ModelConfig, checkpoint) -> float:
    """FLOPs of the blocks, dense / student, from the cost model."""
    if checkpoint is None:
        return 1.0
    usv.enable(pipe, checkpoint)
    student = pipe._usv.student
    shape = ModelShape.of(student.model.config, model.max_sequence_length)
    side = pipe.vae_scale_factor_spatial
    frames = (model.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    grid = student.model.grid_of((frames, model.height // side, model.width // side))
    ratio = 1 / plan_cost(student.executed_plan(), shape, tile_layout(grid, student.model.tile))
    usv.disable(pipe)
    return ratio


def opened(pipe, path: str) -> Student:
    """The student of a folder, or for "FOLDER@1000,750" sampled at those timesteps instead of its own."""
    folder, _, steps = path.partition("@")
    student = load_student(folder, pipe.transformer)
    if not steps:
        return student
    if not student.sampling.get("student_timesteps"):
        raise CheckpointError(f"{path}: a student of the teacher's sampler has no timesteps to choose; drop @{steps}")
    try:
        timesteps = list(StudentScheduler([float(t) for t in steps.split(",")]).config.student_timesteps)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    student.sampling |= {"student_timesteps": timesteps, "num_inference_steps": len(timesteps)}
    return student


def show(folder: Path, prompts: list[str], videos: dict[str, torch.Tensor], fps: int, count: int = 6) -> None:
    """A contact sheet, side-by-side mp4s (dense | students) of the first prompts, and videos.json, which says what they are."""
    rows, entries = [], []
    for index in range(min(count, len(prompts))):
        beside = torch.cat([clips[index] for clips in videos.values()], dim=-1)
        rows.append((f"{' | '.join(videos)}: {prompts[index]}", beside))
        write_mp4(folder / f"{index:02d}.mp4", beside, fps, scale=magnified(beside.shape[-1] // len(videos), 2))
        entries.append({"file": f"{index:02d}.mp4", "prompt": prompts[index], "seed": index, "methods": list(videos)})
    contact_sheet(folder / "contact_sheet.png", rows, columns=max(2, 12 // len(videos)))
    write_text(folder / "videos.json", json.dumps(entries, indent=1) + "\n")


def table(report: dict) -> str:
    """The report as a table, one column a method."""
    lines = [("", "forwards", "s/forward", "speed-up", "density", "merged", "FLOPs ratio", "subject", "motion", "Fréchet", "denoise s", "denoise ×")]
    for name, r in report["methods"].items():
        lines.append((
            name, f"{r['forwards']}", f"{r['seconds_per_forward']['p50']:.4f}", f"{r['forward_speedup']:.2f}×",
            f"{r['attention_density']:.3f}", f"{r['merged']:.0%}", f"{r['flops_ratio']:.2f}×", f"{r['subject_accuracy']:.3f}",
            f"{r['motion_accuracy']:.3f}", f"{r.get('frechet_distance', float('nan')):.1f}", f"{r['denoise_seconds']:.2f}",
            f"{r['denoise_speedup']:.2f}×",
        ))  # fmt: skip
    return "\n".join("".join(f"{cell:>13}" for cell in row) for row in zip(*lines))


def markdown(report: dict) -> str:
    """The report as the README shows it: a row for each method, 95% intervals where they were computed."""
    lines = ["| method | forwards | s/forward | forward × | density | merged | subject | motion | Fréchet | denoising s | denoising × |"]
    lines.append("|---" * 11 + "|")
    for name, r in report["methods"].items():
        between = lambda key: f" ({r[key + '_low']:.2f}–{r[key + '_high']:.2f})" if key + "_low" in r else ""  # noqa: B023, E731
        lines.append(
            f"| {name} | {r['forwards']} | {r['seconds_per_forward']['p50']:.4f} | {r['forward_speedup']:.2f} | {r['attention_density']:.3f} "
            f"| {r['merged']:.0%} | {r['subject_accuracy']:.3f}{between('subject_accuracy')} "
            f"| {r['motion_accuracy']:.3f}{between('motion_accuracy')} | {r.get('frechet_distance', float('nan')):.0f} "
            f"| {r['denoise_seconds']:.2f} | {r['denoise_speedup']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", action="append", default=[], help="[name=]student folder[@timesteps]; repeat for several")
    parser.add_argument("--model", default=str(ROOT / "data" / "wan-mini"))
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--steps", type=int, default=None, help="sampling steps of the dense model")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--videos", type=Path, help="folder for side-by-side videos and a contact sheet")
    args = parser.parse_args()
    try:
        check(args)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    model = ModelConfig(path=args.model)
    if args.guidance is not None:
        model.guidance_scale = args.guidance
    if args.steps is not None:
        model.num_inference_steps = args.steps
    try:
        report = evaluate(model, named(args.ckpt), args.clips, args.batch_size, args.videos)
        report["command"] = "python -m usv.evaluate " + " ".join(sys.argv[1:])
        print(table(report))
        if args.out is not None:
            write_result(args.out, report)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
