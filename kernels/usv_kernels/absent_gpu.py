"""A GPU that is not here, as Triton's driver: the product's own launches specialise, compile and make Triton's check of resources.

CPU tensors stand for the GPU's, and nothing is launched, so results are what torch allocated. For the compile report and its
tests; in a process of its own, since the driver is the process's.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ._gpus import GPUS, Gpu, known

_numbers: dict[str, int] = {}


@dataclass
class AbsentDriver:
    """What Triton 3.6 to 3.9 ask of a driver."""

    gpu: Gpu

    def __post_init__(self):
        nvidia = self.gpu.name.startswith("sm_")
        self.number = _numbers.setdefault(self.gpu.name, len(_numbers))
        arch = int(self.gpu.name[3:]) if nvidia else self.gpu.name
        self.target = GPUTarget("cuda" if nvidia else "hip", arch, 64 if self.gpu.unit == "mfma" else 32)
        properties = {"max_shared_mem": self.gpu.shared, "max_num_regs": 65536, "multiprocessor_count": 100, "warpSize": self.target.warp_size}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties, load_binary=lambda *_: (1, 1, 0, 0, 1024), unload_module=lambda _: None)

    def launcher_cls(self, source, metadata):
        return lambda *arguments, **named: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def become(name: str) -> None:
    """From here on this process's Triton compiles for that GPU; CPU tensors are let through to it."""
    from . import _impl
    from .block_sparse_attention import triton_launch

    driver.set_active(AbsentDriver(GPUS[name] if name in GPUS else known(name)))
    triton_launch.runs_on = _impl.runs_on = lambda x: True


def compiled(kernel) -> list:
    """What a Triton function has been compiled to for the GPU of now, oldest first."""
    return list(kernel.device_caches[driver.active.get_current_device()][0].values())
