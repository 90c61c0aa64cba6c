"""Do learned plans pay? The same student under the learned plan and under its rivals' at one cost, several seeds each.

    python -m usv.compare_policies --steps 100 --seeds 3 --out data/results/policies_wan_mini.json
    python -m usv.compare_policies --steps 100 -- policy.budget=0.3 optim.batch_size=4          # settings of train.py for all
    python -m usv.compare_policies --policies gumbel hand_rule calibration --inputs none place  # with more than one input of the learned

Rivals: uniform, entropy, a hand rule of two numbers, a calibration of layers without gates (usv/policy/baselines.py), all trained as long
from the same start. Each cell is one run of train.py (resumed when it was cut off); compared is the held-out velocity error of its last
validation at the decoded plan, plain and weighted as the loss weighs it, with the plan's real cost beside it.

Paired: by seed and timestep bin, where all runs see the same clips and noise. ratio: geometric mean of rival / learned, above 1 where
the learned plan is better, with a 95% interval that resamples seeds, and bins within them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from usv.evaluation.arguments import check
from usv.files import check_folder, write_text
from usv.training.run import commit

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("gumbel", "static", "entropy", "hand_rule", "calibration")
LEARNED = "gumbel"


def run(policy: str, seed: int, steps: int, folder: Path, settings: list[str], threads: int) -> dict:
    """Train one student and return what its last validation logged. Raises CalledProcessError when training fails.

    policy: its name, or gumbel/INPUT.
    """
    name, _, given = policy.partition("/")
    words = [f"policy={name}", f"seed={seed}", f"optim.steps={steps}", f"output_dir={folder}"]
    words += [f"policy.input={given}"] if given else []
    words += ["logger=none", "logger.videos=false", f"logger.validate_every={steps}"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words, *settings], cwd=ROOT, check=True, env=env)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line.get("step") == steps and "validation/velocity_error" in line][-1]
    keys = ("velocity_error", "weighted_error", "plan_cost", "plan_density", "plan_merged")
    bins = {key.rpartition("/")[2]: round(value, 6) for key, value in last.items() if key.startswith("validation_by_noise/")}
    return {**{key: round(last[f"validation/{key}"], 6) for key in keys}, "by_bin": bins}


def paired(learned: list[dict], rival: list[dict], draws: int = 4000) -> dict:
    """ratio of errors rival / learned over seeds and bins, and its 95% interval by resampling both."""
    logs = np.array([[math.log(b["by_bin"][key] / a["by_bin"][key]) for key in sorted(a["by_bin"])] for a, b in zip(learned, rival)])
    rng = np.random.default_rng(0)
    seeds, bins = logs.shape
    chosen = rng.integers(seeds, size=(draws, seeds))
    means = np.stack([logs[chosen[:, i, None], rng.integers(bins, size=(draws, bins))].mean(1) for i in range(seeds)]).mean(0)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return {"ratio": round(float(np.exp(logs.mean())), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def summarise(cells: dict[str, list[dict]], learned: str = LEARNED) -> dict[str, dict]:
    """Mean and standard deviation over seeds; wins: in how many seeds the learned plan is better; the paired ratio."""
    rows = {}
    for policy, runs in cells.items():
        errors = [r["velocity_error"] for r in runs]
        rows[policy] = {
            "velocity_error_mean": round(statistics.mean(errors), 6),
            "velocity_error_std": round(statistics.stdev(errors), 6) if len(errors) > 1 else None,
            "weighted_error_mean": round(statistics.mean(r["weighted_error"] for r in runs), 6),
            "plan_cost_mean": round(statistics.mean(r["plan_cost"] for r in runs), 6),
            "learned_is_better_in": sum(a["velocity_error"] < b["velocity_error"] for a, b in zip(cells[learned], runs)),
            "learned_is_better_weighted_in": sum(a["weighted_error"] < b["weighted_error"] for a, b in zip(cells[learned], runs)),
        }
        if policy != learned and all(r.get("by_bin") for r in (*runs, *cells[learned])):
            rows[policy] |= paired(cells[learned], runs)
    return rows


def table(rows: dict[str, dict], learned: str = LEARNED) -> str:
    lines = [
        f"{'policy':16}{'velocity error':>16}{'± seeds':>10}{'weighted':>10}{'cost':>8}{'learned better in':>20}{'weighted':>10}{'rival / learned, 95%':>26}"
    ]
    for policy, row in rows.items():
        spread = "–" if row["velocity_error_std"] is None else f"{row['velocity_error_std']:.4f}"
        better = ("", "") if policy == learned else (row["learned_is_better_in"], row["learned_is_better_weighted_in"])
        ratio = f"{row['ratio']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]" if "ratio" in row else ""
        lines.append(
            f"{policy:16}{row['velocity_error_mean']:>16.4f}{spread:>10}{row['weighted_error_mean']:>10.4f}{row['plan_cost_mean']:>8.3f}"
            f"{better[0]!s:>20}{better[1]!s:>10}{ratio:>26}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--inputs", nargs="*", default=[], help="none, place, content: so many learned policies; the first is the one compared")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time, which share the cores")
    parser.add_argument("--runs", type=Path, default=Path("outputs/policies"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("settings", nargs="*", help="settings of train.py, after --")
    words, own = sys.argv[1:], []
    if "--" in words:  # argparse would give what follows to an option of several values
        words, own = words[: words.index("--")], words[words.index("--") + 1 :]
    args = parser.parse_args(words)
    args.settings += own
    try:
        check(args)
        check_folder(args.runs, "--runs")
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    inputs = [f"{LEARNED}/{name}" for name in args.inputs] or [LEARNED]
    policies = (*inputs, *(policy for policy in args.policies if policy != LEARNED))
    cells: dict[str, list[dict]] = {policy: [] for policy in policies}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    pool = ThreadPoolExecutor(args.jobs)
    runs = {
        (seed, policy): pool.submit(run, policy, seed, args.steps, (args.runs / f"{policy.replace('/', '_')}-{seed}").resolve(), args.settings, threads)
        for seed in range(args.seeds)  # seed by seed: cut off, the comparison is still a fair one
        for policy in policies
    }
    try:
        for seed in range(args.seeds):
            for policy in policies:
                cells[policy].append(runs[seed, policy].result())
            rows = summarise(cells, inputs[0])
            print(table(rows, inputs[0]), flush=True)
            if args.out is not None:
                command = "python -m usv.compare_policies " + " ".join(sys.argv[1:])
                report = {"commit": commit(), "command": command, "seeds": seed + 1, "rows": rows, "runs": cells}
                write_text(args.out, json.dumps(report, indent=1) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)  # one that failed ends the comparison
