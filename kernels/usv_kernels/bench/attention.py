"""What is timed of block-sparse attention, and against whom.

First the correctness gate: a result that disagrees with the fp64 reference ends the run and nothing is reported. Both sides
of every ratio are measured in the same run, alternating. Dense is SDPA; in half precision on a CPU also SDPA in fp32 with its
conversions, and the faster of the two counts; beside it our own kernel with every block listed. Also measured: what pooling,
selection and permutation add, and the peak memory of both sides. Only useful floating-point operations count, for each listed token
pair 4 * D forward and 10 * D backward. The ideal speed-up of a density is 1 / density. Rivals are held to our result, and to our
gradients, before they are timed, at the size that is timed.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import BlockSelection, block_sparse_attention
from . import rivals as others
from .memory import cuda_peak
from .timing import measure, paired, random_selection, relative_error

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


def candidates(heads, length, dim, density, block, dtype, device, impl, passes: str, names=()) -> tuple[dict, BlockSelection, dict]:
    """Functions to time, each returning out, or the gradients, or both: dense SDPA, ours, our own dense rate (all blocks listed), and
    of the `names` of `rivals.RIVALS` those that are there; the selection; and why which rival is not. `passes` is a key of `FLOPS`; "backward" has its forward behind it."""
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
    absent = {}
    for name in names:
        try:
            attend = others.RIVALS[name](q, k, v, selection, block, passes)
        except others.Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # noqa: BLE001, of another library's set-up; it ends nothing else
            absent[name] = f"{type(error).__name__}: {error}"[:500]
        else:
            functions[name] = timed(attend)
    return functions, selection, absent


def case(heads, length, dim, density, block, dtype, device, impl, budget, names=("flex",)):
    """Yields the rows of one shape: forward, then on a GPU backward, on a CPU both together."""
    for passes in ("forward", "backward" if device == "cuda" else "forward+backward"):
        functions, selection, failed = candidates(heads, length, dim, density, block, dtype, device, impl, passes, names)
        failed |= rivals(functions, dtype)
        times = measure(functions, device, budget)
        executed = float(selection.density())
        flops = FLOPS[passes] * dim * heads * length * length
        dense = min((name for name in times if name.startswith("sdpa_dense")), key=lambda name: times[name]["median_ms"])
        speedup = times[dense]["median_ms"] / times["ours"]["median_ms"]
        row = {"pass": passes, "S": length, "D": dim, "H": heads, "block": block,
               "dtype": str(dtype).removeprefix("torch."), "density": executed, "times": times, "dense": dense, "speedup_over_sdpa": speedup,
               "share_of_ideal": speedup * executed,
               "tflops": {name: flops * (1 if "dense" in name else executed) / t["median_ms"] / 1e9 for name, t in times.items()}}  # fmt: skip
        row["paired"] = paired(times, "ours")
        for found in times.values():
            found.pop("seconds")
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
    failed, pairs = {}, [(name, "ours") for name in functions if name in others.RIVALS] + [("ours_dense", "sdpa_dense")]
    for name, other in pairs:
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
