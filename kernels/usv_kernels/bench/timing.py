"""What the benchmarks share: random block lists, errors, alternating timing, quantiles, and the environment a figure belongs to."""

import platform
import subprocess
import time
from pathlib import Path

import torch

from ..selection import BlockSelection


def tiles(length: int, block: int) -> torch.Tensor:
    """Sizes of consecutive blocks, the last one partial."""
    sizes = torch.full((-(-length // block),), block)
    sizes[-1] = length - (len(sizes) - 1) * block
    return sizes


def random_selection(heads: int, length: int, block: int, density: float, device) -> BlockSelection:
    """The same number of random blocks for every query block, the diagonal block among them."""
    count = -(-length // block)
    keep = max(1, round(density * count))
    scores = torch.rand(1, heads, count, count, device=device)
    scores.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(keep, -1).indices, True)
    sizes = tiles(length, block)
    return BlockSelection.from_mask(mask, sizes, sizes, capacity=keep)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`, in fp64."""
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm())


def quantiles(samples: list[float]) -> dict:
    """Milliseconds: median, 20% and 80% quantile."""
    ordered = sorted(samples)
    pick = {"p20_ms": 0.2, "median_ms": 0.5, "p80_ms": 0.8}
    return {name: 1e3 * ordered[min(len(ordered) - 1, int(f * len(ordered)))] for name, f in pick.items()} | {"samples": len(ordered)}


def measure(functions: dict, device: str, budget: float) -> dict:
    """Times all functions alternately until the budget in seconds is spent, at least 3 times each, after a warm-up.

    On a GPU a sample is the mean of enough calls in a row for 5 ms, begun while the GPU is held busy: launches would otherwise be timed,
    not work. `seconds` are all samples in order. `host_ms` is how long the host takes to launch a call; where that is longer than the call, the host is what was timed.
    """
    calls, hosts = dict.fromkeys(functions, 1), dict.fromkeys(functions)

    def once(name: str, count: int = 1) -> float:
        function = functions[name]
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
            launched = time.perf_counter()
            begin.record()
            for _ in range(count):
                function()
            end.record()
            hosts[name] = 1e3 * (time.perf_counter() - launched) / count
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3 / count
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    samples = {name: [] for name in functions}
    for name in functions:
        once(name)
        if device == "cuda":
            calls[name] = min(50, max(1, round(5e-3 / once(name))))
    deadline = time.monotonic() + budget
    while len(next(iter(samples.values()))) < 3 or (time.monotonic() < deadline and len(next(iter(samples.values()))) < 100):
        for name in functions:
            samples[name].append(once(name, calls[name]))
    return {name: quantiles(values) | {"seconds": values} | ({"host_ms": hosts[name]} if device == "cuda" else {}) for name, values in samples.items()}


def paired(times: dict, name: str) -> dict:
    """How many times as long each function took as `name`, by pairs of samples taken one after the other: median, 20% and 80% quantile.
    What a machine does to all for a while falls out of it, unlike of a ratio of medians."""
    found = {}
    for other, found_times in times.items():
        if other != name:
            ratios = sorted(b / a for a, b in zip(times[name]["seconds"], found_times["seconds"]))
            found[other] = {key: ratios[min(len(ratios) - 1, int(f * len(ratios)))] for key, f in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))}
    return found


def _git(*words: str) -> str | None:
    """What git answers; None outside a checkout or without git."""
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str) -> dict:
    """Everything a reader needs to judge the figures."""
    changes = _git("status", "--porcelain", ".")
    info = {"torch": torch.__version__, "python": platform.python_version(), "commit": _git("rev-parse", "HEAD"),
            "uncommitted_changes": None if changes is None else bool(changes), "threads": torch.get_num_threads()}  # fmt: skip
    if device == "cuda":
        import triton

        return info | {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return info | {"device": model, "capability": torch.backends.cpu.get_cpu_capability()}
