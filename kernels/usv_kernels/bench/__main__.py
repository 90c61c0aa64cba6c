"""Micro-benchmark of block-sparse attention: `python -m usv_kernels.bench` on the CPU, `--gpu` on a GPU.

The command, its report and its picture; what is timed is in `attention`, the grid of a GPU in `gpu`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from ..host_memory import keep_freed_memory
from .attention import case, gate
from .companions import companions
from .gpu import gpu_rows
from .memory import compare_on_cpu
from .rivals import RIVALS
from .timing import environment


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["pass"] for row in rows))
    figure, axes = pyplot.subplots(1, max(len(names), 1), figsize=(11, 4), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        for length, dim, dtype in sorted({(r["S"], r["D"], r["dtype"]) for r in rows}):
            key = (length, dim, dtype, name)
            points = sorted((1 / r["density"], r["speedup_over_sdpa"]) for r in rows if (r["S"], r["D"], r["dtype"], r["pass"]) == key)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"S {length}, D {dim}, {dtype}") if points else None
        axis.plot([1, 32], [1, 32], color="grey", linestyle=":", label="ideal")
        axis.set(xscale="log", yscale="log", xlabel="1 / density", ylabel="speed-up over dense SDPA", title=name)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cpu_rows(report: dict, length: int, heads: int, budget: float, names) -> None:
    """Adds the rows of one length: D 64, density 1/8, both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        report["rows"] += list(case(heads, length, 64, 1 / 8, 64, dtype, "cpu", "cpu", budget, names))
        report["companions"] += companions(heads, length, 64, 1 / 8, 64, dtype, "cpu", "cpu", budget)
        report["memory"] += compare_on_cpu(heads, length, 64, 1 / 8, 64, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the GPU grid: densities, lengths up to 75,600, D 64 and 128")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting new shapes after this time (GPU)")
    parser.add_argument("--rivals", nargs="*", default=None, choices=list(RIVALS), help="default: all on a GPU, flex on the CPU; none: --rivals")
    parser.add_argument("--seq", type=int, nargs="+", default=[8192], help="tokens of the CPU cases, e.g. --seq 8192 32760")
    parser.add_argument("--heads", type=int, help="default: 2 on the CPU, 12 on a GPU")
    parser.add_argument("--budget", type=float, help="seconds of timing a row, default 3 on the CPU and 0.5 on a GPU")
    parser.add_argument("--out", type=Path, default=Path("data/results"))
    args = parser.parse_args(arguments)
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu: got no CUDA device, expected one; without a GPU no GPU figure is reported")
    started = time.monotonic()
    keep_freed_memory()  # as programs that run a model do, for both sides alike
    device = "cuda" if args.gpu else "cpu"
    impl = "triton" if args.gpu else "cpu"
    kinds = [(torch.bfloat16, 64), (torch.bfloat16, 128) if args.gpu else (torch.float32, 64)]  # all that is timed
    passed = {f"{str(dtype).removeprefix('torch.')} D {dim}": gate(impl, device, dtype, dim) for dtype, dim in kinds}
    command = "python -m usv_kernels.bench " + " ".join(sys.argv[1:] if arguments is None else arguments)
    parts = {part: [] for part in ("rows", "companions", "memory", "tiles", "left_out", "failed")}
    report = {"command": command.strip(), "environment": environment(device), "gate": passed, **parts}
    name = "attention_gpu" if args.gpu else "attention_cpu" if 8192 in args.seq else f"attention_cpu_{args.seq[0]}"
    args.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")

    names = args.rivals if args.rivals is not None else list(RIVALS) if args.gpu else ["flex"]
    if args.gpu:
        gpu_rows(report, args.heads or 12, args.budget or 0.5, 60 * args.minutes - (time.monotonic() - started), names, save)
    else:
        for length in args.seq:
            cpu_rows(report, length, args.heads or 2, args.budget or 3.0, names)
    save()
    plot(report["rows"], args.out / f"{name}.png")
    print(f"wrote {args.out / name}.json and .png")


if __name__ == "__main__":
    main()
