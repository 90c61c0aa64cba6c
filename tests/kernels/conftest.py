"""Triton's interpreter, made to multiply and to round as a GPU does, and on every machine alike."""

import sys

import numpy as np
import torch


def _products_of_hardware() -> None:
    """Triton 3.6 to 3.9's interpreter keeps bf16 as uint16, multiplies those integers in `tl.dot`, and truncates casts
    to bf16 instead of rounding to nearest even. Both are replaced by the arithmetic of the hardware (and of torch).

    It also leaves products to NumPy's BLAS, in whose AVX2 kernels q kᵀ and k qᵀ are summed in different orders. On a GPU they are
    not, and the backward counts on the error of a score being that of the forward: here every product is rounded once.
    """
    from triton.runtime import interpreter

    plain_convert = interpreter._convert_float

    def exact(handle):
        if handle.dtype.scalar.name == "fp8e4nv":
            return torch.from_numpy(np.array(handle.data).view(np.uint8)).view(torch.float8_e4m3fn).double().numpy()
        if handle.dtype.scalar.name != "bf16":
            return handle.data.astype(np.float64)
        bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = np.matmul(exact(a), exact(b)) + d.data
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    def convert(data, source, target, rounding):
        if (source.name, target.name) == ("fp32", "fp8e4nv"):
            return torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source.name, target.name) != ("fp32", "bf16"):
            return plain_convert(data, source, target, rounding)
        exact = torch.from_numpy(np.array(data, dtype=np.float32))
        return exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert


if not torch.cuda.is_available():
    assert "triton" not in sys.modules or sys.modules["triton"].knobs.runtime.interpret
    _products_of_hardware()
