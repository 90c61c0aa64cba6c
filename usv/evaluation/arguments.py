"""What the commands share about their arguments: the range of every number, and outputs that are proved before hours of work."""

from __future__ import annotations

import argparse
from pathlib import Path

from usv.bounds import MOST_TILE, Range
from usv.config import SettingError
from usv.files import check_folder, check_output

COUNT, SOME, SHARE, BETWEEN = Range(1, 1_000_000), Range(1, 1000), Range(0, 1), Range(0, 1, above=True, below=True)
RANGES = {
    "clips": COUNT, "batch_size": COUNT, "repeats": COUNT, "seeds": COUNT, "jobs": SOME, "workers": SOME, "threads": Range(1, 65_536), "minutes": Range(0, 1e6, above=True),
    "steps": Range(1, 1_000_000), "num_inference_steps": SOME, "guidance": Range(0, 1000), "guidance_scale": Range(0, 1000), "flow_shift": Range(0, 1000, above=True), "height": Range(1, 16_384),
    "width": Range(1, 16_384), "num_frames": Range(1, 100_000), "max_sequence_length": Range(1, 65_536), "tile": Range(1, MOST_TILE), "grid": Range(1, 4096),
    "layers": SOME, "density": Range(0, 1, above=True), "fixed_density": BETWEEN, "densities": BETWEEN, "merge": Range(0, 1, below=True),
    "merge_layers": Range(0, 1000), "most_density": Range(0, 1, above=True), "dense_layers": SHARE, "dense_steps": SHARE, "clusters": Range(1, 65_536),
    "recall_rows": COUNT, "calibration_clips": COUNT, "dense": SOME, "seconds": Range(0, 1e6), "budget": Range(0, 1, above=True), "budgets": Range(0, 1, above=True), "cells": COUNT, "check": Range(0, 1000), "port": Range(0, 65_535),
}  # fmt: skip


def check(args: argparse.Namespace, videos: bool = True) -> None:
    """SettingError for a number out of its range, FileError for an --out or a --videos folder that cannot be written.

    videos: whether --videos is written, not read.
    """
    for name, value in vars(args).items():
        numbers = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int | float) and not isinstance(v, bool)]
        for number in numbers:
            if name not in RANGES or not RANGES[name].holds(number):
                raise SettingError(f"--{name.replace('_', '-')}: got {number}, accepted: {RANGES.get(name, 'no number')}")
    out: Path | None = getattr(args, "out", None)
    check_output(out)
    if videos and getattr(args, "videos", None) is not None:
        check_folder(args.videos, "--videos")
