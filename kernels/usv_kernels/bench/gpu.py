"""The grid of `python -m usv_kernels.bench --gpu`: shapes in the order of their worth, and which tile each kernel is fastest with."""

import contextlib
import importlib
import time

import torch

from .. import block_sparse_attention
from .._gpus import gpu_of
from .attention import GATES, case
from .companions import companions
from .timing import measure, paired, random_selection, relative_error

# The shape of the stated goal first, so that a slow machine's cut falls on the others: (S, D, 1 / density).
GRID = [(s, d, r) for r in (8, 4, 16, 2, 32) for s in (32760, 8192, 75600) for d in (128, 64)]
LAST_START = 45.0  # seconds that one more shape may take, compilation included
# Tiles worth timing beside the default, of blocks of 64 in bf16 on Hopper: (BM, BN, warps, stages). None spills inside its loop.
TILES = {
    ("forward", 128): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4)],
    ("dq", 128): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3)],
    ("dkv", 128): [(32, 64, 4, 2), (32, 64, 4, 3), (16, 64, 4, 3), (64, 64, 8, 3)],
    ("forward", 64): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4)],
    ("dq", 64): [(64, 64, 4, 2), (64, 64, 4, 3)],
    ("dkv", 64): [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3)],
}


def gpu_rows(report: dict, heads: int, budget: float, seconds: float, names, save=lambda: None, grid=GRID, device="cuda", impl="triton") -> None:
    """Adds the grid's rows to the report; shapes that `seconds` leave no time for, or that fail, are listed."""
    deadline = time.monotonic() + seconds
    for index, (length, dim, ratio) in enumerate(grid):
        if time.monotonic() > deadline - LAST_START:
            report["left_out"].append([length, dim, ratio])
            continue
        try:
            # Each new flex shape compiles for seconds: one density of each length suffices for the comparison.
            for row in case(heads, length, dim, 1 / ratio, 64, torch.bfloat16, device, impl, budget, names if ratio == 8 else ()):
                report["rows"].append(row)
                save()
            if ratio == 8:
                report["companions"] += companions(heads, length, dim, 1 / ratio, 64, torch.bfloat16, device, impl, budget)
            if index == 0 and device == "cuda":  # in the interpreter it would take longer than all else
                report.setdefault("kmeans", []).extend(kmeans_rows(heads, length, dim, device, impl, budget))
            if index < 2:  # both head sizes of the first length
                report["tiles"] += tiles(heads, length, dim, 1 / ratio, device, budget, report["failed"])
        except Exception as error:  # noqa: BLE001, of the device or the compiler; what was measured before stands
            report["failed"].append({"shape": [length, dim, ratio], "error": f"{type(error).__name__}: {error}"[:500]})
            print(f"S {length} D {dim} density 1/{ratio} failed: {error}", flush=True)
            if not works(device):
                report["left_out"] += [list(shape) for shape in grid[index + 1 :]]
                break
        finally:
            save()


def kmeans_rows(heads: int, length: int, dim: int, device: str, impl: str, budget: float) -> list[dict]:
    """Ten iterations over all tokens of every head, ours and flash-kmeans from the same centroids; the rival only if its centroids are
    ours."""
    from ..kmeans import kmeans

    x = torch.randn(1, heads, length, dim, device=device, dtype=torch.bfloat16)
    clusters = min(512, length // 4)
    init = x[:, :, torch.arange(clusters, device=device) * length // clusters].float()
    functions, row = {"ours": lambda: (kmeans(x, clusters, 10, init, impl).centroids,)}, {"S": length, "D": dim, "H": heads, "clusters": clusters}
    try:
        rival = importlib.import_module("flash_kmeans").batch_kmeans_Euclid
        flat, start = x.flatten(0, 1), init.flatten(0, 1).to(x.dtype)
        functions["flash_kmeans"] = lambda: (rival(flat, n_clusters=clusters, max_iters=10, tol=0.0, init_centroids=start)[1].view(init.shape),)
        error = relative_error(functions["flash_kmeans"]()[0], functions["ours"]()[0])
        if not error < 0.02:  # assignments of bf16 tokens near a border differ, and with them a few tokens of a cluster
            raise ArithmeticError(f"centroids off by {error:.2e} of their norm")
    except Exception as error:  # noqa: BLE001, absent, or whatever it raises
        functions.pop("flash_kmeans", None)
        row["flash_kmeans_failed"] = f"{type(error).__name__}: {error}"[:500]
    times = measure(functions, device, budget)
    row["paired"] = paired(times, "ours")
    for found in times.values():
        found.pop("seconds")
    return [row | {"times": times}]


def works(device: str) -> bool:
    """Whether the device still computes: after an illegal access every later call fails too."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except RuntimeError:
        return False


@contextlib.contextmanager
def tile(kernel: str, shape: tuple[int, int, int, int]):
    """Inside, one kernel runs with this tile and the others with their defaults."""
    from ..block_sparse_attention import triton_launch

    chosen = triton_launch.config
    triton_launch.config = lambda name, *a, **k: triton_launch.Config(*shape) if name == kernel else chosen(name, *a, **k)
    try:
        yield
    finally:
        triton_launch.config = chosen


def tiles(heads: int, length: int, dim: int, density: float, device: str, budget: float, failed: list[dict]) -> list[dict]:
    """Milliseconds of the pass that a kernel is part of, for each of its `TILES`, in one alternating run a kernel; what each
    computes is held to the default's. A tile that does not fit the device, or is wrong, is added to `failed` and costs no other its row."""
    from ..block_sparse_attention import triton_launch

    q, k, v, grad = (torch.randn(1, heads, length, dim, device=device, dtype=torch.bfloat16) for _ in range(4))
    selection, leaves = random_selection(heads, length, 64, density, device), [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(q, k, v, selection, impl="triton")[0]

    def forward():
        with torch.no_grad():
            return (block_sparse_attention(q, k, v, selection, impl="triton")[0],)

    def backward():
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def run(kernel, shape):
        with tile(kernel, shape):
            return forward() if kernel == "forward" else backward()

    rows = []
    for (kernel, of_dim), shapes in TILES.items():
        if of_dim != dim:
            continue
        usual = forward() if kernel == "forward" else backward()
        fit = []
        for shape in shapes:
            try:
                error = max(relative_error(a, b) for a, b in zip(run(kernel, shape), usual, strict=True))
                if not error < 2 * GATES[torch.bfloat16]:
                    raise ArithmeticError(f"off by {error:.2e} of the norm of the default's")
                fit.append(shape)
            except Exception as error:  # noqa: BLE001, of the compiler or the device
                failed.append({"shape": [length, dim], "tile": [kernel, *shape], "error": f"{type(error).__name__}: {error}"[:500]})
                print(f"S {length} D {dim} {kernel} {shape} failed: {error}", flush=True)
                if not works(device):
                    return rows
        times = measure({shape: lambda shape=shape: run(kernel, shape) for shape in fit}, device, budget) if fit else {}
        default = triton_launch.config(kernel, dim, torch.bfloat16, 64, 64, gpu_of(q))
        for shape, found in times.items():
            found.pop("seconds")
            rows.append({"kernel": kernel, "S": length, "D": dim, "tile": list(shape), "default": default == triton_launch.Config(*shape), **found})
        print(f"S {length} D {dim} {kernel}: " + ", ".join(f"{shape} {t['median_ms']:.3f} ms" for shape, t in times.items()), flush=True)
    return rows
