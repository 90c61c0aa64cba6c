"""How an operation runs: resolves `impl` and refuses what cannot run. Shared by all operations but attention.

`impl` is `reference` (plain torch, any device, any floating dtype, the oracle of the tests), `cpu` (faster, CPU
tensors), `triton` (GPU tensors, or CPU tensors in Triton's interpreter) or `auto`. `auto` says in the log what it
chose; an explicit choice never falls back to another one.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, require
from ._gpus import gpu_of

logger = logging.getLogger("usv_kernels")
_announced: set[tuple[str, str]] = set()

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def resolve(op: str, impl: str, x: Tensor, available: tuple[str, ...], limit: tuple | None = None) -> str:
    """The implementation to run `op` with for `x`; `available` holds the op's own ones.

    limit: what `require` takes, a condition without which Triton's does not run: auto then takes another, an explicit choice is refused.
    """
    require(impl in ("auto", *available), "impl", repr(impl), f"one of {('auto', *available)}")
    if impl == "auto":
        on_gpu = (
            x.device.type == "cuda"
            and "triton" in available
            and (limit is None or limit[0])
            and (not x.is_floating_point() or x.dtype in TRITON_DTYPES)
        )
        on_cpu = x.device.type == "cpu" and "cpu" in available
        impl = "triton" if on_gpu else "cpu" if on_cpu else "reference"
        if not torch.compiler.is_compiling() and (op, impl) not in _announced:
            _announced.add((op, impl))
            logger.info("%s: impl=auto runs %s on %s", op, impl, x.device.type)
    require(impl != "cpu" or x.device.type == "cpu", "impl", "'cpu' with a tensor on " + x.device.type, "a CPU tensor")
    if impl == "triton" and limit is not None:
        require(*limit)
    if impl == "triton" and x.is_floating_point():
        require(x.dtype in TRITON_DTYPES, "impl", f"'triton' with {x.dtype}", "float32, float16 or bfloat16")
    return impl


def check_float(name: str, x: Tensor, dims: int, letters: str) -> None:
    require(x.dim() == dims, name, f"shape {tuple(x.shape)}", letters)
    require(x.dtype in FLOAT_DTYPES, name, x.dtype, "float64, float32, float16 or bfloat16")


def check_integer(name: str, x: Tensor, device: torch.device) -> None:
    require(x.dtype in (torch.int32, torch.int64), name, x.dtype, "torch.int32 or torch.int64")
    require(x.device == device, name, f"device {x.device}", f"{device}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def custom_op(name: str) -> Callable:
    """Registers a function as one of our operators, which mutate nothing and run in the dtypes that they choose."""
    return lambda function: torch.library.custom_op(f"usv_kernels::{name}", outside_autocast(function), mutates_args=())


def outside_autocast(function: Callable) -> Callable:
    """Runs a function in the dtypes that it chose itself: autocast, which an operator's own code would inherit, multiplies fp32 in half precision."""

    @functools.wraps(function)
    def run(x, *arguments, **named):
        if x.device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(x.device.type):
            return function(x, *arguments, **named)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *arguments, **named)

    return run


def runs_on(x: Tensor) -> bool:
    """Whether Triton can work on the memory of x: a GPU's, or any in its interpreter."""
    import triton

    return x.device.type == "cuda" or triton.knobs.runtime.interpret


def require_triton(x: Tensor) -> None:
    """Called inside a Triton-backed op: a CPU tensor needs the interpreter, chosen before triton is imported; a GPU has to be one
    that the kernels run on."""
    require(runs_on(x), "impl", f"'triton' with a tensor on {x.device.type}",
            "a GPU tensor, or TRITON_INTERPRET=1 set before triton is first used")  # fmt: skip
    gpu_of(x)
