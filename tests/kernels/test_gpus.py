"""Which GPUs are served, with which tiles, and what the others are told before anything is launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import usv_kernels
from usv_kernels._gpus import GPUS, KIB, known

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("name", ["sm_70", "sm_75", "gfx900", "gfx906", "gfx1030", "gfx1036"])
def test_older_ones_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^device: got {name}, .*expected sm_80 .*; elsewhere impl='flex'.*impl='reference'"):
        known.__wrapped__(name)


@pytest.mark.parametrize(
    ("name", "nearest"), [("sm_130", "sm_121"), ("sm_101", "sm_100"), ("sm_88", "sm_87"), ("gfx951", "gfx950"), ("gfx1250", "gfx1201")]
)
def test_an_unknown_one_is_told_whose_tiles_it_gets(name, nearest, caplog):
    with caplog.at_level("WARNING", "usv_kernels"):
        gpu = known.__wrapped__(name)
    assert caplog.messages == [f"usv_kernels: {name} is not in the table of GPUs; it gets the tiles of {nearest}"]
    assert (gpu.name, gpu.unit, gpu.shared) == (name, GPUS[nearest].unit, GPUS[nearest].shared)


def test_every_known_one_has_tiles_for_every_kernel():
    """Of whatever block, and 64 rows have no more warps than share them: 16 rows each."""
    from usv_kernels.block_sparse_attention.tiles import config

    for gpu in GPUS.values():
        for kernel in ("forward", "dq", "dkv"):
            for dtype in (torch.bfloat16, torch.float32):
                for dim in (32, 64, 96, 128):
                    for largest in (0, 16, 48, 64, 128, 512):
                        cfg = config(kernel, dim, dtype, largest, largest, gpu)
                        assert min(cfg.BM, cfg.BN) >= 16 and (not cfg.halves or dim > 64), (gpu.name, kernel, dim, largest)
                        assert bool(cfg.nonkdim) == (gpu.unit == "mfma" and dtype == torch.bfloat16)


CODE = """
import torch
from dataclasses import replace
from triton.runtime.driver import driver
from usv_kernels import BlockSelection, absent_gpu, block_sparse_attention
from usv_kernels._gpus import GPUS
from usv_kernels.block_sparse_attention import triton_launch
from usv_kernels.block_sparse_attention.tiles import Config

sizes = torch.full((2,), 64)
selection = BlockSelection.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), sizes, sizes)
q = torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16)
launches = []
for kernel in ("forward_kernel", "delta_kernel"):
    function = getattr(triton_launch, kernel)
    run = function.run
    function.run = lambda *a, run=run, **k: launches.append(1) or run(*a, **k)

def attempt():
    try:
        block_sparse_attention(q, q, q, selection, impl="triton")
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)

absent_gpu.become("sm_89")
driver.set_active(absent_gpu.AbsentDriver(replace(GPUS["sm_89"], name="sm_75")))
attempt()
print("launched", len(launches))
driver.set_active(absent_gpu.AbsentDriver(GPUS["sm_89"]))
triton_launch.config = lambda *a: Config(128, 64, 8, 4)
attempt()
"""


def test_refusals_of_a_launch():
    """An old GPU before anything is launched; a tile that does not fit, with its sizes and a remedy."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(Path(usv_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, launched, too_large = done.stdout.splitlines()
    assert refused.startswith("ValueError device: got sm_75, ") and launched == "launched 0"
    assert too_large.startswith("TileDoesNotFit forward: got a tile of 128 x 64 with 8 warps and 4 stages for D = 128 and torch.bfloat16, which needs ")
    assert f"sm_89 has {99 * KIB}. Smaller tiles are taken for " in too_large and "impl='flex'" in too_large
