"""Who multiplies fp32 matrices on a CPU: MKL, which is torch's choice, or oneDNN.

torch hands fp32 products to oneDNN only where they may be rounded to bf16. oneDNN does round where that is faster, on AMX, and
elsewhere multiplies in fp32 with all of AVX-512, which MKL leaves unused on AMD: the products of attention's batches ran at 180 to
200 GFLOP/s in MKL and at 345 to 390 in oneDNN, with the same errors (two cores of Zen 5, torch 2.13).
"""

import functools
import threading
from collections.abc import Callable

import torch


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX); without, bf16 products are slower than fp32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_mkl_exp() -> bool:
    """Whether torch.exp is MKL's on a CPU that it is made for: 12 us for 65,536 values where torch.exp2 takes 18 (on AMD four times as long)."""
    return torch.backends.mkl.is_available() and "Intel" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")


class Switch:
    """While a thread is inside, fp32 products run in oneDNN. The switch is the process's: those of other threads do too."""

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, "none"

    def __enter__(self):
        with self.lock:
            if self.inside == 0:
                self.before = torch.backends.mkldnn.matmul.fp32_precision
                if self.before == torch.backends.mkldnn.fp32_precision:
                    self.before = "none"  # so it was inherited, and shall follow what it is inherited from
                torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch.backends.mkldnn.matmul.fp32_precision = self.before


_onednn = Switch()


@functools.cache
def _rounds() -> bool:
    """Whether oneDNN rounds operands on this CPU: 1 + 2**-10 is 1 in bf16."""
    x = torch.full((1, 64, 64), 1 + 2.0**-10, dtype=torch.float32, device="cpu")
    with _onednn:
        return bool((torch.bmm(x, x) < 64.06).any())  # 64.125, or 64


@functools.cache
def in_onednn(dtype: torch.dtype) -> bool:
    """Whether products of values that came from `dtype` belong there: faster, and no less exact than they came."""
    amd = "AMD" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
    faster = torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_supported())
    return faster and (dtype == torch.bfloat16 or not _rounds())


def fast_products(function: Callable) -> Callable:
    """Runs a function of CPU tensors with its fp32 products where they are fastest without loss for the first argument's dtype.

    bf16 operands are exact either way; on AMX operands formed in fp32, as probabilities are, are rounded to bf16 as tensor cores
    want them. Sums and results stay fp32.
    """

    @functools.wraps(function)
    def run(x, *arguments, **named):
        if not in_onednn(x.dtype):
            return function(x, *arguments, **named)
        with _onednn:
            return function(x, *arguments, **named)

    return run
