"""Micro-benchmark of block-sparse attention: `python -m usv_kernels.bench` on the CPU, `--gpu` on a GPU.

First the correctness gate: a result that disagrees with the fp64 reference ends the run and nothing is reported. Both sides
of every ratio are measured in the same run, alternating. Dense is SDPA; in half precision on a CPU also SDPA in fp32 with its
conversions, and the faster of the two counts; beside it our own kernel with every block listed. Also measured: what pooling,
selection and permutation add, and the peak memory of both sides. Only useful floating-point operations count, for each listed token
pair 4 * D forward and 10 * D backward. The ideal speed-up of a density is 1 / density. Rivals are held to our result, and to our
gradients, before they are timed, at the size that is timed. The grid of a GPU is in `bench_gpu`.
"""

import argparse
import json
import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import BlockSelection, block_sparse_attention
from .bench_companions import companions
from .bench_memory import compare_on_cpu, cuda_peak
from .bench_timing import environment, measure, random_selection, relative_error
from .host_memory import keep_freed_memory

FLOPS = {"forward": 4, "backward": 10, "forward+backward": 14}

# Largest error of a norm that the dtype itself accounts for. bf16 keeps 8 bits: 2**-9 a rounding, and no result passes more than
# about four of them. fp32 sums of a thousand terms and logits of a few units lose ten times sqrt(1000) roundings of 2**-24 at most.
GATES = {torch.bfloat16: 4 * 2.0**-9, torch.float32: 320 * 2.0**-24}


def gate(impl: str, device: str, dtype: torch.dtype = torch.bfloat16, dim: int = 64) -> dict:
    """Error of out and gradients against the fp64 reference at about a thousand tokens; SystemExit if one is beyond `GATES`."""
    torch.manual_seed(0)
    selection = random_selection(2, 16 * 64 + 24, 64, 0.25, device)
    inputs = [torch.randn(1, 2, 16 * 64 + 24, dim, device=device, dtype=dtype) for _ in range(4)]
    results = []
    for each, name in ((torch.float64, "reference"), (dtype, impl)):
        q, k, v = (x.to(each, copy=True).requires_grad_() for x in inputs[:3])
        out, _ = block_sparse_attention(q, k, v, selection, impl=name)
        out.backward(inputs[3].to(each))
        results.append([out.detach(), q.grad, k.grad, v.grad])
    errors = {}
    for name, exact, value in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        errors[name] = relative_error(value, exact)
        if not errors[name] < GATES[dtype]:
            raise SystemExit(f"correctness gate: {impl} {name} is off by {errors[name]:.2e} of its norm: nothing is measured")
    return errors


def candidates(heads, length, dim, density, block, dtype, device, impl, passes: str, flex: bool) -> tuple[dict, BlockSelection]:
    """Functions to time, each returning out, or the gradients, or both: dense SDPA, ours, our own dense rate (all blocks listed),
    FlexAttention with the same mask. `passes` is a key of `FLOPS`; "backward" has its forward behind it."""
    q, k, v, grad = (torch.randn(1, heads, length, dim, device=device, dtype=dtype) for _ in range(4))
    selection = random_selection(heads, length, block, density, device)
    everything = random_selection(heads, length, block, 1.0, device)
    leaves = [x.requires_grad_(passes != "forward") for x in (q, k, v)]

    def timed(attend):
        made = []  # the output of the one forward, where only the backward is timed

        def function():
            if passes == "forward":
                return (attend(),)
            if passes == "forward+backward":
                out = attend()
                return out.detach(), *torch.autograd.grad(out, leaves, grad)
            if not made:
                made.append(attend())
            return torch.autograd.grad(made[0], leaves, grad, retain_graph=True)

        return function

    def dense():
        if device != "cuda":
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    functions = {
        "sdpa_dense": timed(dense),
        "ours": timed(lambda: block_sparse_attention(q, k, v, selection, impl=impl)[0]),
        "ours_dense": timed(lambda: block_sparse_attention(q, k, v, everything, impl=impl)[0]),
    }
    if device == "cpu" and dtype != torch.float32:  # torch's own half-precision kernels may be the slower way
        functions["sdpa_dense_fp32"] = timed(lambda: F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype))
    if flex:
        functions["flex"] = timed(flex_call(q, k, v, selection, block))
    return functions, selection


def flex_call(q, k, v, selection, block):
    """FlexAttention, compiled, with the mask of the same blocks built in the first call, which is not timed."""
    from .block_sparse_attention import flex

    @cache
    def mask():
        return flex.block_mask(selection, block, q.shape[2], k.shape[2])

    return lambda: flex.compiled()(q, k, v, block_mask=mask(), kernel_options=flex.kernel_options(q, block))


def case(heads, length, dim, density, block, dtype, device, impl, budget, flex=True):
    """Yields the rows of one shape: forward, then on a GPU backward, on a CPU both together."""
    for passes in ("forward", "backward" if device == "cuda" else "forward+backward"):
        with_flex = flex and (passes == "forward" or device == "cuda")  # FlexAttention has no CPU backward
        functions, selection = candidates(heads, length, dim, density, block, dtype, device, impl, passes, with_flex)
        failed = rivals(functions, dtype)
        times = measure(functions, device, budget)
        executed = float(selection.density())
        flops = FLOPS[passes] * dim * heads * length * length
        dense = min((name for name in times if name.startswith("sdpa_dense")), key=lambda name: times[name]["median_ms"])
        speedup = times[dense]["median_ms"] / times["ours"]["median_ms"]
        row = {"pass": passes, "S": length, "D": dim, "H": heads, "block": block,
               "dtype": str(dtype).removeprefix("torch."), "density": executed, "times": times, "dense": dense, "speedup_over_sdpa": speedup,
               "share_of_ideal": speedup * executed,
               "tflops": {name: flops * (1 if "dense" in name else executed) / t["median_ms"] / 1e9 for name, t in times.items()}}  # fmt: skip
        row |= {f"{name}_failed": why for name, why in failed.items()}
        if device == "cuda":
            row["peak_bytes"] = {name: cuda_peak(functions[name]) for name in ("sdpa_dense", "ours")}
        if "ours_dense" in times:
            row["share_of_own_dense_rate"] = row["tflops"]["ours"] / row["tflops"]["ours_dense"]
        print(f"S {length} D {dim} density {executed:.3f} {row['dtype']} {passes}: " + ", ".join(f"{n} {t['median_ms']:.2f} ms" for n, t in times.items())
              + f"; {speedup:.2f} x over SDPA, {row['share_of_ideal']:.0%} of ideal", flush=True)  # fmt: skip
        yield row
    torch._dynamo.reset()


def rivals(functions: dict, dtype: torch.dtype) -> dict[str, str]:
    """Takes out the functions that fail, or whose results are not those of the one they are compared with; name -> why."""
    failed, pairs = {}, (("flex", "ours"), ("ours_dense", "sdpa_dense"))
    for name, other in pairs:
        if name not in functions:
            continue
        try:
            errors = [relative_error(value, exact) for value, exact in zip(functions[name](), functions[other](), strict=True)]
            error = float(torch.tensor(errors).max())  # NaN if one is, unlike Python's max
            if error < 2 * GATES[dtype]:
                continue
            failed[name] = f"off by {error:.2e} of the norm of {other}"
        except Exception as error:  # noqa: BLE001, whatever a compiler raises: a rival that fails ends nothing else
            failed[name] = f"{type(error).__name__}: {error}"[:500]
        print(f"{name} failed: {failed[name]}", flush=True)
        del functions[name]
    return failed


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


def cpu_rows(report: dict, length: int, heads: int, budget: float, flex: bool) -> None:
    """Adds the rows of one length: D 64, density 1/8, both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        report["rows"] += list(case(heads, length, 64, 1 / 8, 64, dtype, "cpu", "cpu", budget, flex))
        report["companions"] += companions(heads, length, 64, 1 / 8, 64, dtype, "cpu", "cpu", budget)
        report["memory"] += compare_on_cpu(heads, length, 64, 1 / 8, 64, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the GPU grid: densities, lengths up to 75,600, D 64 and 128")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting new shapes after this time (GPU)")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
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

    if args.gpu:
        from .bench_gpu import gpu_rows

        gpu_rows(report, args.heads or 12, args.budget or 0.5, 60 * args.minutes - (time.monotonic() - started), not args.no_flex, save)
    else:
        for length in args.seq:
            cpu_rows(report, length, args.heads or 2, args.budget or 3.0, not args.no_flex)
    save()
    plot(report["rows"], args.out / f"{name}.png")
    print(f"wrote {args.out / name}.json and .png")


if __name__ == "__main__":
    main()
