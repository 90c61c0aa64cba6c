"""Quality and speed of students against the dense model, at the same prompts and seeds, in one process.

    python -m usv.evaluate --ckpt outputs/usv_mini/student --clips 120 --out data/results/usv_mini.json
    python -m usv.evaluate --ckpt three=outputs/usv_few_step/student --ckpt two=outputs/usv_few_step/student@1000,750
    python -m usv.evaluate --ckpt data/students/usv_few_step --dense 1 2 4 8 16 --lookup    # beside what a sceptic names
    python -m usv.evaluate --ckpt data/students/usv_few_step --decoder tiny                  # end to end: each student also with a tiny decoder
    python -m usv.evaluate --engine ray --workers 4 --ckpt data/students/usv_mini            # by several processes, of several machines with --address
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
from pathlib import Path

import torch

import usv
from usv.config import ModelConfig, SettingError
from usv.cpu import keep_freed_memory, processor
from usv.evaluation.arguments import check
from usv.evaluation.calibrate import calibration
from usv.evaluation.calibrate import table as calibration_table
from usv.evaluation.clips import FLOOR_SEED, LOOKUP_CLIPS, REAL_CLIPS, asked_clips, real_clips, requests
from usv.evaluation.judge import finite, judge, table
from usv.evaluation.methods import Decoded, Dense, forward_seconds, generate_all
from usv.evaluation.on_ray import on_ray
from usv.evaluation.own import Own, ask, model_of, real_features, sized
from usv.evaluation.worlds import ROOT, world_of
from usv.files import write_result, write_text
from usv.metrics import features, frechet_distance
from usv.metrics.frechet import MIN_CLIPS
from usv.sampling.checkpoint import CheckpointError, Student, load_student, named
from usv.sampling.decoder import load_decoder
from usv.sampling.generate import best_place, latent_size, load_pipeline
from usv.sampling.ranks import Crew, join
from usv.sampling.sampler import StudentScheduler
from usv.sparse.cost import ModelShape, plan_cost
from usv.sparse.grid import tile_layout
from usv.training.run import commit
from usv.video import contact_sheet, magnified, write_mp4


def evaluate(
    model: ModelConfig, checkpoints: dict[str, str], clips: int, batch_size: int, videos: Path | None = None,
    dense: dict[str, Dense] | None = None, lookup: bool = False, own: Own | None = None, decoder: str = "full",
) -> dict | None:
    """The report: machine, commit, and one row of quality, speed and executed sparsity for each method.

    dense: further dense rows by name. lookup: a row of no model at all, the mean of ten real clips of the caption. own: a
    user's prompts and shards instead of CameraMotion's; `clips` is then the number of its prompts. decoder: full, or one
    (`load_decoder`) with which each student gets a second row. Of several processes (torchrun) the first has the report, the others None.
    """
    keep_freed_memory()
    crew = join()
    try:
        return compare(model, checkpoints, clips, batch_size, videos, dense, lookup, own, decoder, crew)
    finally:
        crew.leave()


def compare(model, checkpoints, clips, batch_size, videos, dense, lookup, own, decoder, crew: Crew) -> dict | None:
    """`evaluate` on this process among others; the report on the first."""
    pipe = load_pipeline(model.path, *best_place())
    students, tiny = {name: opened(pipe, path) for name, path in checkpoints.items()}, load_decoder(decoder, model.path, pipe)
    decoded = {f"{name}+{Path(decoder).name}": Decoded(student, tiny) for name, student in students.items()} if tiny is not None else {}
    methods = {"dense": Dense(), **(dense or {}), **students, **decoded}
    subjects = motions = prototypes = None
    if own is not None:
        prompts = own.prompts
        reference, real = real_features(pipe, own, model)
    else:
        prompts, subjects, motions, labels = requests(model, clips)
        pictures, real_subjects = real_clips(model, REAL_CLIPS)
        prototypes, reference = world_of(model).teller(pictures, real_subjects), features(pictures)
    timing = forward_seconds(pipe, model, {name: method for name, method in methods.items() if name not in decoded}, batch_size)
    timing |= {name: timing[name.rpartition("+")[0]] for name in decoded}  # the same forwards
    generated = generate_all(pipe, model, methods, prompts, list(range(clips)), batch_size, crew)
    if generated is None:
        return None
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
        rows["lookup"], shown["lookup"] = {}, asked_clips(model, labels, FLOOR_SEED, LOOKUP_CLIPS)
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
        floor = asked_clips(model, labels, FLOOR_SEED)
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
    grid = student.model.grid_of(latent_size(pipe, model))
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
    for option in ("workers", "address"):
        if args.engine != "ray" and getattr(args, option) is not None:
            raise SettingError(f"--{option}: got {getattr(args, option)} with --engine {args.engine}, accepted: with --engine ray")
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
    parser.add_argument("--engine", default="local", choices=["local", "ray"], help="where the clips are made; ray: by as many workers as there are GPUs or cores (usv[ray])")
    parser.add_argument("--workers", type=int, help="with --engine ray: at most so many")
    parser.add_argument("--address", help="with --engine ray: of a cluster that is running, e.g. auto; none: one is started here")
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
            asked_for = model, named(args.ckpt), clips, args.batch_size, args.videos, dense, args.lookup, own, args.decoder
            report = on_ray(evaluate, asked_for, clips, args.batch_size, args.workers, args.address) if args.engine == "ray" else evaluate(*asked_for)
            if report is None:
                return
            shown = table(report)
        report["command"] = "python -m usv.evaluate " + " ".join(sys.argv[1:])
        print(shown)
        if args.out is not None:
            write_result(args.out, report)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
