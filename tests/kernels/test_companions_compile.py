"""Every companion kernel becomes machine code for Ampere, Hopper and Blackwell, on a machine without any of them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_companions.py")
# Shared memory a block may use: 99 KiB on the smallest GPUs that run sm_80 code, 227 KiB on sm_90 and sm_100.
SHARED_LIMIT = {80: 101376, 90: 232448, 100: 232448}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_machine_code(arch):
    # A process of its own: in this one triton may have been imported for its interpreter, where nothing can be
    # compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run([sys.executable, str(SCRIPT), str(arch)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"].split(".")[0] for row in rows} == {
        "block_pool", "select", "token_merge", "permute", "kmeans", "norm_rope",
    }  # fmt: skip
    for row in rows:
        assert row["cubin_bytes"] > 1000, row
        assert row["shared_bytes"] <= SHARED_LIMIT[arch], row
        assert row["wide_accesses"] > 0, f"no 16-byte access: {row}"
        assert row["atomics"] == 0, f"atomics make runs differ: {row}"
        assert (row["dots"] > 0) == (row["kernel"] == "kmeans._assign_kernel"), f"tensor cores: {row}"
        assert row["spilled_bytes"] in (0, None), row
    if arch == 90:
        assert all(row["spilled_bytes"] == 0 for row in rows)
