"""Quality and speed of students against the dense model, at the same prompts and seeds, in one process.

    python -m usv.evaluate --ckpt outputs/usv_mini/student --clips 120 --out data/results/usv_mini.json
    python -m usv.evaluate --ckpt three=outputs/usv_few_step/student --ckpt two=outputs/usv_few_step/student@1000,750
    python -m usv.evaluate --ckpt data/students/usv_few_step --dense 1 2 4 8 16 --lookup    # beside what a sceptic names
    python -m usv.evaluate --ckpt data/students/usv_few_step --decoder tiny                  # end to end: each student also with a tiny decoder
    python -m usv.evaluate --calibrate                                                       # are the metrics worth their names
    python -m usv.evaluate --shards data/shards/mine --prompts mine.txt --ckpt outputs/mine/student      # your own clips

Prompts are CameraMotion captions, every subject with every motion in turn; or with --prompts and --shards your own, judged
without labels (usv/evaluation/own.py). Batches of the methods are interleaved, so that a
noisy machine hurts all alike. Quality: subject and motion accuracy against the prompt, Fréchet distance to real clips,
consistency, flicker, warp error, with 95% intervals where there are enough clips; and of students that take the teacher's steps
how near each video comes to its dense twin (PSNR, SSIM, perceptual distance). Prompts and seeds are pairs: whether a method is of
the dense model's quality is `usv.metrics.non_inferior`'s answer, and each clip's values stay in the JSON (`values`).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import usv
from usv.config import ModelConfig, SettingError
from usv.cpu import keep_freed_memory, processor
from usv.evaluation.arguments import check
from usv.evaluation.calibrate import calibration
from usv.evaluation.calibrate import table as calibration_table
from usv.evaluation.clips import FLOOR_SEED, LOOKUP_CLIPS, REAL_CLIPS, ROOT, asked_clips, real_clips, requests
from usv.evaluation.judge import finite, judge, table
from usv.evaluation.own import Own, ask, model_of, real_features, sized
from usv.files import write_result, write_text
from usv.metrics import build_prototypes, features, frechet_distance
from usv.metrics.frechet import MIN_CLIPS
from usv.sampling.checkpoint import CheckpointError, Student, load_student, named
from usv.sampling.decoder import TinyDecoder, load_decoder
from usv.sampling.generate import Generation, best_place, generate, load_pipeline, now
from usv.sampling.sampler import StudentScheduler
from usv.sparse.cost import ModelShape, plan_cost
from usv.sparse.grid import tile_layout
from usv.training.run import commit
from usv.video import contact_sheet, magnified, write_mp4


@dataclass(frozen=True)
class Dense:
    """The dense model at `steps` and `guidance`; None: its own."""

    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Decoded:
    """A student whose latents are decoded by another decoder than the VAE's."""

    student: Student
    decoder: TinyDecoder


def generate_all(pipe, model: ModelConfig, methods: dict, prompts: list[str], seeds: list[int], batch_size: int) -> dict:
    """{name: Generation} with batches of all methods interleaved. `methods`: name -> student, `Decoded` or `Dense`."""
    parts: dict[str, list[Generation]] = {name: [] for name in methods}
    executed: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    with tqdm(total=len(prompts) * len(methods), unit="video") as bar:
        for start in range(0, len(prompts), batch_size):
            for name, checkpoint in methods.items():
                bar.set_description(name)
                sparse, guidance, decoder = not isinstance(checkpoint, Dense), None, None
                if sparse:
                    if isinstance(checkpoint, Decoded):
                        checkpoint, decoder = checkpoint.student, checkpoint.decoder
                    usv.enable(pipe, checkpoint)
                    steps = pipe._usv.student.sampling["num_inference_steps"]
                else:
                    steps, guidance = checkpoint.steps, checkpoint.guidance
                part = slice(start, start + batch_size)
                parts[name].append(generate(pipe, model, prompts[part], seeds[part], batch_size, steps, guidance, progress=bar, decoder=decoder))
                if sparse:
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
    dense = [name for name, method in methods.items() if isinstance(method, Dense)]
    methods = {name: method for name, method in methods.items() if name not in dense[1:]}  # one dense forward is like another
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, checkpoint in methods.items():
            sparse = not isinstance(checkpoint, Dense)
            if sparse:
                usv.enable(pipe, checkpoint)
            timesteps = [1000.0]
            if sparse:
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
    found = {name: {f"p{q}": float(torch.tensor(values).quantile(q / 100)) for q in (10, 50, 90)} for name, values in times.items()}
    return found | {name: found[dense[0]] for name in dense[1:]}


def evaluate(
    model: ModelConfig, checkpoints: dict[str, str], clips: int, batch_size: int, videos: Path | None = None,
    dense: dict[str, Dense] | None = None, lookup: bool = False, own: Own | None = None, decoder: str = "full",
) -> dict:
    """The report: machine, commit, and one row of quality, speed and executed sparsity for each method.

    dense: further dense rows by name. lookup: a row of no model at all, the mean of ten real clips of the caption. own: a
    user's prompts and shards instead of CameraMotion's; `clips` is then the number of its prompts. decoder: full, or one (`load_decoder`) with which each student gets a
    second row.
    """
    keep_freed_memory()
    pipe = load_pipeline(model.path, *best_place())
    students, tiny = {name: opened(pipe, path) for name, path in checkpoints.items()}, load_decoder(decoder, model.path, pipe)
    decoded = {f"{name}+{Path(decoder).name}": Decoded(student, tiny) for name, student in students.items()} if tiny is not None else {}
    methods = {"dense": Dense(), **(dense or {}), **students, **decoded}
    subjects = motions = prototypes = None
    if own is not None:
        prompts = own.prompts
        reference, real = real_features(pipe, own, model)
    else:
        prompts, subjects, motions = requests(clips)
        pictures, real_subjects = real_clips(model, REAL_CLIPS)
        prototypes, reference = build_prototypes(pictures, real_subjects), features(pictures)
    timing = forward_seconds(pipe, model, {name: method for name, method in methods.items() if name not in decoded}, batch_size)
    timing |= {name: timing[name.rpartition("+")[0]] for name in decoded}  # the same forwards
    generated = generate_all(pipe, model, methods, prompts, list(range(clips)), batch_size)
    rows = {}
    for name, (generation, density, merged) in generated.items():
        rows[name] = {
            "forwards": generation.forwards, "seconds_per_forward": timing[name], "attention_density": density, "merged": merged,
            **{f"{stage}_seconds": seconds / clips for stage, seconds in generation.seconds.items()},
            "total_seconds": sum(generation.seconds.values()) / clips, "flops_ratio": _flops_ratio(pipe, model, methods[name]),
        }  # fmt: skip
    for row in rows.values():
        row["forward_speedup"] = rows["dense"]["seconds_per_forward"]["p50"] / row["seconds_per_forward"]["p50"]
        for stage in ("denoise", "total"):
            row[f"{stage}_speedup"] = rows["dense"][f"{stage}_seconds"] / row[f"{stage}_seconds"]
    shown = {name: g.videos for name, (g, _, _) in generated.items()}
    if lookup:
        rows["lookup"], shown["lookup"] = {}, asked_clips(model, subjects, motions, FLOOR_SEED, LOOKUP_CLIPS)
    twins = [name for name, method in methods.items() if isinstance(method, Student) and _takes_teachers_steps(method, model)]
    quality = judge(shown, twins, subjects, motions, prototypes, reference, pipe.vae_scale_factor_spatial, prompts)
    for name, found in quality.items():
        rows[name] |= found
    if videos is not None:
        show(videos, prompts, shown, model.fps)
    report = {"commit": commit(), "machine": machine(pipe.device), "clips": clips, "checkpoints": checkpoints, "methods": rows}
    if own is not None:
        floor = real.pop("floor", None)
        report |= {"real": real} | ({} if floor is None else {"floor": {"frechet_distance": finite(frechet_distance(reference, floor))}})
    elif clips >= MIN_CLIPS:
        floor = asked_clips(model, subjects, motions, FLOOR_SEED)
        report["floor"] = {"frechet_distance": finite(frechet_distance(reference, features(floor)))}
    return report


def _takes_teachers_steps(student: Student, model: ModelConfig) -> bool:
    """Whether a student's videos are to be those of the dense model, one by one."""
    return not student.sampling.get("student_timesteps") and student.sampling["num_inference_steps"] == model.num_inference_steps


def machine(device: str | torch.device = "cpu") -> dict:
    """What a result ran on; device: where the pipeline is."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def _flops_ratio(pipe, model: ModelConfig, checkpoint) -> float:
    """FLOPs of the blocks, dense / student, from the cost model."""
    if isinstance(checkpoint, Dense):
        return 1.0
    usv.enable(pipe, checkpoint.student if isinstance(checkpoint, Decoded) else checkpoint)
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


def asked(args: argparse.Namespace) -> tuple[Own | None, ModelConfig]:
    """A user's own prompts, if they are meant, and the model at its size. SettingError for what does not go together."""
    model = model_of(args.model)
    if args.prompts is None and args.shards is None:
        if args.split != "val":
            raise SettingError(f"--split: got {args.split} without --shards FOLDER, whose split it names")
        return None, model
    for option in ("lookup", "calibrate"):
        if getattr(args, option):
            raise SettingError(f"--{option}: got it with --{'prompts' if args.prompts else 'shards'}, accepted: with CameraMotion's prompts alone, whose labels it needs")
    return ask(args.prompts, args.shards, args.split, args.clips, model.path), sized(model, args.shards, named(args.ckpt))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", action="append", default=[], help="[name=]student folder[@timesteps]; repeat for several")
    parser.add_argument("--model", default=str(ROOT / "data" / "wan-mini"), help="folder or hub id, or a name of conf/model, e.g. wan_1_3b")
    parser.add_argument("--clips", type=int, help="default 120; with --prompts or --shards each prompt once")
    parser.add_argument("--prompts", type=Path, help="your own prompts, one a line; clips are then judged without labels")
    parser.add_argument("--shards", help="your own shards (data/prepare.py): real clips to hold the videos against, and prompts where none are given")
    parser.add_argument("--split", default="val", help="which split of --shards is held out from training")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--flow-shift", type=float, default=None, help="of the dense model's sampler; Wan2.1-1.3B: 8")
    parser.add_argument("--steps", type=int, default=None, help="sampling steps of the dense model")
    parser.add_argument("--dense", type=int, nargs="*", default=[], metavar="N", help="the dense model at N steps as further rows")
    parser.add_argument("--unguided", action="store_true", help="with --dense: each also without guidance")
    parser.add_argument("--decoder", default="full", help="full, or tiny or a folder of usv.decoder: each student also with it")
    parser.add_argument("--lookup", action="store_true", help="a row of no model: the mean of ten real clips of the caption")
    parser.add_argument("--calibrate", action="store_true", help="no model: which known damage does each metric see")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--videos", type=Path, help="folder for side-by-side videos and a contact sheet")
    args = parser.parse_args()
    try:
        check(args)
        own, model = asked(args)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    clips = len(own.prompts) if own else args.clips or 120
    if args.guidance is not None:
        model.guidance_scale = args.guidance
    if args.flow_shift is not None:
        model.flow_shift = args.flow_shift
    if args.steps is not None:
        model.num_inference_steps = args.steps
    dense = {f"dense_{n}{'_unguided' if scale else ''}": Dense(n, scale) for n in args.dense for scale in (None, *([1.0] if args.unguided else []))}
    try:
        if args.calibrate:
            report = {"commit": commit(), "machine": machine(), **calibration(model, clips)}
            shown = calibration_table(report)
        else:
            report = evaluate(model, named(args.ckpt), clips, args.batch_size, args.videos, dense, args.lookup, own, args.decoder)
            shown = table(report)
        report["command"] = "python -m usv.evaluate " + " ".join(sys.argv[1:])
        print(shown)
        if args.out is not None:
            write_result(args.out, report)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
