"""Train what judges clips of MovingThings: which thing is seen, and where. A quarter of an hour on a core.

    python data/train_recogniser.py --out data/moving-things/recogniser.safetensors

Clips are of a stream of its own, with noise, blur, a grid and other light, so that what generation leaves in a clip is not what it is
told by; `usv.evaluate --calibrate` says what it makes of each damage.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import moving_things as world  # noqa: E402

from usv.cpu import keep_freed_memory  # noqa: E402
from usv.evaluation.calibrate import blur, grid, noisy  # noqa: E402
from usv.metrics.recogniser import SIDE, Recogniser, told  # noqa: E402

TRAIN_SEED, TEST_SEED = 21, 22
BATCH, FRESH, POOL, FIRST = 32, 8, 4096, 256  # clips a step, new ones among them, kept, made before the first step
WHERE = SIDE // 4  # side of the map of where the thing is


def draw(index: int, seed: int, size: int = SIDE) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """Clip `index` of the stream: frames uint8 (T, 3, size, size), cover (T, WHERE, WHERE) and the labels thing, motion, camera."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    subject, place, motion, camera = world.labels(generator, hold_out=False)
    clip = world.make_clip(subject, place, motion, camera, generator, size=size, layout=WHERE)
    return clip.frames, clip.layout[..., 0] / 2, (subject, motion, camera)


def worn(videos: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch with the damage that generation leaves, more or less of each."""
    r = torch.rand(5, generator=generator).tolist()
    videos = videos * (0.85 + 0.3 * r[0]) + 0.1 * (r[1] - 0.5)
    if r[2] > 0.4:
        videos = blur(videos, 0.3 + r[2])
    if r[3] > 0.4:
        videos = grid(videos.clamp(0, 1), 2, 0.04 * r[3])
    return noisy(videos, 0.06 * r[4]) if r[4] > 0.3 else videos.clamp(0, 1)


def accuracy(network: Recogniser, clips: int, size: int) -> dict[str, float]:
    """Share of `clips` of the test stream that is told right."""
    network.eval()
    hits = []
    for begin in range(0, clips, 24):  # the flow of many clips at once takes gigabytes
        drawn = [draw(i, TEST_SEED, size) for i in range(begin, min(begin + 24, clips))]
        subjects, motions = told(network, torch.stack([d[0] for d in drawn]).float() / 255)
        hits += [[s == d[2][0], m == d[2][1], c == d[2][2]] for s, (m, c), d in zip(subjects, motions, drawn)]
    return dict(zip(("subject", "motion", "camera"), torch.tensor(hits).double().mean(0).tolist()))


def train(steps: int, work: Path, lr: float = 2e-3) -> Recogniser:
    """Train for `steps`, going on from `work`, which is written every minute."""
    torch.manual_seed(0)
    network, begun = Recogniser(len(world.THINGS)), 0
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    if work.exists():
        saved = torch.load(work, weights_only=True)
        network.load_state_dict(saved["network"]), optimizer.load_state_dict(saved["optimizer"])
        begun = saved["step"]
    made = FIRST + begun * FRESH
    pool = [draw(i, TRAIN_SEED) for i in tqdm(range(max(0, made - FIRST), made), desc="first clips", leave=False)]
    kept, running = time.monotonic(), {}
    for step in (bar := tqdm(range(begun, steps), initial=begun, total=steps, unit="step")):
        generator = torch.Generator().manual_seed(step)
        pool = [*pool, *(draw(made + i, TRAIN_SEED) for i in range(FRESH))][-POOL:]
        made += FRESH
        old = torch.randint(len(pool) - FRESH, (BATCH - FRESH,), generator=generator).tolist()
        batch = [pool[i] for i in old] + pool[-FRESH:]
        videos = worn(torch.stack([b[0] for b in batch]).float() / 255, generator)
        subjects, cover = torch.tensor([b[2][0] for b in batch]), torch.stack([b[1] for b in batch])
        logits, where = network(videos)
        losses = {"subject": F.cross_entropy(logits, subjects), "where": F.binary_cross_entropy_with_logits(where, cover.clamp(0, 1))}
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = {name: 0.95 * running.get(name, float(v.detach())) + 0.05 * float(v.detach()) for name, v in losses.items()}
        bar.set_postfix({name: f"{v:.3f}" for name, v in running.items()})
        if time.monotonic() - kept > 60 or step + 1 == steps:
            torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, work)
            kept = time.monotonic()
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "moving-things" / "recogniser.safetensors")
    parser.add_argument("--work", type=Path, default=HERE / "cache" / "recogniser.pt", help="checkpoint")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--test", type=int, default=240, help="clips of the test stream, at 96 px")
    args = parser.parse_args()
    keep_freed_memory()
    for folder in (args.out.parent, args.work.parent):
        folder.mkdir(parents=True, exist_ok=True)
    network = train(args.steps, args.work)
    note = {"steps": args.steps, "clips": FIRST + args.steps * FRESH, "test_clips": args.test, "accuracy": accuracy(network, args.test, 96)}
    network.eval().save(args.out, note)
    print(json.dumps(note))


if __name__ == "__main__":
    main()
