"""Who multiplies fp32 on the CPU: only where it is exact for the dtype, and nobody's settings are changed."""

import threading

import pytest
import torch
from attention_cases import assert_close, make_case, run
from usv_kernels import _products


@pytest.fixture
def cpu(monkeypatch):
    """Makes this CPU another one: its name, whether it has AVX-512 and AMX, whether oneDNN rounds on it."""

    def pretend(name: str, avx512: bool, amx: bool, rounds: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(_products, "_rounds", lambda: rounds)
        _products.in_onednn.cache_clear()

    yield pretend
    _products.in_onednn.cache_clear()


@pytest.mark.parametrize(
    ("machine", "bf16", "fp32"),
    [
        (("AMD EPYC", True, False, False), True, True),
        (("AMD EPYC", True, False, True), True, False),  # should oneDNN learn to round there
        (("AMD EPYC", False, False, False), False, False),
        (("Intel Xeon", True, True, True), True, False),
        (("Intel Xeon", True, False, False), False, False),
    ],
)
def test_where_products_run(cpu, machine, bf16, fp32):
    cpu(*machine)
    assert _products.in_onednn(torch.bfloat16) == bf16
    assert _products.in_onednn(torch.float32) == _products.in_onednn(torch.float16) == fp32


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_the_setting_is_of_the_call_alone(cpu):
    cpu("Intel Xeon", True, True, True)
    seen = []

    @_products.fast_products
    def look(x, fail):
        seen.append(setting())
        assert not fail
        return x

    before = setting()
    for dtype, during in ((torch.bfloat16, "bf16"), (torch.float16, before), (torch.float32, before)):
        assert look(torch.empty(0, dtype=dtype), fail=False).dtype == dtype
        assert seen.pop() == during and setting() == before
        with pytest.raises(AssertionError):
            look(torch.empty(0, dtype=dtype), fail=True)
        assert seen.pop() == during and setting() == before


def test_overlapping_threads_leave_the_setting_as_it_was(cpu):
    """The first to come in may go first: the last to leave restores."""
    cpu("Intel Xeon", True, True, True)
    entered, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    @_products.fast_products
    def stay(x, event):
        entered.wait(10)
        return event.wait(10)

    before = setting()
    threads = [threading.Thread(target=stay, args=(torch.empty(0, dtype=torch.bfloat16), event)) for event in leave]
    for thread in threads:
        thread.start()
    entered.wait(10)
    for thread, event, during in zip(threads, leave, ("bf16", before), strict=True):
        assert setting() == "bf16"
        event.set()
        thread.join(10)
        assert setting() == during


def test_an_inherited_setting_is_still_inherited_afterwards(cpu):
    cpu("Intel Xeon", True, True, True)
    try:
        torch.backends.mkldnn.fp32_precision = "tf32"
        assert setting() == "tf32"
        _products.fast_products(torch.neg)(torch.empty(0, dtype=torch.bfloat16))
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert setting() == "ieee"
    finally:
        torch.backends.mkldnn.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_probe_is_fp32_whatever_the_default(dtype):
    plain = _products._rounds.__wrapped__()
    torch.set_default_dtype(dtype)
    try:
        assert _products._rounds.__wrapped__() == plain
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_multiplied_here_is_exact_to_fp32():
    """On this CPU, whatever it is: products of values that bf16 does not hold."""
    x = torch.randn(3, 64, 96, dtype=torch.float64).float()
    exact = x.double() @ x.double().transpose(1, 2)
    product = _products.fast_products(torch.bmm)(x, x.transpose(1, 2))
    assert (product - exact).abs().max() <= 96 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("qk_scale", (1.0, 16.0))
def test_attention_with_operands_rounded_as_on_amx(monkeypatch, qk_scale):
    """Operands rounded to bf16 before every product, as oneDNN does on AMX, stay within the bounds of bf16."""
    multiply, add = torch.bmm, torch.Tensor.baddbmm_

    def rounded(x):
        return x.bfloat16().float()

    monkeypatch.setattr(torch, "bmm", lambda a, b, out: multiply(rounded(a), rounded(b), out=out))
    monkeypatch.setattr(torch.Tensor, "baddbmm_", lambda s, a, b, **named: add(s, rounded(a), rounded(b), **named))
    case = make_case([64] * 4 + [21], [64] * 5, dim=64, qk_scale=qk_scale, dtype=torch.bfloat16)
    assert_close(run(case, "cpu", torch.bfloat16), case, torch.bfloat16)
