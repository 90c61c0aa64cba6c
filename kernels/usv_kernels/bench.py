"""Micro-benchmark of block-sparse attention: `python -m usv_kernels.bench` on the CPU, `--gpu` on a GPU.

First the correctness gate: a result that disagrees with the fp64 reference ends the run and nothing is reported. Both sides
of every ratio are measured in the same run, alternating. Only useful floating-point operations count: 4 * D a listed token
pair forward, 14 * D forward and backward. The ideal speed-up of a density is 1 / density.
"""

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import BlockSelection, block_sparse_attention

FORWARD_FLOPS, BOTH_FLOPS = 4, 14


def random_selection(heads: int, length: int, block: int, density: float, device) -> BlockSelection:
    """The same number of random blocks for every query block, the diagonal block among them."""
    count = -(-length // block)
    keep = max(1, round(density * count))
    scores = torch.rand(1, heads, count, count, device=device)
    scores.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(keep, -1).indices, True)
    sizes = torch.full((count,), block)
    sizes[-1] = length - (count - 1) * block
    return BlockSelection.from_mask(mask, sizes, sizes, capacity=keep)


def gate(impl: str, device: str) -> dict:
    """Largest error of out and gradients against the fp64 reference; raises if one is beyond bf16's own loss."""
    torch.manual_seed(0)
    selection = random_selection(2, 16 * 64 + 24, 64, 0.25, device)
    inputs = [torch.randn(1, 2, 16 * 64 + 24, 64, device=device, dtype=torch.bfloat16) for _ in range(4)]
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.bfloat16, impl)):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs[:3])
        out, _ = block_sparse_attention(q, k, v, selection, impl=name)
        out.backward(inputs[3].to(dtype))
        results.append([out.detach(), q.grad, k.grad, v.grad])
    errors = {}
    for name, exact, value in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        errors[name] = float((value.double() - exact).norm() / exact.norm())
        # bf16 keeps 8 bits: 2**-9 a rounding, and no result passes more than about four of them.
        if not errors[name] < 4 * 2.0**-9:
            raise SystemExit(f"correctness gate: {impl} {name} is off by {errors[name]:.2e} of its norm: nothing is measured")
    return errors


def quantiles(samples: list[float]) -> dict:
    """Milliseconds: median, 20% and 80% quantile."""
    ordered = sorted(samples)
    pick = {"p20_ms": 0.2, "median_ms": 0.5, "p80_ms": 0.8}
    return {name: 1e3 * ordered[min(len(ordered) - 1, int(f * len(ordered)))] for name, f in pick.items()} | {"samples": len(ordered)}


def measure(functions: dict, device: str, budget: float) -> dict:
    """Times all functions alternately until the budget in seconds is spent, at least 3 times each, after a warm-up."""

    def once(function) -> float:
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    samples = {name: [] for name in functions}
    for function in functions.values():
        once(function)
    deadline = time.monotonic() + budget
    while len(next(iter(samples.values()))) < 3 or (time.monotonic() < deadline and len(next(iter(samples.values()))) < 100):
        for name, function in functions.items():
            samples[name].append(once(function))
    return {name: quantiles(values) for name, values in samples.items()}


def candidates(heads, length, dim, density, block, dtype, device, impl, backward: bool, flex: bool) -> tuple[dict, BlockSelection]:
    """Functions to time: dense SDPA, ours, our own dense rate (all blocks listed), FlexAttention with the same mask."""
    q, k, v, grad = (torch.randn(1, heads, length, dim, device=device, dtype=dtype) for _ in range(4))
    selection = random_selection(heads, length, block, density, device)
    everything = random_selection(heads, length, block, 1.0, device)
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def timed(attend):
        def function():
            out = attend()
            if backward:
                torch.autograd.grad(out, leaves, grad)

        return function

    functions = {
        "sdpa_dense": timed(lambda: F.scaled_dot_product_attention(q, k, v)),
        "ours": timed(lambda: block_sparse_attention(q, k, v, selection, impl=impl)[0]),
    }
    if device == "cuda":
        functions["ours_dense"] = timed(lambda: block_sparse_attention(q, k, v, everything, impl=impl)[0])
    if flex:
        functions["flex"] = timed(flex_call(q, k, v, selection, block))
    return functions, selection


def flex_call(q, k, v, selection, block):
    """FlexAttention, compiled, with the mask of the same blocks built once outside the timing."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    s = selection
    mask = BlockMask.from_kv_blocks(torch.zeros_like(s.kv_num_blocks), torch.zeros_like(s.to_mask(), dtype=torch.int32),
                                    s.kv_num_blocks, BlockSelection.from_mask(s.to_mask(), s.q_sizes, s.kv_sizes).kv_indices,
                                    BLOCK_SIZE=block, seq_lengths=(q.shape[2], k.shape[2]))  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def case(heads, length, dim, density, block, dtype, device, impl, budget, flex=True) -> list[dict]:
    """Rows of one shape: forward, then forward and backward."""
    rows = []
    for backward in (False, True):
        with_flex = flex and not (backward and device == "cpu")  # FlexAttention has no CPU backward
        functions, selection = candidates(heads, length, dim, density, block, dtype, device, impl, backward, with_flex)
        times = measure(functions, device, budget)
        executed = float(selection.density())
        flops = (BOTH_FLOPS if backward else FORWARD_FLOPS) * dim * heads * length * length
        speedup = times["sdpa_dense"]["median_ms"] / times["ours"]["median_ms"]
        row = {"pass": "forward+backward" if backward else "forward", "S": length, "D": dim, "H": heads, "block": block,
               "dtype": str(dtype).removeprefix("torch."), "density": executed, "times": times, "speedup_over_sdpa": speedup,
               "share_of_ideal": speedup * executed,
               "tflops": {name: flops * (1 if "dense" in name else executed) / t["median_ms"] / 1e9 for name, t in times.items()}}  # fmt: skip
        if "ours_dense" in times:
            row["share_of_own_dense_rate"] = row["tflops"]["ours"] / row["tflops"]["ours_dense"]
        rows.append(row)
        print(f"S {length} D {dim} density {executed:.3f} {row['dtype']} {row['pass']}: " + ", ".join(f"{n} {t['median_ms']:.2f} ms" for n, t in times.items())
              + f"; {speedup:.2f} x over SDPA, {row['share_of_ideal']:.0%} of ideal", flush=True)  # fmt: skip
        torch._dynamo.reset()
    return rows


def environment(device: str) -> dict:
    """Everything a reader needs to judge the figures."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    changed = subprocess.run(["git", "status", "--porcelain", "."], capture_output=True, text=True, cwd=Path(__file__).parent)
    info = {"torch": torch.__version__, "python": platform.python_version(), "commit": git.stdout.strip() or None,
            "uncommitted_changes": bool(changed.stdout.strip()), "threads": torch.get_num_threads()}  # fmt: skip
    if device == "cuda":
        import triton

        return info | {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return info | {"device": model, "capability": torch.backends.cpu.get_cpu_capability()}


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, name in zip(axes, ("forward", "forward+backward"), strict=True):
        for length, dim in sorted({(r["S"], r["D"]) for r in rows}):
            points = sorted((1 / r["density"], r["speedup_over_sdpa"]) for r in rows if (r["S"], r["D"], r["pass"]) == (length, dim, name))
            axis.plot(*zip(*points, strict=True), marker="o", label=f"S {length}, D {dim}") if points else None
        axis.plot([1, 32], [1, 32], color="grey", linestyle=":", label="ideal")
        axis.set(xscale="log", yscale="log", xlabel="1 / density", ylabel="speed-up over dense SDPA", title=name)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the GPU grid: densities, lengths up to 75,600, D 64 and 128")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting new shapes after this time (GPU)")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the CPU case")
    parser.add_argument("--out", type=Path, default=Path("data/results"))
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu: got no CUDA device, expected one; without a GPU no GPU figure is reported")
    started, device = time.monotonic(), "cuda" if args.gpu else "cpu"
    impl = "triton" if args.gpu else "cpu"
    report = {"environment": environment(device), "gate": gate(impl, device), "rows": [], "left_out": []}
    if args.gpu:
        # The shape of the stated goal first, so that a slow machine's cut falls on the others.
        shapes = [(s, d, r) for r in (8, 4, 16, 2, 32) for s in (32760, 8192, 75600) for d in (128, 64)]
        for length, dim, ratio in shapes:
            if time.monotonic() - started > 60 * args.minutes - 20:
                report["left_out"].append([length, dim, ratio])
                continue
            # Each new flex shape compiles for seconds: one density of each length suffices for the comparison.
            flex = not args.no_flex and ratio == 8
            report["rows"] += case(12, length, dim, 1 / ratio, 64, torch.bfloat16, device, impl, 0.5, flex)
    else:
        for dtype in (torch.bfloat16, torch.float32):
            report["rows"] += case(2, args.length, 64, 1 / 8, 64, dtype, device, impl, 3.0, not args.no_flex)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"attention_{'gpu' if args.gpu else 'cpu'}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report["rows"], args.out / f"{name}.png")
    print(f"wrote {args.out / name}.json and .png")


if __name__ == "__main__":
    main()
