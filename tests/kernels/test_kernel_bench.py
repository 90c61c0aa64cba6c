"""The benchmarks: both grids run end to end at toy sizes, and the memory figure sees an allocation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from usv_kernels.bench import __main__ as program
from usv_kernels.bench import attention as bench
from usv_kernels.bench import gpu as bench_gpu
from usv_kernels.bench import memory as bench_memory
from usv_kernels.bench import rivals, timing


def test_cpu_report(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(program, "compare_on_cpu", lambda *shape: measured.append(shape) or [{"ratio": 1.0}])
    program.main(["--seq", "320", "--heads", "1", "--budget", "0.01", "--rivals", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "attention_cpu_320.json").read_text())
    assert (tmp_path / "attention_cpu_320.png").stat().st_size > 0 and report["environment"][
        "torch"
    ] == torch.__version__
    kinds = [(p, d) for d in ("bfloat16", "float32") for p in ("forward", "forward+backward")]
    assert measured == [(1, 320, 64, 1 / 8, 64, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert report["memory"] == [{"ratio": 1.0}] * 2
    for part in ("rows", "companions"):
        assert [(r["pass"], r["dtype"]) for r in report[part]] == kinds
    for row in report["companions"]:
        median = {name: t["median_ms"] for name, t in row["times"].items()}
        total = median["pooling"] + median["selection"] + median["permutation"]
        assert row["share_of_attention"] == pytest.approx(total / median["attention"])


def gpu_report():
    return {part: [] for part in ("rows", "companions", "tiles", "left_out", "failed")}


ON_CPU = {"device": "cpu", "impl": "triton"}


def test_gpu_grid_without_a_gpu():
    """The loop of `--gpu` on the CPU, through the interpreter: rows in order, a cut is reported."""
    report = gpu_report()
    bench_gpu.gpu_rows(report, 1, 0.0, 1e4, (), grid=[(128, 32, 8), (192, 32, 2)], **ON_CPU)
    assert [(r["S"], r["pass"]) for r in report["rows"]] == [
        (s, p) for s in (128, 192) for p in ("forward", "forward+backward")
    ]
    assert all(0 < r["share_of_own_dense_rate"] for r in report["rows"])
    assert [r["S"] for r in report["companions"]] == [128, 128] and not report["left_out"] and not report["failed"]
    bench_gpu.gpu_rows(report, 1, 0.0, bench_gpu.LAST_START - 1, (), grid=[(128, 32, 4)], **ON_CPU)
    assert report["left_out"] == [[128, 32, 4]] and len(report["rows"]) == 4
    assert {(s, d, r) for s in (8192, 32760, 75600) for d in (64, 128) for r in (2, 4, 8, 16, 32)} == set(bench_gpu.GRID)
    assert bench_gpu.GRID[0] == (32760, 128, 8)


def test_a_shape_that_fails_loses_nothing_else(monkeypatch):
    """What was measured before the failure is kept and saved; where the device no longer computes, the rest is not tried."""
    case, broken = bench_gpu.case, []

    def breaks(heads, length, *rest):
        rows = case(heads, length, *rest)
        yield next(rows)
        if length == 192:
            raise RuntimeError("an illegal memory access")
        yield from rows

    monkeypatch.setattr(bench_gpu, "case", breaks)
    monkeypatch.setattr(bench_gpu, "works", lambda device: not broken)
    grid, saved, report = [(128, 32, 2), (192, 32, 2), (64, 32, 2)], [], gpu_report()
    bench_gpu.gpu_rows(report, 1, 0.0, 1e4, (), lambda: saved.append(len(report["rows"])), grid, **ON_CPU)
    assert [r["S"] for r in report["rows"]] == [128, 128, 192, 64, 64] and saved[-1] == 5
    assert report["failed"] == [{"shape": [192, 32, 2], "error": "RuntimeError: an illegal memory access"}] and not report["left_out"]
    broken.append(True)
    report = gpu_report()
    bench_gpu.gpu_rows(report, 1, 0.0, 1e4, (), grid=grid, **ON_CPU)
    assert [r["S"] for r in report["rows"]] == [128, 128, 192] and report["left_out"] == [[64, 32, 2]]


def test_tiles_are_timed_and_held_to_the_default(monkeypatch):
    from usv_kernels.block_sparse_attention import triton_launch

    shapes = {("forward", 32): [(64, 64, 4, 3), (16, 32, 4, 2)], ("dq", 32): [(32, 64, 4, 2)], ("dkv", 32): [(16, 64, 4, 2)], ("dq", 64): [(1, 1, 1, 1)]}
    monkeypatch.setattr(bench_gpu, "TILES", shapes)
    seen, chosen = set(), triton_launch.config
    monkeypatch.setattr(triton_launch, "_common", lambda q, cfg, plain=triton_launch._common: seen.add((cfg.BM, cfg.BN)) or plain(q, cfg))
    failed = []
    rows = bench_gpu.tiles(1, 192, 32, 0.5, "cpu", 0.0, failed)
    assert not failed
    assert [(r["kernel"], r["tile"]) for r in rows] == [(k, list(s)) for (k, d), each in shapes.items() for s in each if d == 32]
    assert [r["default"] for r in rows] == [True, False, False, False] and seen >= {(16, 32), (32, 64), (16, 64)}
    assert triton_launch.config is chosen


def test_a_tile_that_does_not_fit_costs_its_own_row_only(monkeypatch):
    from usv_kernels.block_sparse_attention import triton_launch

    monkeypatch.setattr(bench_gpu, "TILES", {("forward", 32): [(16, 32, 4, 2), (64, 64, 4, 9)], ("dq", 32): [(32, 64, 4, 2)], ("dkv", 32): [(16, 64, 4, 9)]})
    common = triton_launch._common

    def limited(q, cfg):
        if cfg.num_stages == 9:
            raise triton_launch.TileDoesNotFit("forward: got a tile of 64 x 64")
        return common(q, cfg)

    monkeypatch.setattr(triton_launch, "_common", limited)
    failed = []
    rows = bench_gpu.tiles(1, 192, 32, 0.5, "cpu", 0.0, failed)
    assert [(r["kernel"], r["tile"]) for r in rows] == [("forward", [16, 32, 4, 2]), ("dq", [32, 64, 4, 2])]
    assert [f["tile"] for f in failed] == [["forward", 64, 64, 4, 9], ["dkv", 16, 64, 4, 9]]
    assert all(f["error"].startswith("TileDoesNotFit: ") for f in failed)


def test_a_rival_that_fails_is_reported(monkeypatch):
    def broken(*_):
        def call():
            raise NotImplementedError("no such tile")

        return call

    monkeypatch.setitem(rivals.RIVALS, "flex", broken)
    row = next(bench.case(1, 128, 32, 0.5, 64, torch.float32, "cpu", "cpu", 0.0))
    assert row["flex_failed"] == "NotImplementedError: no such tile" and set(row["times"]) == {"sdpa_dense", "ours", "ours_dense"}


def test_rivals_that_are_absent_are_left_out_with_the_reason(monkeypatch):
    """On a CPU, none of a GPU's; and, as on a GPU, without their packages."""
    row = next(bench.case(1, 128, 32, 0.5, 64, torch.float32, "cpu", "cpu", 0.0, ["cudnn", "flashinfer"]))
    assert row["cudnn_failed"] == row["flashinfer_failed"] == "it needs an NVIDIA GPU"
    with pytest.raises(rivals.Absent, match=r"^no_such_module does not import \(.*\); pip install it$"):
        rivals._module("no_such_module", "it")
    q = torch.zeros(1, 1, 128, 32)
    with pytest.raises(rivals.Absent, match="no CPU backward"):
        rivals.flex(q, q, q, None, 64, "forward+backward")


def test_a_rival_that_is_wrong_is_reported(monkeypatch):
    """FlexAttention with another mask: fast, and no answer to the same question."""
    monkeypatch.setitem(rivals.RIVALS, "flex", lambda q, k, v, *_: lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    row = next(bench.case(1, 256, 32, 0.25, 64, torch.float32, "cpu", "cpu", 0.0))
    assert row["flex_failed"].startswith("off by") and "flex" not in row["times"]


def test_pairs_of_samples():
    """By hand: a machine that slows down by half in the middle leaves the ratio of every pair alone."""
    times = {"ours": {"seconds": [1.0, 2.0, 2.0]}, "slow": {"seconds": [3.0, 6.0, 6.0]}}
    assert timing.paired(times, "ours") == {"slow": {"p20": 3.0, "median": 3.0, "p80": 3.0}}


def test_nothing_imports_the_benchmarks_back():
    """They end in `__main__`: no module of the package but their own imports them."""
    package = Path(bench.__file__).parents[1]
    back = [path for path in package.rglob("*.py") if path.parent.name != "bench" and re.search(r"^\s*(from|import) .*\bbench\b", path.read_text(), re.M)]
    assert not back
    imports = {path.stem: set(re.findall(r"^from \.(\w+) import", path.read_text(), re.M)) for path in (package / "bench").glob("*.py")}
    assert not any("gpu" in names or "__main__" in names for stem, names in imports.items() if stem != "__main__")


def test_a_rival_with_other_gradients_is_reported():
    """The same output and a gradient that is not its own."""
    x = torch.randn(3, 4)
    functions = {"sdpa_dense": lambda: (x, x), "ours_dense": lambda: (x, 1.1 * x)}
    assert bench.rivals(functions, torch.float32)["ours_dense"].startswith("off by 1.00e-01")
    assert set(functions) == {"sdpa_dense"}
    functions = {"sdpa_dense": lambda: (x, x), "ours_dense": lambda: (x, x * float("nan"))}
    assert "ours_dense" in bench.rivals(functions, torch.float32)


@pytest.mark.parametrize("passes", bench.FLOPS)
def test_what_is_timed(passes):
    """Out, its gradients, or both; the forward behind a backward runs once."""
    functions, _, _ = bench.candidates(1, 192, 32, 0.5, 64, torch.float32, "cpu", "cpu", passes)
    calls = []
    for name, function in functions.items():
        first, again = function(), function()
        calls.append([tuple(x.shape) for x in first])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name
    count = {"forward": 1, "backward": 3, "forward+backward": 4}[passes]
    assert calls == [[(1, 1, 192, 32)] * count] * 3


def test_half_precision_is_compared_with_the_faster_dense(monkeypatch):
    row = next(bench.case(1, 256, 32, 0.25, 64, torch.bfloat16, "cpu", "cpu", 0.0, ()))
    medians = {name: t["median_ms"] for name, t in row["times"].items()}
    fastest = min(medians["sdpa_dense"], medians["sdpa_dense_fp32"])
    assert medians[row["dense"]] == fastest and row["speedup_over_sdpa"] == fastest / medians["ours"]


def test_a_red_gate_measures_nothing(monkeypatch):
    attend = bench.block_sparse_attention

    def wrong(*args, impl, **kwargs):
        out, lse = attend(*args, impl=impl, **kwargs)
        return (out if impl == "reference" else out * 1.01), lse

    monkeypatch.setattr(bench, "block_sparse_attention", wrong)
    with pytest.raises(SystemExit, match="correctness gate: cpu out"):
        bench.gate("cpu", "cpu")


def test_memory_of_both_sides(monkeypatch):
    """Forward rows only, in processes of their own: more than the output, less than a dense score matrix."""
    monkeypatch.setattr(bench_memory, "PASSES", (False,))
    (row,) = bench_memory.compare_on_cpu(1, 4096, 32, 1 / 8, 64, torch.float32)
    assert all(4096 * 32 * 4 <= b < 4096**2 * 4 for b in row["peak_bytes"].values())
    assert row["ratio"] == row["peak_bytes"]["ours"] / row["peak_bytes"]["sdpa_dense"]


def test_memory_sees_what_a_call_allocates_and_frees():
    """Two processes that differ in the size of one tensor differ in their peak by just that.

    In processes of their own, as it is used: elsewhere the memory may be resident already, freed by what ran before. What a
    process's first call brings up (threads, allocator arenas, on some machines over 10 MiB) is in both and cancels. Left is the
    granularity of resident memory: a huge page, 2 MiB, at either end.
    """
    code = "import sys, torch; from usv_kernels.bench import memory; print(memory.cpu_peak(lambda: torch.ones(int(sys.argv[1]) << 18).sum()))"
    small, large = (
        int(subprocess.run([sys.executable, "-c", code, mib], capture_output=True, text=True, check=True).stdout)
        for mib in ("48", "112")
    )
    assert small >= 46 << 20 and abs(large - small - (64 << 20)) <= 4 << 20
