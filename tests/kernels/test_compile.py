"""Every kernel as machine code for GPUs that are not here: Ampere, Hopper, Blackwell and MI300."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import usv_kernels

MAIN = {"forward", "dq", "dkv"}
SMALLEST_SM80 = 99 * 1024  # shared memory of the smallest GPUs that run sm_80 code, bytes
# Specialised arguments are compiled in (by divisibility, or as 1). These are a model's own, or follow from them: strides of
# whole rows. N of `select` is a choice of two builds: rows of a multiple of 16 scores are read 16 bytes at a time.
FIXED = {"dim", "channels", "stride_b", "stride_h", "stride_s", "stride_row", "stride_col", "index_s", "num_kv"}
COMPANIONS = {"block_pool", "select", "token_merge", "permute", "kmeans", "norm_rope"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Everything, compiled by another process: this one's triton may be the interpreter, which compiles nothing."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "usv_kernels.compile_report", "--out", str(folder)]
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
    built = {(r["target"], r["kernel"], r["D"], r["dtype"], r["layout"], r["bias_and_gate"]) for r in rows}
    for target in ("sm_80", "sm_90", "sm_100"):
        for kernel in MAIN:
            for dim in (32, 64, 96, 128):
                layouts = [(layout, extras) for layout in ("tile 64", "tile 128", "clusters") for extras in (False, True)] + [("tile 512", True)]
                assert built >= {(target, kernel, dim, "bf16", *each) for each in layouts}
                assert (target, kernel, dim, "fp16", "tile 64", True) in built
                assert built >= {(target, kernel, dim, "fp32", layout, True) for layout in ("tile 64", "clusters")}
    assert built >= {("gfx942", k, d, "bf16", y, True) for k in MAIN for d in (64, 128) for y in ("tile 64", "tile 128", "clusters")}
    assert {"delta", "gate_sum"} <= {r["kernel"] for r in rows}


def test_no_spills_and_shared_memory_within_the_device(report, rows):
    triton = tuple(map(int, report["triton"].split(".")[:2]))
    for row in rows:
        assert row["inner_loop"].get("local", 0) == 0, row
        # Triton 3.6 keeps a few registers of some variants in memory around their loops.
        assert row["spills"] == 0 or triton < (3, 7), row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row.get("programs_per_sm", 1) >= 1, row


def test_tensor_cores_of_each_generation(rows):
    unit = {"sm_80": "mma_sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    half = [r for r in rows if r["kernel"] in MAIN and r["dtype"] == "bf16"]
    assert len(half) >= 18
    for row in half:
        # Products of each loop body: QK and PV; QK, dOV and dSK; and four in dkv.
        assert row[unit[row["target"]]] >= {"forward": 2, "dq": 3, "dkv": 4}[row["kernel"]], row
        assert row["inner_loop"]["mma"] > 0, row


def test_warpgroups_share_the_products(rows):
    """On Hopper 64 rows are one warpgroup's: a second one on the same tile repeats its products, and nothing else shows it."""
    found = [r for r in rows if r["target"] == "sm_90" and r["kernel"] in MAIN and r["dtype"] != "fp32"]
    assert len(found) >= 84 and {r["tensor_work"] for r in found} == {1.0}


def test_loads_of_16_bytes_and_no_atomics(rows):
    for row in (r for r in rows if r["target"].startswith("sm_")):
        assert row["atomics"] == 0, row
        assert row["kernel"] == "gate_sum" or row["loads_16_bytes"] > 0, row
        if row["kernel"] in MAIN and row["dtype"] == "bf16":
            assert row["inner_loop"]["mma"] > 0 and row["inner_loop"]["async copy"] > 0, row


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
        assert constants <= {"HAS_BIAS", "HAS_GATE", "HAS_GRAD_LSE", "KV_TILES", "Q_TILES", "BM", "BN", "BK", "D", "DP"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_companions(report, target):
    rows = [row for row in report["companions"] if row["target"] == target]
    assert {row["kernel"].split(".")[0] for row in rows} == COMPANIONS
    for row in rows:
        assert row["registers"] > 0 and row["shared_bytes"] <= row["shared_limit"], row
        assert target != "sm_80" or row["shared_bytes"] <= SMALLEST_SM80, row
        assert row["spills"] == 0, row
        assert set(row["specialised"]) <= FIXED, f"would compile anew when a count or length changes: {row}"
        # 1024 channels of 16 bits over 256 lanes of gfx942 are 8 bytes each.
        if (target, row["kernel"]) != ("gfx942", "token_merge._reduce_kernel"):
            assert row["wide_accesses"] > 0, f"no 16-byte access: {row}"
        assert row["atomics"] == 0, f"atomics make runs differ: {row}"
        assert (row["dots"] > 0) == (row["kernel"] == "kmeans._assign_kernel"), f"matrix instructions: {row}"
