"""Every companion kernel becomes machine code for Ampere, Hopper, Blackwell and MI300, on a machine without any of them."""

import json
import os
import subprocess
import sys

import pytest

SMALLEST_SM80 = 99 * 1024  # shared memory of the smallest GPUs that run sm_80 code, bytes
# Specialised arguments are compiled in (by divisibility, or as 1). These are a model's own, or follow from them: strides of
# whole rows. N of `select` is a choice of two builds: rows of a multiple of 16 scores are read 16 bytes at a time.
FIXED = {"dim", "channels", "stride_b", "stride_h", "stride_s", "stride_row", "stride_col", "index_s", "num_kv"}
OPERATIONS = {"block_pool", "select", "token_merge", "permute", "kmeans", "norm_rope"}


@pytest.mark.parametrize("target", ["80", "90", "100", "gfx942"])
def test_machine_code(target):
    # A process of its own: in this one triton may have been imported for its interpreter, where nothing can be
    # compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "usv_kernels.compile_companions", target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"].split(".")[0] for row in rows} == OPERATIONS
    for row in rows:
        assert row["registers"] > 0 and row["shared_bytes"] <= row["shared_limit"], row
        assert target != "80" or row["shared_bytes"] <= SMALLEST_SM80, row
        assert row["spills"] == 0, row
        assert set(row["specialised"]) <= FIXED, f"would compile anew when a count or length changes: {row}"
        # 1024 channels of 16 bits over 256 lanes of gfx942 are 8 bytes each.
        if (target, row["kernel"]) != ("gfx942", "token_merge._reduce_kernel"):
            assert row["wide_accesses"] > 0, f"no 16-byte access: {row}"
        assert row["atomics"] == 0, f"atomics make runs differ: {row}"
        assert (row["dots"] > 0) == (row["kernel"] == "kmeans._assign_kernel"), f"matrix instructions: {row}"
