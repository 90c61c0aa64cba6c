"""Clips a second of several workers of --engine ray against one, CameraMotion clips, runs of either in turn:

    OMP_NUM_THREADS=1 python data/ray_speed.py --model data/wan-mini --workers 2 --clips 384 --rounds 3

Counted from when every worker has written a shard, so that starting Ray and loading models are not: `1.93x` means that two workers encode
1.93 times the clips of one in the same time. The machine must have as many idle cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from encoder import model_defaults  # noqa: E402
from ray_engine import write_on_ray  # noqa: E402
from shard_plan import Settings, load_plan, make_jobs  # noqa: E402


def clips_a_second(model: Path, clips: int, shard_size: int, workers: int) -> float:
    """Clips a second of so many workers, from the moment each has written a shard to the last shard."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model, Path(folder), **model_defaults(model), camera_motion=clips, shard_size=shard_size, engine="ray", workers=workers)
        plan = load_plan(settings)
        written: list[tuple[float, int]] = []
        write_on_ray(settings, plan, make_jobs(plan), lambda count: None, lambda result: written.append((time.monotonic(), result[1])))
    begun = written[workers - 1][0]
    return sum(count for _, count in written[workers:]) / (written[-1][0] - begun)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "wan-mini")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clips", type=int, default=384)
    parser.add_argument("--shard-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if min(vars(args)[name] for name in ("workers", "clips", "shard_size", "rounds")) < 1 or args.clips < 2 * args.workers * args.shard_size:
        parser.error(f"--clips {args.clips}: at least two shards a worker are needed, and every number is above 0")
    ratios = []
    for number in range(1, args.rounds + 1):
        one, several = (clips_a_second(args.model, args.clips, args.shard_size, workers) for workers in (1, args.workers))
        ratios.append(several / one)
        print(f"round {number}: 1 worker {one:.2f}, {args.workers} workers {several:.2f} clips a second: {ratios[-1]:.2f}x", flush=True)
    print(f"median {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
