"""The GPU that Triton kernels are launched on."""

import functools
from collections.abc import Callable

import torch


def on_its_device(function: Callable) -> Callable:
    """Runs a function that launches Triton kernels on the GPU of its first argument: Triton takes the current one, where the
    pointers of another GPU mean nothing."""

    @functools.wraps(function)
    def run(x, *arguments, **named):
        if x.device.type != "cuda":
            return function(x, *arguments, **named)
        with torch.cuda.device(x.device):
            return function(x, *arguments, **named)

    return run
