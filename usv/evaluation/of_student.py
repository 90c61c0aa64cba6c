"""What the commands that measure one student on held-out clips share: the words they take, the student on its model, the JSON they write."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from usv.config import ModelConfig
from usv.cpu import keep_freed_memory
from usv.evaluation.arguments import check
from usv.evaluation.evaluate import machine
from usv.files import write_result
from usv.sampling.checkpoint import Student, load_student
from usv.sampling.generate import load_pipeline
from usv.training.run import commit


def words(description: str, ckpt: str = "student folder", data: str = "shards; their split val is used", out: str = "JSON to write") -> argparse.ArgumentParser:
    """A parser of --ckpt, --model, --data and --out; the texts are their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help=ckpt)
    parser.add_argument("--model", default="data/wan-mini")
    parser.add_argument("--data", default="data/shards/camera", help=data)
    parser.add_argument("--out", type=Path, help=out)
    return parser


def opened(args: argparse.Namespace) -> tuple:
    """The pipeline and the student of checked arguments. SettingError, CheckpointError, OSError."""
    keep_freed_memory()
    check(args)
    pipe = load_pipeline(args.model)
    return pipe, load_student(args.ckpt, pipe.transformer)


def settings_of(model: str, student: Student) -> ModelConfig:
    """A model as the student was trained on it."""
    s = student.sampling
    return ModelConfig(model, flow_shift=s["flow_shift"], guidance_scale=s["guidance_folded_in"], max_sequence_length=s["max_sequence_length"])


def keep(out: Path | None, program: str, report: dict) -> None:
    """Write a report with commit, command and machine where an --out was given; what hinders it ends the program with a line."""
    if out is None:
        return
    try:
        write_result(out, {"commit": commit(), "command": f"python -m usv.{program} " + " ".join(sys.argv[1:]), "machine": machine(), **report}, indent=None)
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")
