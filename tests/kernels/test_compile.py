"""Every kernel as machine code for GPUs that are not here, from Ampere to RDNA 4: what CI's half of the compile report shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import usv_kernels
from usv_kernels.compile_report import ONE_A_UNIT, SIBLINGS, TARGETS

MAIN = {"forward", "dq", "dkv"}
LOWER = {"sm_89": {"forward int8", "forward fp8", "forward fp8 pv"}, "sm_90": {"forward int8", "forward fp8", "forward fp8 pv"},
         "sm_100": {"forward fp8", "forward fp8 pv"}, "gfx942": {"forward int8"}, "gfx1100": {"forward int8"}}  # fmt: skip
KIB = 1024
UNITS = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_103": "tcgen05",
         "sm_120": "mma.sync", "sm_121": "mma.sync", "gfx90a": "mfma", "gfx942": "mfma", "gfx950": "mfma", "gfx1100": "wmma",
         "gfx1151": "wmma", "gfx1201": "wmma"}  # fmt: skip
NEVER_SPILL = {"sm_80", "sm_90", "sm_100", "gfx942"}
# Specialised arguments are compiled in (by divisibility, or as 1). These are a model's own, or follow from them: strides of
# whole rows. N of `select` is a choice of two builds: rows of a multiple of 16 scores are read 16 bytes at a time.
FIXED = {"dim", "channels", "stride_b", "stride_h", "stride_s", "stride_row", "stride_col", "index_s", "num_kv"}
COMPANIONS = {"block_pool", "select", "token_merge", "permute", "kmeans", "norm_rope"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """CI's half, compiled by another process: this one's triton may be the interpreter, which compiles nothing."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "usv_kernels.compile_report", "--half", "--out", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "kernels_compiled.json").read_text())


@pytest.fixture
def rows(report):
    return report["rows"]


def environment() -> dict:
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return found | {"PYTHONPATH": str(Path(usv_kernels.__file__).parents[1])}


def test_every_kernel_builds_for_every_target(rows):
    built = {(r["target"], r["kernel"], r["D"], r["layout"], r["bias_and_gate"], r["proxy"]) for r in rows}
    for target in TARGETS:
        for kernel in MAIN:
            assert built >= {(target, kernel, 128, layout, True, False) for layout in ("tile 64", "clusters")}
            if target not in SIBLINGS:
                assert (target, kernel, 96, "tile 128", True, False) in built
            if target in ONE_A_UNIT:
                assert (target, kernel, 64, "tile 64", True, False) in built
                assert (target, kernel, 128, "tile 64", False, kernel != "dkv") in built
        assert {r["kernel"] for r in rows if r["target"] == target and r["kernel"].startswith("forward ")} == LOWER.get(target, set())


def test_no_local_memory_in_loops_and_no_spills_where_there_were_none(report, rows):
    """On RDNA, which has 256 registers a lane whatever is done, the backward spills; its forward does not."""
    triton = tuple(map(int, report["triton"].split(".")[:2]))
    for row in rows:
        if UNITS[row["target"]] != "wmma" or row["kernel"].startswith("forward"):
            assert row["inner_loop"].get("local", 0) == 0, row
        # Triton 3.6 keeps a few registers of some variants in memory around their loops.
        assert row["spills"] == 0 or row["target"] not in NEVER_SPILL or triton < (3, 7), row


def test_shared_memory_leaves_two_kib_and_two_programs_fit(rows):
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit"] - 2 * KIB, row
        assert row["programs_per_sm"] >= 1, row
        if UNITS[row["target"]] == "mma.sync" and row["kernel"] in ("forward", "dq") and (row["D"], row["layout"]) == (128, "tile 64"):
            assert row["programs_per_sm"] >= 2, row


def test_no_product_is_computed_twice(rows):
    """Warps that share a tile badly repeat its products, and neither registers nor spills show it: every kind of matrix instruction."""
    for row in (r for r in rows if r["kernel"] in MAIN or r["kernel"].startswith("forward ")):
        assert (row["unit"], row["matrix_work"]) == (UNITS[row["target"]], 1.0), row


def test_loads_of_16_bytes_and_no_atomics(rows):
    for row in rows:
        assert row["atomics"] == 0 and row["wide_accesses"] > 0 and row["inner_loop"]["mma"] > 0, row
        if UNITS[row["target"]] in ("mma.sync", "wgmma"):
            assert row["inner_loop"].get("async copy", 0) > 0, row


def test_nothing_that_varies_between_steps_is_compiled_in():
    """Counts, lengths, capacities and densities reach the kernels as plain integers: no specialisation, no new build.

    What stays specialised are strides of whole rows, multiples of 16 whatever the length, and alignment of pointers.
    """
    code = "import json, usv_kernels.compile_report as r; print(json.dumps({k: [(p.name, p.is_constexpr, p.do_not_specialize) for p in f.params] for k, f in r.kernels().items()}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    rows = {f"{x}_stride_{axis}" for x in ("q", "k", "v", "out", "grad", "dq", "dk") for axis in "bhs"}
    for kernel, parameters in json.loads(done.stdout).items():
        special = {name for name, constant, plain in parameters if not (constant or plain or name.endswith("_ptr"))}
        assert special <= rows, f"{kernel} would compile anew for {special - rows}"
        constants = {name for name, constant, _ in parameters if constant}
        assert constants <= {"HAS_BIAS", "HAS_GATE", "HAS_GRAD_LSE", "HAS_PROXY", "KV_TILES", "Q_TILES", "BM", "BN", "BK", "D", "DP", "D1", "LOW_QK", "LOW_PV"}


@pytest.mark.parametrize("target", ONE_A_UNIT)
def test_companions(report, target):
    rows = [row for row in report["companions"] if row["target"] == target]
    assert {row["kernel"].split(".")[0] for row in rows} == COMPANIONS
    for row in rows:
        assert row["registers"] > 0 and row["shared_bytes"] <= row["shared_limit"] - 2 * KIB, row
        # k-means holds 64 tokens of 128 channels, twice over on RDNA 3, whose waves have 256 registers a lane.
        assert row["spills"] == 0 or (target, row["kernel"]) == ("gfx1100", "kmeans._assign_kernel"), row
        assert set(row["specialised"]) <= FIXED, f"would compile anew when a count or length changes: {row}"
        # 1024 channels of 16 bits over 256 lanes of AMD's waves of 64 are 8 bytes each.
        if (target, row["kernel"]) != ("gfx942", "token_merge._reduce_kernel"):
            assert row["wide_accesses"] > 0, f"no 16-byte access: {row}"
        assert row["atomics"] == 0, f"atomics make runs differ: {row}"
        products = row["kernel"] == "kmeans._assign_kernel" and (UNITS[target] != "wmma" or row["types"].startswith("bf16"))
        assert (row["dots"] > 0) == products, f"matrix instructions: {row}"
