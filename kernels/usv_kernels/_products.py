"""Who multiplies fp32 matrices on a CPU: MKL, which is torch's choice, or oneDNN.

torch hands fp32 products to oneDNN only where they may be rounded to bf16. oneDNN does round where that is faster, on AMX, and
elsewhere multiplies in fp32 with all of AVX-512, which MKL leaves unused on AMD: the products of attention's batches ran at 180 to
200 GFLOP/s in MKL and at 345 to 390 in oneDNN, with the same errors (two cores of Zen 5, torch 2.13).
"""

import functools
from collections.abc import Callable

import torch


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX); without, bf16 products are slower than fp32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _switched(function: Callable, *arguments, **named):
    """The function's result with fp32 products in oneDNN. The switch is the process's: other threads' products go there too."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        return function(*arguments, **named)
    finally:
        settings.fp32_precision = before


@functools.cache
def _rounds() -> bool:
    """Whether oneDNN rounds operands on this CPU: 1 + 2**-10 is 1 in bf16."""
    x = torch.full((1, 64, 64), 1 + 2.0**-10)
    return bool((_switched(torch.bmm, x, x) < 64.06).any())  # 64.125, or 64


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
        return _switched(function, x, *arguments, **named) if in_onednn(x.dtype) else function(x, *arguments, **named)

    return run
