"""The GPUs that the Triton kernels are compiled and checked for: what tile shapes and occupancy depend on, by name.

Asked of the device through Triton's own driver, which knows the name, and what a program may have of shared memory.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from ._checks import require

log = logging.getLogger("usv_kernels")
KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """unit: the kind of its matrix instructions. shared: bytes of shared memory that a program may use; total: of a multiprocessor
    (AMD: compute unit), which keeps `warps` warps at most. registers: of a lane, in units of `granule`; simds: that share them.

    Sources: CUDA programming guide, table of compute capabilities; LLVM's AMDGPU guide and the ISA documents of CDNA and RDNA.
    """

    name: str
    unit: str
    shared: int
    total: int
    warps: int
    simds: int = 4
    registers: int = 512
    granule: int = 8
    fp8: bool = False  # multiplies e4m3 natively
    int8: bool = True  # and int8, in the units that multiply bf16


def _nvidia(arch: int, unit: str, shared: int, warps: int, fp8: bool = True) -> Gpu:
    # On Blackwell's data centre parts Triton multiplies int8 by mma.sync, beside the units.
    return Gpu(f"sm_{arch}", unit, shared * KIB, (shared + 1) * KIB, warps, fp8=fp8, int8=unit != "tcgen05")


def _cdna(name: str, shared: int = 64, fp8: bool = False) -> Gpu:
    return Gpu(name, "mfma", shared * KIB, shared * KIB, 32, fp8=fp8)


def _rdna(name: str, registers: int = 1536, fp8: bool = False) -> Gpu:
    """Waves of 32 lanes, 16 on each of two SIMDs."""
    return Gpu(name, "wmma", 64 * KIB, 64 * KIB, 32, 2, registers, registers // 64, fp8)


GPUS = {gpu.name: gpu for gpu in (
    _nvidia(80, "mma.sync", 163, 64, False), _nvidia(86, "mma.sync", 99, 48, False), _nvidia(87, "mma.sync", 163, 48, False),
    _nvidia(89, "mma.sync", 99, 48), _nvidia(90, "wgmma", 227, 64), _nvidia(100, "tcgen05", 227, 64),
    _nvidia(103, "tcgen05", 227, 64), _nvidia(110, "tcgen05", 227, 48), _nvidia(120, "mma.sync", 99, 48), _nvidia(121, "mma.sync", 99, 48),
    _cdna("gfx90a"), _cdna("gfx942"), _cdna("gfx950", 160, True),
    _rdna("gfx1100"), _rdna("gfx1101"), _rdna("gfx1102", 1024), _rdna("gfx1103", 1024), _rdna("gfx1150", 1024), _rdna("gfx1151"),
    _rdna("gfx1200", fp8=True), _rdna("gfx1201", fp8=True),
)}  # fmt: skip
INSTEAD = "impl='flex', torch's FlexAttention, or impl='reference'"


def _order(name: str) -> int:
    """Names of one maker in the order of their age."""
    return int(name.removeprefix("sm_").removeprefix("gfx"), 16 if name.startswith("gfx") else 10)


@cache
def known(name: str) -> Gpu:
    """The row of a GPU; of one that is newer than the table, or between two of its rows, the one before it, announced.

    Raises ValueError: a GPU that the kernels do not run on.
    """
    if name in GPUS:
        return GPUS[name]
    before = [gpu for gpu in GPUS.values() if gpu.name[:2] == name[:2] and len(gpu.name) == len(name) and _order(gpu.name) < _order(name)]
    older = name.startswith("sm_") and _order(name) < 80 or name.startswith("gfx10")
    accepted = "sm_80 (Ampere) and newer, gfx90a (MI200) and newer, gfx1100 (RDNA 3) and newer"
    require(bool(before) and not older, "device", f"{name}, older than what these kernels run on", f"{accepted}; elsewhere {INSTEAD}")
    nearest = max(before, key=lambda gpu: _order(gpu.name))
    log.warning("usv_kernels: %s is not in the table of GPUs; it gets the tiles of %s", name, nearest.name)
    return replace(nearest, name=name)


@cache
def _asked(name: str, device: int) -> Gpu:
    from triton.runtime.driver import driver

    gpu = known(name)
    shared = driver.active.utils.get_device_properties(device).get("max_shared_mem", gpu.shared)
    if shared < gpu.shared:
        log.warning("usv_kernels: device %d, %s, lets a program have %d bytes of shared memory, %d are usual", device, name, shared, gpu.shared)
    return replace(gpu, shared=shared)


def gpu_of(x: Tensor) -> Gpu:
    """The GPU that Triton launches on now, which is that of `x` (`on_its_device`); in Triton's interpreter a Hopper.

    Raises ValueError: a GPU that the kernels do not run on, named, with what to use instead.
    """
    import triton
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        return GPUS["sm_90"]
    target = driver.active.get_current_target()
    name = str(target.arch).partition(":")[0] if target.backend == "hip" else f"sm_{target.arch}"
    return _asked(name, driver.active.get_current_device())
