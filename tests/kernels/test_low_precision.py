"""int8 and fp8 products of block_sparse_attention against fp64, and what is refused.

The oracle rounds by formulas of its own, block by block, and computes in fp64. With rounded q and k alone an implementation has to be
four times as near to it as it is to exact attention; with rounded probabilities, whose rounding depends on the maximum that was known, it
may err twice as much as the oracle. Beside that what the dtype itself costs is allowed (`attention_cases`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import usv_kernels
from attention_cases import GPU, dense, dense_logits, eager_errors, make_case
from companion_checks import assert_compiles
from usv_kernels import block_proxy, block_sparse_attention
from usv_kernels.block_sparse_attention import cpu, cpu_plan, low_precision, operator

FP8 = torch.float8_e4m3fn
INT8 = torch.int8
MODES = {"reference": [(INT8, None), (FP8, None), (INT8, FP8), (FP8, FP8)], "cpu": [(INT8, None)], "triton": [(INT8, None), (FP8, None), (INT8, FP8), (FP8, FP8)]}
RUNS = [(impl, *mode) for impl, modes in MODES.items() for mode in modes if not GPU or impl != "triton"]  # a GPU may not multiply them
LAYOUTS = {
    "tiles": dict(q_sizes=[16] * 4, kv_sizes=[16] * 5),
    "partial": dict(q_sizes=[16, 16, 16, 5], kv_sizes=[24, 24, 24, 7]),
    "two tiles a block": dict(q_sizes=[96, 96, 20], kv_sizes=[80, 80, 33]),
    "clusters": dict(q_sizes=[9, 70, 1, 0, 33], kv_sizes=[13, 0, 66, 2, 40], per_head=True),
}


@pytest.fixture(autouse=True)
def natively(monkeypatch):
    """The interpreter's GPU and this CPU multiply everything, as far as they are asked."""
    monkeypatch.setattr(low_precision, "multiplies_int8", lambda: True)


def rounded(x, largest, dtype):
    """x, rounded with `largest` at the top of the dtype."""
    top = 127 if dtype == INT8 else 448
    step = torch.where(largest == 0, 1.0, largest / top)
    scaled = x / step
    return (torch.round(scaled) if dtype == INT8 else scaled.float().to(dtype).double()) * step


def lowered(case, qk_dtype, pv_dtype):
    """out and lse in fp64 of the rounded inputs."""
    q, k, v = case.tensors[:3]
    s, mean = case.selection, k.mean(2, keepdim=True)
    low_q = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            starts, sizes = (x[b, h] if x.dim() == 3 else x for x in (s.q_starts, s.q_sizes))
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                rows = q[b, h, start : start + size]
                low_q[b, h, start : start + size] = rounded(rows, rows.abs().amax() if size else torch.tensor(0.0), qk_dtype)
    low_k = rounded(k - mean, (k - mean).abs().amax(-1, keepdim=True), qk_dtype)
    logits = low_q @ low_k.transpose(-1, -2) * case.scale + dense_logits(case)
    lse = torch.logsumexp(logits, -1)
    top = logits.amax(-1, keepdim=True)
    p = torch.where(top == float("-inf"), 0.0, torch.exp(logits - top))
    total = p.sum(-1, keepdim=True)
    if pv_dtype is not None:
        p = (p * 448).float().to(FP8).double() / 448
        v = rounded(v, v.abs().amax(2, keepdim=True), FP8)
    return [p @ v / torch.where(total == 0, 1.0, total), lse + (q * mean).sum(-1) * case.scale]


def attend(case, impl, qk_dtype, pv_dtype, dtype=torch.float32):
    q, k, v, bias, gate = (None if x is None else x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(case.tensors))
    return block_sparse_attention(q, k, v, case.selection, bias, gate, scale=case.scale, impl=impl, qk_dtype=qk_dtype, pv_dtype=pv_dtype)


def assert_low(case, impl, qk_dtype, pv_dtype, dtype=torch.float32):
    exact, low = dense(case)[:2], lowered(case, qk_dtype, pv_dtype)
    eager = eager_errors(case, dtype, dense(case))
    for name, result, truth, oracle, floor in zip(("out", "lse"), attend(case, impl, qk_dtype, pv_dtype, dtype), exact, low, eager):
        finite = truth != float("-inf")
        assert torch.equal(result == float("-inf"), ~finite), f"{name}: -inf in other places than the fp64 reference"
        result, truth, oracle = (x[finite].double() for x in (result, truth, oracle))
        cost = (oracle - truth).abs().max()
        error, share = ((result - truth, 2) if pv_dtype is not None else (result - oracle, 0.25))
        allowed = share * cost + 2 * floor + 32 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert error.abs().max() <= allowed, f"{name}: {error.abs().max():.3e} > {allowed:.3e}; rounding costs {cost:.3e}"
        assert pv_dtype is not None or dtype != torch.float32 or error.abs().mean() <= 0.05 * (oracle - truth).abs().mean() + 1e-6, name


@pytest.mark.parametrize(("impl", "qk_dtype", "pv_dtype"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, impl, qk_dtype, pv_dtype):
    assert_low(make_case(**LAYOUTS[layout], bias_heads=2), impl, qk_dtype, pv_dtype)


@pytest.mark.parametrize(("impl", "qk_dtype", "pv_dtype"), RUNS)
@pytest.mark.parametrize(
    ("dim", "qk_scale", "dtype"),
    [(32, 16.0, torch.bfloat16), (64, 1.0, torch.float16), (64, 4.0, torch.bfloat16), (96, 4.0, torch.float16), (128, 16.0, torch.bfloat16)],
)
def test_head_sizes_precisions_and_activation_scales(dim, qk_scale, dtype, impl, qk_dtype, pv_dtype):
    assert_low(make_case([16, 16, 9], [16, 16, 11], dim=dim, qk_scale=qk_scale, dtype=dtype), impl, qk_dtype, pv_dtype, dtype)


@pytest.mark.parametrize("qk_scale", (1.0, 16.0))
@pytest.mark.parametrize("uniform", (True, False))
def test_runs_batches_and_pieces_on_the_cpu(monkeypatch, uniform, qk_scale):
    """Several batches of a run, several runs of a head, lists in pieces, rows of a block that is cut; without bias and gates too."""
    for name, value in (("BATCH_ELEMENTS", 1), ("PIECE_ELEMENTS", 16 * 32), ("RUN_ROWS", 32), ("MAX_ROWS", 32)):
        monkeypatch.setattr(cpu_plan, name, value)
    mask = torch.ones(2, 2, 5, 6, dtype=torch.bool) if uniform else None
    for bias_heads, gate in ((0, False), (2, True)):
        assert_low(make_case([16] * 5, [16] * 6, mask=mask, bias_heads=bias_heads, gate=gate, qk_scale=qk_scale), "cpu", INT8, None)


def test_rounding_by_hand():
    """A row's products are those of integers: q's largest is 127, each key's is 127, and the mean key changes nothing but lse."""
    eye = torch.eye(2, dtype=torch.float64)
    values, scales = low_precision.round_queries(eye[None, None] * torch.tensor([1.0, 0.5]), torch.tensor([[[0, 1]]]), 2, INT8)
    assert values.tolist() == [[[[127, 0], [0, 127]]]] and torch.allclose(scales.flatten() * 127, torch.tensor([1.0, 0.5], dtype=torch.float64))
    keys, mean = low_precision.round_keys(torch.tensor([[[[3.0, 1.0], [5.0, 1.0]]]]), INT8)
    assert mean.tolist() == [[[[4.0, 1.0]]]] and keys.values.tolist() == [[[[-127, 0], [127, 0]]]]


@pytest.mark.parametrize("impl", MODES)
def test_keys_with_much_in_common_are_smoothed(impl):
    """Channels that are far from 0 in all keys alike, as a model's are: without smoothing they would take all of the 127 steps."""
    case = make_case([16] * 4, [16] * 5, dim=64)
    before = (attend(case, impl, INT8, None)[0].double() - dense(case)[0]).norm()
    case.tensors[1] = case.tensors[1] + 20 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out, lse = attend(case, impl, INT8, None)
    exact = dense(case)
    assert (out.double() - exact[0]).norm() <= 1.5 * before
    finite = exact[1] != float("-inf")
    assert (lse[finite].double() - exact[1][finite]).abs().max() <= 0.05 + 1e-5 * exact[1][finite].abs().max()


@pytest.mark.parametrize(("impl", "qk_dtype", "pv_dtype"), RUNS)
def test_zeros_and_a_single_key(impl, qk_dtype, pv_dtype):
    """Zero queries, keys that are all their mean, values of 0: uniform rows, and no NaN."""
    case = make_case([16, 16], [16], bias_heads=0, gate=False)
    case.tensors[0][:, :, :8] = 0
    case.tensors[1][:] = 1.0
    case.tensors[2][..., 3] = 0
    out, _ = attend(case, impl, qk_dtype, pv_dtype)
    mean = case.tensors[2].mean(2, keepdim=True).expand(-1, -1, 16, -1)
    assert (out[:, :, :16] == 0).all() and (out[:, :, 16:] - mean).abs().max() < (0.1 if pv_dtype else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_of_every_token(layout):
    s = make_case(**LAYOUTS[layout]).selection
    for starts, sizes in ((s.q_starts, s.q_sizes), (s.kv_starts + 3, s.kv_sizes)):
        length = int((starts + sizes).max()) + 2
        found = low_precision.block_of_token(starts, sizes, length).reshape(-1, length)
        for row, start, size in zip(found, starts.reshape(-1, starts.shape[-1]), sizes.reshape(-1, sizes.shape[-1])):
            expected = [next((m for m in range(len(start)) if start[m] <= t < start[m] + size[m]), len(start)) for t in range(length)]
            assert row.tolist() == expected


def test_refusals(monkeypatch):
    case = make_case([16, 16], [16, 16])
    q, k, v = (x.float() for x in case.tensors[:3])
    s = case.selection

    def refused(message, **named):
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, s, **{"impl": "cpu", "qk_dtype": INT8, **named})

    refused("^qk_dtype: got torch.int16, expected None, torch.int8 or torch.float8_e4m3fn", qk_dtype=torch.int16)
    refused("^qk_dtype: got None, expected", qk_dtype=None, pv_dtype=FP8)
    refused("^pv_dtype: got torch.int8, expected None or torch.float8_e4m3fn", pv_dtype=INT8)
    refused("^impl: got 'flex' with qk_dtype", impl="flex")
    refused("^proxy: got proxies with qk_dtype", proxy=block_proxy(k, v, s))
    refused("^qk_dtype: got torch.float8_e4m3fn, pv_dtype None on a CPU, expected torch.int8", qk_dtype=FP8)
    refused("^qk_dtype: got torch.int8, pv_dtype torch.float8_e4m3fn on a CPU", pv_dtype=FP8)
    monkeypatch.setattr(low_precision, "multiplies_int8", lambda: False)
    refused("^qk_dtype: got torch.int8 on a CPU without VNNI, expected qk_dtype=None")
    q.requires_grad_()
    refused("^qk_dtype: got torch.int8 with inputs that want gradients, expected a forward alone")


def test_auto_and_no_grad():
    case = make_case([16, 16], [16, 16], bias_heads=0, gate=False)
    q, k, v = (x.float().requires_grad_() for x in case.tensors[:3])
    with torch.no_grad():
        results = [block_sparse_attention(q, k, v, case.selection, qk_dtype=INT8, impl=impl) for impl in ("auto", "cpu")]
    assert all(torch.equal(a, b) for a, b in zip(*results)) and not results[0][0].requires_grad


def test_registration():
    case = make_case([16, 16], [16, 16])
    q, k, v = (x.float() for x in case.tensors[:3])
    arguments = (q, k, v, None, None, *case.selection.tensors(), 16, 16, 0.3, "cpu", INT8, None)
    torch.library.opcheck(operator.low_precision_op, arguments)


def test_it_compiles():
    case = make_case([16, 16], [16, 16], bias_heads=0, gate=False)
    q, k, v = (x.float() for x in case.tensors[:3])

    def attend_int8(q, k, v):
        return block_sparse_attention(q, k, v, case.selection, impl="cpu", qk_dtype=INT8)

    assert_compiles(attend_int8, q, k, v)


CODE = """
import torch
from usv_kernels import BlockSelection, absent_gpu, block_sparse_attention

sizes = torch.full((2,), 64)
selection = BlockSelection.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), sizes, sizes)
q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16)
for gpu in ("sm_80", "sm_86", "gfx90a", "gfx942", "gfx1100"):
    absent_gpu.become(gpu)
    for named in (dict(qk_dtype=torch.float8_e4m3fn), dict(qk_dtype=torch.int8, pv_dtype=torch.float8_e4m3fn)):
        try:
            block_sparse_attention(q, q, q, selection, impl="triton", **named)
        except ValueError as error:
            print(error)

from usv_kernels.block_sparse_attention import triton_launch

fp8, sizes = torch.float8_e4m3fn, torch.full((2,), 16)
selection = BlockSelection.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), sizes, sizes)
for gpu in ("sm_89", "sm_90"):  # whose products of fp8 take 32 keys or more
    absent_gpu.become(gpu)
    q = torch.zeros(1, 1, 32, 64, dtype=torch.bfloat16)
    triton_launch.forward_low_precision(q, q, q, selection.tensors(), None, None, 1.0, selection.q_max, selection.kv_max, fp8, fp8)
print("blocks of 16 compile")
"""


def test_gpus_that_do_not_multiply_fp8_are_refused_by_name():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(Path(usv_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    assert last == "blocks of 16 compile"
    for gpu, pair in zip(("sm_80", "sm_86", "gfx90a", "gfx942", "gfx1100"), zip(lines[::2], lines[1::2]), strict=True):
        for name, line in zip(("qk_dtype", "pv_dtype"), pair):
            assert line.startswith(f"{name}: got torch.float8_e4m3fn on {gpu}, which does not multiply it natively, expected one of None"), line


@pytest.mark.skipif(not getattr(torch.cpu, "_is_vnni_supported", lambda: False)(), reason="this CPU has no VNNI")
def test_integer_units_multiply():
    """oneDNN multiplies int8 itself, once for each query tile, on a CPU of whose integer units it knows."""
    code = (
        "import torch; from usv_kernels import BlockSelection, block_sparse_attention as attend; sizes = torch.full((4,), 64);"
        "q = torch.randn(1, 1, 256, 64); s = BlockSelection.from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), sizes, sizes);"
        "attend(q, q, q, s, impl='cpu', qk_dtype=torch.int8)"
    )
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "PYTHONPATH": str(Path(usv_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert any("cpu,isa:" in line and any(unit in line for unit in ("DL Boost", "VNNI", "AMX")) for line in lines), done.stdout[-2000:]
    products = [line for line in lines if ",exec,cpu," in line and "src_s8" in line.replace("src:s8", "src_s8") and "64x64:64x256" in line]
    assert len(products) == 4 and not any(",ref" in line for line in products), done.stdout[-2000:]


def test_the_cpu_path_rounds_one_head_at_a_time(monkeypatch):
    """In parts of a few keys: the same bits as at once."""
    from usv_kernels.block_sparse_attention import cpu_int8

    case = make_case([16] * 3, [16] * 4)
    whole = attend(case, "cpu", INT8, None)
    monkeypatch.setattr(cpu_int8, "AT_ONCE", 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, attend(case, "cpu", INT8, None)))
    assert cpu.Int8Logits is cpu_int8.Int8Logits
