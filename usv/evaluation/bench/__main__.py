"""python -m usv.bench: see `usv.bench`. Each subcommand's --help says what it measures."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch

from usv.config import ModelConfig, SettingError
from usv.cpu import keep_freed_memory
from usv.evaluation.arguments import check
from usv.evaluation.bench import block, costs, denoise, forward, memory, training
from usv.evaluation.bench.measure import write
from usv.evaluation.bench.sides import pipeline_sides
from usv.sampling.checkpoint import named

ROOT = Path(__file__).resolve().parents[3]


def model_config(args) -> ModelConfig:
    """ModelConfig with what the command line sets."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    return ModelConfig(path=args.model, **{k: v for k, v in vars(args).items() if k in fields and v is not None})


def size_of(text: str) -> tuple[int, int, int]:
    """HEIGHTxWIDTHxFRAMES. SettingError."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise SettingError(f"--size: got {text!r}, accepted: HEIGHTxWIDTHxFRAMES, e.g. 480x832x81")
    return tuple(map(int, parts))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, repeats: int, model: bool = True, plans: bool = True):
        sub = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("--out", type=Path, help="JSON to write")
        sub.add_argument("--repeats", type=int, default=repeats, help="repetitions after the warm-up")
        if model:
            sub.add_argument("--model", default=str(ROOT / "data" / "wan-mini"), help="diffusers Wan folder")
            sub.add_argument("--ckpt", action="append", default=[], help="[name=]student folder; repeat for several")
            for name in ("height", "width", "num_frames", "max_sequence_length"):
                sub.add_argument("--" + name.replace("_", "-"), type=int, help="default: ModelConfig's")
            sub.add_argument("--tile", type=int, nargs=3, help="tokens of a tile along t, h, w; default: ModelConfig's")
        if plans:
            sub.add_argument("--density", type=float, nargs="*", default=[], help="uniform plans on the model itself")
            sub.add_argument(
                "--merge", type=float, nargs="*", default=[0.0], help="merged fractions, each with each density"
            )
        return sub

    sub = command("forward", "seconds of one forward, by timestep", 9)
    sub.add_argument("--batch-size", type=int, default=1)
    sub = command("denoise", "seconds of a whole denoising run, dense against students", 3, plans=False)
    sub.add_argument("--batch-size", type=int, default=1)
    sub.add_argument("--num-inference-steps", type=int, help="of the dense teacher; default: ModelConfig's")
    sub.add_argument("--guidance-scale", type=float, help="of the dense teacher; default: ModelConfig's")
    sub = command("train", "seconds and peak memory of a training step, sparse against dense student", 5)
    sub.add_argument("--batch-size", type=int, default=6)
    sub = command("memory", "peak memory of a forward, dense against plans", 3)
    sub.add_argument("--batch-size", type=int, default=1)
    sub = command("costs", "seconds of every rung on this device, for policy.cost= and usv.enable(speedup=, costs=)", 30, plans=False)
    sub.add_argument("--size", help="HEIGHTxWIDTHxFRAMES of the videos, e.g. 480x832x81; default: ModelConfig's")
    sub.add_argument("--seconds", type=float, default=90.0, help="begin no round that would end later")
    sub.add_argument("--batch-size", type=int, default=1)
    sub.add_argument("--check", type=int, default=0, help="also run so many random plans, and say how well the file predicts their seconds")
    sub.add_argument("--clock", choices=costs.CLOCKS, default="wall", help="cpu: of this process, beside others; takes --threads 1")
    sub = command("wan-1.3b", block.__doc__.splitlines()[0], 5, model=False, plans=False)
    sub.add_argument("--grid", type=int, nargs=3, default=block.GRID, help="tokens along t, h, w")
    sub.add_argument("--minutes", type=float, default=6.0, help="begin no repetition that would end later")
    sub.add_argument("--plan", nargs="*", default=block.PLANS, help="density or density+merged")
    sub.add_argument("--layers", type=int, help="default: 1 block on a CPU, the model's 30 on a GPU")
    return top


def run(args) -> tuple[dict, str]:
    """The report of a subcommand and its table."""
    if args.command == "wan-1.3b":
        report = block.bench(tuple(args.grid), args.plan, args.minutes, args.repeats, args.layers)
        return report, block.table(report)
    if getattr(args, "size", None):
        args.height, args.width, args.num_frames = size_of(args.size)
    model = model_config(args)
    checkpoints = named(args.ckpt)
    if args.command == "memory":
        report = memory.bench(model, checkpoints, args.density, args.merge, args.batch_size, args.repeats)
        return report, memory.table(report)
    pipe = memory.pipeline(model.path, args.command)
    if args.command == "denoise":
        report = denoise.bench(pipe, model, checkpoints, args.batch_size, args.repeats)
        return report, denoise.table(report)
    if args.command == "costs":
        sides, inputs = pipeline_sides(pipe, model, {}, [], [], args.batch_size)
        report = costs.bench(sides[0].model, inputs, (model.height, model.width, model.num_frames), args.seconds, args.repeats, args.clock, args.check)
        return report, costs.table(report)
    sides, inputs = pipeline_sides(pipe, model, checkpoints, args.density, args.merge, args.batch_size)
    if args.command == "train":
        specs = memory.specs("train", model, checkpoints, args.density, args.merge, args.batch_size)
        peaks = [partial(memory.in_fresh_process, spec) for spec in specs]
        report = training.bench(sides, inputs, model, peaks, args.repeats)
        return report, training.table(report)
    report = forward.bench(sides, inputs, args.repeats)
    return report, forward.table(report)


def main() -> None:
    args = parser().parse_args()
    keep_freed_memory()
    try:
        check(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        report, text = run(args)
        print(text)
        write(report, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
