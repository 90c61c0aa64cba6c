"""Peers side by side on Wan-mini: same prompts, same seeds, one run.

    python -m usv.peers --ckpt usv_mini=outputs/usv_mini/student --clips 32 --out data/results/peers.json
    python -m usv.peers --ckpt few=outputs/usv_few_step/student@1000,750 --only dense first_block_cache few
    torchrun --nproc_per_node 2 -m usv.peers --ckpt …        clips spread over processes

Compared: the dense model at 50, 20, 10 and 5 UniPC steps; the caches of diffusers (first block, MagCache, PAB, TaylorSeer,
SeaCache) and cache-dit; uniform token merging; SVG, SVG2, radial, sliding tile and tile top-k; one density everywhere on a
student's weights (VSA's setting); and students. A peer that is missing or fails has a row with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from usv.config import ModelConfig
from usv.cpu import keep_freed_memory
from usv.evaluation.arguments import check
from usv.evaluation.peers.methods import all_methods
from usv.evaluation.peers.run import compare
from usv.files import write_result
from usv.sampling.checkpoint import named

ROOT = Path(__file__).resolve().parents[3]
COLUMNS = (
    ("forwards", "forwards", "{:d}"), ("density", "attention_density", "{:.3f}"), ("merged", "merged", "{:.0%}"),
    ("subject", "subject_accuracy", "{:.3f}"), ("motion", "motion_accuracy", "{:.3f}"), ("Fréchet", "frechet_distance", "{:.0f}"),
    ("PSNR", "psnr", "{:.1f}"), ("SSIM", "ssim", "{:.3f}"), ("s/clip", "denoise_seconds", "{:.2f}"), ("×", "denoise_speedup", "{:.2f}"),
)  # fmt: skip


def table(report: dict) -> str:
    """The rows for a terminal; a method without figures says why."""
    lines = [f"{'method':24}" + "".join(f"{title:>10}" for title, *_ in COLUMNS)]
    for name, row in report["methods"].items():
        if "reason" in row:
            lines.append(f"{name:24}  {row['reason']}")
            continue
        cells = (form.format(row[key]) if row.get(key) is not None else "–" for _, key, form in COLUMNS)
        lines.append(f"{name:24}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """The rows as the README shows them, 95% intervals where they were computed; a method without figures says why."""
    lines = ["| | method | kind | s a clip | faster | density | merged | subject | motion | Fréchet | PSNR |", "|---" * 11 + "|"]
    for number, (name, row) in enumerate(report["methods"].items(), 1):
        if "reason" in row:
            lines.append(f"| {number} | {name} | {row['family']} | {row['reason']} |" + " |" * 7)
            continue
        psnr = "–" if row.get("psnr") is None else f"{row['psnr']:.1f}"
        frechet = "–" if row.get("frechet_distance") is None else f"{row['frechet_distance']:.0f}"
        accuracies = " | ".join(
            f"{row[key]:.3f}" + (f" ({row[key + '_low']:.2f}–{row[key + '_high']:.2f})" if key + "_low" in row else "")
            for key in ("subject_accuracy", "motion_accuracy")
        )
        lines.append(
            f"| {number} | {name} | {row['family']} | {row['denoise_seconds']:.3f} | {row['denoise_speedup']:.1f}× | {row['attention_density']:.3f} "
            f"| {row['merged']:.0%} | {accuracies} | {frechet} | {psnr} |"
        )
    return "\n".join(lines)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m usv.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--ckpt", action="append", default=[], help="[name=]student folder[@timesteps]; repeat for several")
    parser.add_argument("--model", default=str(ROOT / "data" / "wan-mini"))
    parser.add_argument("--clips", type=int, default=32, help="from 16 on there is a Fréchet distance, from 32 on intervals")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50, help="of the dense model and of all that approximate it")
    parser.add_argument("--density", type=float, default=0.25, help="of the patterns' sparse calls")
    parser.add_argument("--fixed-density", type=float, default=0.125, help="of the uniform plan on a student's weights")
    parser.add_argument("--only", nargs="+", help="names of methods; dense always runs")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--videos", type=Path, help="folder for mp4s of the first prompts, and videos.json about them")
    args = parser.parse_args(words)
    for name in ("clips", "batch_size", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, accepted: at least 1")
    for name in ("density", "fixed_density"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, accepted: a fraction in (0, 1)")
    return args


def main(words: list[str] | None = None, model: ModelConfig | None = None) -> dict | None:
    """The command; `model` gives another shape than Wan-mini's."""
    args = parse(words)
    model = model or ModelConfig()
    model.path, model.num_inference_steps = args.model, args.steps
    keep_freed_memory()
    try:
        check(args)
        methods = all_methods(model, named(args.ckpt), args.density, args.fixed_density)
        names = [method.name for method in methods]
        if unknown := sorted(set(args.only or ()) - set(names)):
            raise ValueError(f"--only: got {unknown[0]!r}, accepted: {', '.join(names)}")
        if len(set(names)) < len(names):
            raise ValueError("--ckpt: got the name of another method, accepted: a name of its own, as in mine=FOLDER")
        methods = [method for method in methods if not args.only or method.name in {"dense", *args.only}]
        report = compare(model, methods, args.clips, args.batch_size, args.videos)
        if report is None:  # of several processes the first speaks
            return None
        report = {"command": "python -m usv.peers " + " ".join(sys.argv[1:] if words is None else words), **report}
        print(table(report))
        if args.out is not None:
            write_result(args.out, report, ensure_ascii=False)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    return report
