"""Turn prompts into shards of clips that the dense model makes itself: its latents at the end of its own sampler, and the text embeddings.

    python data/generate.py --prompts data/prompts/camera_motion.txt --clips 8 --model data/wan-mini --out data/shards/taught --split val=0.02
    python data/generate.py --prompts my_prompts.txt --model wan-1.3b --out data/shards/taught --split val=0.02 --device cuda --text-dtype bfloat16 --engine ray

Nothing is decoded: training wants latents. Plan, names, resuming, --append (prompts that are new), workers and Ray are those of
data/prepare.py: a clip's noise is of its number in the plan, so the same command writes the same bytes in any number of runs and by
any number of workers, on one kind of machine. What few-step students are trained on is then the teacher's own distribution, at its guidance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from arguments import add_common, common  # noqa: E402
from encoder import read_json  # noqa: E402
from prepare import perform  # noqa: E402
from shard_plan import Settings, Teacher  # noqa: E402

from usv.sampling.generate import prompts_of  # noqa: E402

# of Wan2.1-T2V-1.3B, as its model card advises; a folder with usv.json has Wan-mini's (usv.config.ModelConfig)
WAN = {"num_inference_steps": 50, "guidance_scale": 6.0, "flow_shift": 8.0}
MINI = {"num_inference_steps": 50, "guidance_scale": 3.0, "flow_shift": 3.0}
MOST_STEPS, MOST_SCALE = 1000, 1000.0


def parse(argv: list[str] | None = None) -> tuple[Settings, dict[str, bool]]:
    """Command line -> settings and how to run: overwrite, append. SettingError for a file of prompts that is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line; each is taken once")
    parser.add_argument("--clips", type=int, default=1, help="of each prompt, from noise of their own")
    parser.add_argument("--num-inference-steps", type=int, help="of the sampler; default 50")
    parser.add_argument("--guidance-scale", type=float, help="default 6 (Wan2.1-1.3B), 3 for Wan-mini; 1 is none")
    parser.add_argument("--flow-shift", type=float, help="default 8 (Wan2.1-1.3B), 3 for Wan-mini")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the transformer; default bfloat16 on cuda, else float32")
    parser.add_argument("--batch-size", type=int, default=1, help="clips denoised together")
    add_common(parser)
    args = vars(parser.parse_args(argv))
    how = {name: args.pop(name) for name in ("overwrite", "append")}
    if all(how.values()):
        parser.error("--overwrite and --append exclude each other")
    counts = ("clips", "num_inference_steps", "guidance_scale", "flow_shift", "batch_size")
    args = common(parser, args, counts)
    for name, most in (("num_inference_steps", MOST_STEPS), ("guidance_scale", MOST_SCALE), ("flow_shift", MOST_SCALE)):
        if args[name] is not None and args[name] > most:
            parser.error(f"--{name.replace('_', '-')} {args[name]:g}: at most {most:g} is accepted")
    own = read_json(args["model"] / "usv.json")
    stated = {**MINI, **{name: own[name] for name in MINI if name in own}} if own else WAN
    numbers = {name: args.pop(name) or stated[name] for name in WAN}
    dtype = args.pop("dtype") or ("bfloat16" if args["device"].startswith("cuda") else "float32")
    prompts = tuple(dict.fromkeys(prompts_of(args.pop("prompts"), "--prompts ")))
    return Settings(**{name: args[name] for name in args if name not in ("clips", "batch_size")},
                    teacher=Teacher(prompts, args["clips"], dtype=dtype, batch_size=args["batch_size"], **numbers)), how  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    try:
        settings, how = parse(argv)
    except ValueError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return perform(settings, "generate", **how)


if __name__ == "__main__":
    sys.exit(main())
