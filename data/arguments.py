"""What data/prepare.py and data/generate.py share of their command lines."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from encoder import model_defaults
from shards import place

MOST_FPS = 1000.0  # frames a second that may be asked for


def add_common(parser: argparse.ArgumentParser) -> None:
    """Model, folder, sizes, splits, and how the work is shared."""
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder of a Wan-format model")
    parser.add_argument("--out", required=True, help="folder for the shards, or the URL of one in a store that fsspec reaches, e.g. s3://bucket/mine")
    for name in ("height", "width", "num-frames", "max-sequence-length"):
        parser.add_argument(f"--{name}", type=int, help="default: usv.json of the model, else Wan's 480 x 832 x 81, 512")
    parser.add_argument("--fps", type=float, help="frames a second that clips have; default 8 for Wan-mini, 16 for Wan")
    parser.add_argument("--seed", type=int, default=0, help="of clips that are made, and of the split")
    parser.add_argument("--split", nargs="*", default=[], metavar="NAME=SHARE", help="e.g. val=0.05; the rest is train")
    parser.add_argument("--shard-size", type=int, default=64, help="clips a shard")
    parser.add_argument("--workers", type=int, help="processes, each with the model; default 1, with --engine ray one a GPU or core of the cluster")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (then with one worker, or --engine ray)")
    parser.add_argument("--engine", default="local", choices=["local", "ray"], help="where the workers are; either writes the same bytes")
    parser.add_argument("--address", help="with --engine ray: of a cluster that is running, e.g. auto; none: one is started here")
    parser.add_argument("--text-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--append", action="store_true", help="add what is new to what stands in --out")
    parser.add_argument("--overwrite", action="store_true", help="delete the shards in --out and begin again")


def common(parser: argparse.ArgumentParser, args: dict, counts: tuple[str, ...] = ()) -> dict:
    """The arguments, checked, with the model's defaults and `split` as shares by name. counts: further ones that are above 0."""
    if args["address"] is not None and args["engine"] != "ray":
        parser.error(f"--address {args['address']}: is for --engine ray")
    for name in (*counts, "shard_size", "workers", "fps", "max_sequence_length"):
        if args[name] is not None and not 0 < args[name] < math.inf:
            parser.error(f"--{name.replace('_', '-')} {args[name]}: a number above 0 is accepted")
    if args["fps"] is not None and args["fps"] > MOST_FPS:
        parser.error(f"--fps {args['fps']:g}: above 0 and up to {MOST_FPS:g} is accepted")
    try:
        args["out"] = place(args["out"])
    except ValueError as error:
        parser.error(f"--out {error}")
    args["workers"] = args["workers"] or (0 if args["engine"] == "ray" else 1)
    defaults = model_defaults(args["model"])
    given = {name: value if value is not None else defaults.get(name) for name, value in args.items()}
    return given | {"split": _shares(parser, args["split"])}


def _shares(parser: argparse.ArgumentParser, parts: list[str]) -> dict[str, float]:
    split = {}
    for part in parts:
        name, _, share = part.partition("=")
        try:
            split[name] = float(share)
        except ValueError:
            split[name] = -1.0
        if not name.isidentifier() or name == "train" or not 0 < split[name] < 1:
            parser.error(f"--split {part}: NAME=SHARE is accepted, NAME not train, SHARE between 0 and 1, e.g. val=0.05")
    if sum(split.values()) >= 1:
        parser.error(f"--split {split}: the shares leave nothing for train")
    return split
