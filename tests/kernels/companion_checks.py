"""What the tests of the companion operations share: devices, error bounds and registration checks."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [pytest.param("cpu", "cpu", id="cpu"), pytest.param("triton", DEVICE, id="triton")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [1.0, 4.0, 16.0]


def assert_as_good_as_eager(name, actual, eager, exact):
    """Error against float64 at most twice that of eager PyTorch in the same dtype.

    The floor is one unit in the last place of the largest value: the result has to be rounded to its dtype once (half a
    unit), and eager's own error may happen to be zero.
    """
    assert actual.dtype == eager.dtype and actual.shape == exact.shape, name
    assert exact.dtype == torch.float64
    assert torch.isfinite(actual).all(), name
    if not exact.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def gradients(output, inputs, grad):
    return torch.autograd.grad(output, inputs, grad.to(output.dtype))


def assert_compiles(function, *inputs):
    """torch.compile without graph breaks gives the eager result and gradients, bit for bit."""
    torch._dynamo.reset()
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    eager = function(*inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    eager, compiled = ((y,) if isinstance(y, torch.Tensor) else tuple(y) for y in (eager, compiled))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
    if leaves:
        grad = torch.randn_like(eager[0])
        for a, b in zip(gradients(eager[0], leaves, grad), gradients(compiled[0], leaves, grad), strict=True):
            assert torch.equal(a, b)


def assert_compiles_once(function, calls):
    """Compiled without graph breaks, calls of several sizes and counts give the eager results from at most two builds: the first
    and one in which what varies is symbolic."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for inputs in calls:
        for a, b in zip(function(*inputs), compiled(*inputs), strict=True):
            assert torch.equal(a, b)
    assert len(calls) >= 3 and counter.frame_count <= 2, f"{counter.frame_count} builds for {len(calls)} calls"


def ragged_layout(sizes, device, gap=0):
    """starts and sizes (int32) of blocks in order, `gap` uncovered tokens before each one, and the sequence length."""
    starts, position = [], 0
    for size in sizes:
        starts.append(position + gap)
        position += gap + size
    return (*(torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, list(sizes))), position + gap)


@pytest.fixture
def poisoned():
    """Memory that was allocated but not written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
