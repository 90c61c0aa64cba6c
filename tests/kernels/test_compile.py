"""The attention kernels as machine code for GPUs that are not here: Ampere, Hopper, Blackwell and MI300."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import usv_kernels

MAIN = {"forward", "dq", "dkv"}


@pytest.fixture(scope="module")
def rows():
    # Another process: this one's triton may be the interpreter, which compiles nothing.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(usv_kernels.__file__).parents[1])
    command = [sys.executable, "-m", "usv_kernels.compile_report", "--quick", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_builds_for_every_target(rows):
    built = {(r["target"], r["kernel"]) for r in rows}
    assert built >= {(t, k) for t in ("sm_80", "sm_90", "sm_100", "gfx942") for k in MAIN}
    assert {"delta", "gate_sum"} <= {r["kernel"] for r in rows}


def test_no_spills_and_shared_memory_within_the_device(rows):
    for row in rows:
        assert row["spills"] == 0, row
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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(usv_kernels.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rows = {f"{x}_stride_{axis}" for x in ("q", "k", "v", "out", "grad", "dq", "dk") for axis in "bhs"}
    for kernel, parameters in json.loads(done.stdout).items():
        special = {name for name, constant, plain in parameters if not (constant or plain or name.endswith("_ptr"))}
        assert special <= rows, f"{kernel} would compile anew for {special - rows}"
        constants = {name for name, constant, _ in parameters if constant}
        assert constants <= {"HAS_BIAS", "HAS_GATE", "HAS_GRAD_LSE", "KV_TILES", "Q_TILES", "BM", "BN", "BK", "D", "DP"}
