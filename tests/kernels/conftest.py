"""Triton's interpreter, made to treat bf16 as a GPU does."""

import sys

import numpy as np
import torch


def _exact_bf16() -> None:
    """Triton 3.6 to 3.9's interpreter keeps bf16 as uint16, multiplies those integers in `tl.dot`, and truncates casts
    to bf16 instead of rounding to nearest even. Both are replaced by the arithmetic of the hardware (and of torch)."""
    from triton.runtime import interpreter

    plain_dot, plain_convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def to_float(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return plain_dot(self, to_float(a), to_float(b), d, input_precision, max_num_imprecise_acc)

    def convert(data, source, target, rounding):
        if (source.name, target.name) != ("fp32", "bf16"):
            return plain_convert(data, source, target, rounding)
        exact = torch.from_numpy(np.array(data, dtype=np.float32))
        return exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert


if not torch.cuda.is_available():
    assert "triton" not in sys.modules or sys.modules["triton"].knobs.runtime.interpret
    _exact_bf16()
