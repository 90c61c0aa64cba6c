"""block_sparse_attention against fp64: every implementation, layout, precision and gradient."""

from dataclasses import replace

import pytest
import torch
from attention_cases import GPU, NAMES, assert_close, assert_same_bits, dense, make_case, run
from hypothesis import given, settings
from hypothesis import strategies as st
from usv_kernels import BlockSelection, block_sparse_attention
from usv_kernels.block_sparse_attention import cpu, cpu_plan

IMPLS = ("reference", "cpu", "triton")
LAYOUTS = {
    "tiles": dict(q_sizes=[16] * 4, kv_sizes=[16] * 5),
    "partial": dict(q_sizes=[16, 16, 16, 5], kv_sizes=[24, 24, 24, 7]),
    "two tiles a block": dict(q_sizes=[96, 96, 20], kv_sizes=[80, 80, 33]),
    "clusters": dict(q_sizes=[9, 70, 1, 0, 33], kv_sizes=[13, 0, 66, 2, 40], per_head=True),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_every_gradient(impl, layout):
    case = make_case(**LAYOUTS[layout], bias_heads=2)
    assert_close(run(case, impl), case, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=("fp32", "fp16", "bf16"))
@pytest.mark.parametrize(("dim", "qk_scale"), [(32, 16.0), (64, 1.0), (64, 4.0), (64, 16.0), (96, 4.0), (128, 1.0), (128, 16.0)])
def test_head_sizes_precisions_and_activation_scales(impl, dtype, dim, qk_scale):
    case = make_case([16, 16, 9], [16, 16, 11], dim=dim, qk_scale=qk_scale, dtype=dtype)
    assert_close(run(case, impl, dtype), case, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("bias_heads", "gate"), [(0, False), (1, False), (2, False), (0, True)])
def test_without_bias_or_gate(impl, bias_heads, gate):
    case = make_case([16, 16, 16], [16, 16, 16], bias_heads=bias_heads, gate=gate)
    assert_close(run(case, impl), case, torch.float32)


@pytest.mark.parametrize("impl", ("cpu", "triton"))
def test_uniform_counts_take_the_unmasked_path(impl):
    order = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1)).argsort(-1)
    mask = torch.zeros(2, 2, 6, 6, dtype=torch.bool).scatter(-1, order[..., :3], True)
    for gate in (False, True):
        case = make_case([16] * 6, [16] * 6, mask=mask, gate=gate, bias_heads=0)
        assert_close(run(case, impl), case, torch.float32)


@pytest.fixture
def batches(monkeypatch):
    """Lets the CPU path batch as many tiles as asked, on any machine."""

    def limit(pairs: int) -> None:
        monkeypatch.setattr(cpu_plan, "BATCH_ELEMENTS", pairs)
        monkeypatch.setattr(cpu_plan.torch, "get_num_threads", lambda: 1)

    return limit


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("uniform", (True, False))
def test_heads_summed_apart_on_the_cpu(monkeypatch, batches, uniform, dtype):
    """The CPU path sums dK and dV part by part, a part being few heads of a long sequence: here one, in several batches."""
    batches(1)
    monkeypatch.setattr(cpu_plan, "PART_BATCHES", 1)
    mask = torch.ones(2, 2, 6, 5, dtype=torch.bool)
    mask[..., 2] = False
    if not uniform:
        mask[:, 0, 1, 3] = mask[:, 1, 4, 0] = False
    for sizes in ([16] * 5, [16] * 4 + [7], [16, 7, 16, 9, 16]):
        case = make_case([16] * 6, sizes, mask=mask, bias_heads=2, dtype=dtype)
        assert_close(run(case, "cpu", dtype), case, dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("qk_scale", (1.0, 16.0))
@pytest.mark.parametrize("layout", ("uniform", "tiles", "partial", "clusters"))
def test_long_lists_in_pieces_on_the_cpu(monkeypatch, layout, qk_scale, dtype):
    """Pieces of 32 tokens, the last one shorter, and some that hold only closed keys: the first of a list, and all of one."""
    monkeypatch.setattr(cpu_plan, "PIECE_ELEMENTS", 16 * 32)
    kv_sizes = {"partial": [16] * 6 + [7], "clusters": [13, 0, 66, 2, 40]}.get(layout, [16] * 7)
    mask = torch.ones(2, 2, 4, 7, dtype=torch.bool) if layout == "uniform" else None
    case = make_case([9, 70, 1, 16] if layout == "clusters" else [16] * 4, kv_sizes, mask=mask, bias_heads=2, qk_scale=qk_scale,
                     dtype=dtype, density=0.8, per_head=layout == "clusters")  # fmt: skip
    case.tensors[3][:, 0, :40] = float("-inf")
    case.tensors[3][1, 1] = float("-inf")
    assert_close(run(case, "cpu", dtype), case, dtype)
    narrow = []
    pieces = cpu_plan.pieces
    monkeypatch.setattr(cpu, "pieces", lambda *a: (narrow.append(piece.shape[2]) or piece for piece in pieces(*a)))
    assert_same_bits(run(case, "cpu", dtype), run(case, "cpu", dtype))
    assert max(narrow) <= 32


@pytest.mark.parametrize("rows", (1, 16, 40, 1000))
def test_runs_of_batches_on_the_cpu(monkeypatch, batches, rows):
    """Batches that are converted and written together have at most `RUN_ROWS` rows, or one batch: the same bits however many."""
    batches(1)
    results, longest = [], []
    for most in (16, rows):
        monkeypatch.setattr(cpu_plan, "RUN_ROWS", most)
        for mask in (torch.ones(2, 2, 5, 4, dtype=torch.bool), None):
            results.append(run(make_case([16] * 5, [16] * 4, mask=mask, bias_heads=2), "cpu"))
    query_rows = cpu_plan.query_rows
    monkeypatch.setattr(cpu, "query_rows", lambda *a: longest.append(query_rows(*a).shape[0]) or query_rows(*a))
    run(make_case([16] * 5, [16] * 4, mask=torch.ones(2, 2, 5, 4, dtype=torch.bool)), "cpu")
    assert max(longest) == max(1, min(rows // 16, 5))
    for first, second in zip(results[:2], results[2:], strict=True):
        assert_same_bits(first, second)


def rows_of_two(num_q: int, num_kv: int, uniform: bool) -> torch.Tensor:
    """A mask (2, 3, M, N) with two random blocks a row, and more in some rows unless uniform."""
    order = torch.rand(2, 3, num_q, num_kv, generator=torch.Generator().manual_seed(2)).argsort(-1)
    mask = torch.zeros(2, 3, num_q, num_kv, dtype=torch.bool).scatter(-1, order[..., :2], True)
    if not uniform:
        mask[:, 1, 2:] = True
    return mask


@pytest.mark.parametrize("tiles", (1, 8, 1000))  # of a batch: of five a head and thirty in all
@pytest.mark.parametrize("uniform", (True, False))
@pytest.mark.parametrize(("q_sizes", "kv_sizes"), [([16] * 4 + [9], [16] * 6), ([16] * 5, [16] * 5 + [7]), ([16] * 4 + [9], [16] * 5 + [7])])
def test_partial_last_tiles_on_the_cpu(batches, tiles, uniform, q_sizes, kv_sizes):
    """Tiles are gathered whole where they are whole and token by token where they are not; no input is padded in memory."""
    batches(tiles * 16 * 32)
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(q_sizes, kv_sizes, heads=3, mask=rows_of_two(5, 6, uniform), bias_heads=3, dtype=dtype)
        assert_close(run(case, "cpu", dtype), case, dtype)


@pytest.mark.parametrize("uniform", (True, False))
def test_tiles_that_a_row_does_not_list_are_never_read_on_the_cpu(uniform):
    """NaN in a whole tile and in the partial one: rows that list neither are as without, in the gradients too."""
    mask = rows_of_two(5, 6, uniform)
    mask[:, 1, 2:, 0] = mask[:, 1, 2:, 5] = False
    mask[..., :2, 5] = True
    clean = make_case([16] * 5, [16] * 5 + [7], heads=3, mask=mask)
    for spoiled in (slice(0, 16), slice(80, 87)):
        dirty = make_case([16] * 5, [16] * 5 + [7], heads=3, mask=mask)
        for i in (1, 2):
            dirty.tensors[i][:, :, spoiled] = float("nan")
        lists = mask[..., spoiled.start // 16].repeat_interleave(16, -1)
        for i, (a, b) in enumerate(zip(run(dirty, "cpu"), run(clean, "cpu"), strict=True)):
            if i in (0, 1, 2):  # out, lse, dq
                assert torch.equal(a[~lists], b[~lists]) and a[lists].isnan().any(), NAMES[i]


def test_inputs_that_are_views_of_one_tensor_on_the_cpu(batches):
    """As q, k, v of one projection are: contiguous each, at another place of the same memory."""
    batches(1)  # batches without the partial tile, too
    case = make_case([16] * 5, [16] * 5 + [5], mask=rows_of_two(5, 6, True), heads=3)
    expected = run(case, "cpu")

    def stacked(x):
        return torch.stack([torch.full_like(x, float("nan")), x])[1]

    assert_same_bits(run(case, "cpu", transform=stacked), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0)])
@pytest.mark.parametrize(("q_sizes", "kv_sizes"), [([16, 7], [16, 16, 5]), ([9, 14], [16, 5, 16])], ids=("tiles", "any"))
@pytest.mark.parametrize("per_head", (False, True))
def test_no_batch_and_no_head(impl, batch, heads, q_sizes, kv_sizes, per_head):
    case = make_case(q_sizes, kv_sizes, batch=batch, heads=heads, bias_heads=0)
    if per_head:
        sizes = (torch.tensor(x).expand(batch, heads, -1) for x in (q_sizes, kv_sizes))
        case.selection = BlockSelection.from_mask(case.selection.to_mask(), *sizes)
    out, lse, dq, dk, dv, _, dgate = run(case, impl)
    assert out.shape == dq.shape == (batch, heads, 23, 32) and dk.shape == dv.shape == (batch, heads, 37, 32)
    assert lse.shape == (batch, heads, 23) and dgate.shape == (batch, heads, 2, 3)


@pytest.mark.parametrize("impl", ("cpu", "triton"))
def test_without_known_bounds(impl):
    """q_max = kv_max = 0, as when the sizes lie on a GPU: tile tables and nested loops, several tiles in a block."""
    case = make_case([16, 140, 0, 5], [70, 16, 0, 3])
    s = case.selection
    case.selection = BlockSelection(*s.tensors())
    assert_close(run(case, impl), case, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_outside_every_block(impl):
    """A gap on either side: zeros and -inf for queries, zero gradients for keys, and NaN there must not spread."""
    case = make_case([16, 16, 16], [16, 16, 16])
    s = case.selection
    keep = torch.tensor([0, 2])
    mask = s.to_mask()[:, :, [0, 2]][..., [0, 2]].clone()
    mask[:, :, 1] = True
    small = BlockSelection.from_mask(mask, s.q_sizes[keep], s.kv_sizes[keep])
    case.selection = BlockSelection(small.kv_num_blocks, small.kv_indices, s.q_starts[keep], s.q_sizes[keep],
                                    s.kv_starts[keep], s.kv_sizes[keep])  # fmt: skip
    case.tensors[4] = case.tensors[4][:, :, :2, :2].contiguous()
    clean = run(case, impl)
    assert_close(clean, case, torch.float32)
    assert (clean[0][:, :, 16:32] == 0).all() and (clean[3][:, :, 16:32] == 0).all()
    if impl != "reference":  # which multiplies dense matrices, where 0 * NaN is NaN
        for i in (1, 2, 3):
            (case.tensors[i][:, :, 16:32]).fill_(float("nan"))
        assert_same_bits(run(case, impl), clean)


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_gates_and_closed_keys(impl):
    """-inf in gate or bias closes blocks and keys; a row with only closed keys behaves as an empty one."""
    case = make_case([16, 16, 16], [16, 16, 16])
    case.tensors[4][:, :, 1] = float("-inf")
    case.tensors[4][:, :, 2, 0] = float("-inf")
    case.tensors[3][..., 20:30] = float("-inf")
    results = run(case, impl)
    assert all(torch.isfinite(x).all() for i, x in enumerate(results) if i != 1)
    assert (results[0][:, :, :32] == 0).all() and (results[1][:, :, :32] == float("-inf")).all()
    assert_close(results, case, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("which", "value"), [(3, 200.0), (3, -200.0), (4, 200.0), (4, -200.0)])
def test_logits_that_exp_alone_cannot_hold(impl, which, value):
    """Small q and k under one large bias or gate for all: e^200 is inf in fp32 and e^-200 is 0, their softmax is neither."""
    case = make_case([16, 16, 5], [16, 16, 7])
    case.tensors[which] = case.tensors[which] + value
    assert_close(run(case, impl), case, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_unused_slots_are_never_read(impl):
    case = make_case([16, 16, 16, 5], [16, 16, 16, 16])
    clean = run(case, impl)
    s = case.selection
    poison = torch.where(torch.rand(s.kv_indices.shape) < 0.5, 2**31 - 1, -(2**31)).to(torch.int32)
    case.selection = BlockSelection(s.kv_num_blocks, torch.where(s.used_slots(), s.kv_indices, poison), *s.tensors()[2:], s.q_max, s.kv_max)
    case.tensors[4] = torch.where(s.used_slots(), case.tensors[4], float("nan"))
    dirty = run(case, impl)
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)
    assert (dirty[6][~s.used_slots()] == 0).all()


@pytest.mark.parametrize("impl", ("cpu", "triton"))
@pytest.mark.parametrize("layout", ("any", "tiles", "uniform tiles"))
def test_uninitialised_memory_is_never_read(impl, layout):
    """torch fills torch.empty with NaN in deterministic mode; inputs are views into NaN; strides are those of (B, S, H, D)."""

    def surrounded(x):
        if x.dim() != 4 or x.shape[-1] != 32:
            return x
        wide = torch.full((x.shape[0], x.shape[2] + 4, x.shape[1] + 2, 32), float("nan"), dtype=x.dtype, device=x.device)
        wide[:, 2:-2, 1:-1] = x.transpose(1, 2)
        return wide[:, 2:-2, 1:-1].transpose(1, 2)

    if layout == "any":
        case = make_case([16, 16, 70, 5], [16, 16, 70, 7])
    else:
        case = make_case([16] * 4 + [5], [16] * 5 + [7], heads=3, mask=rows_of_two(5, 6, layout == "uniform tiles"))
    clean = run(case, impl)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        dirty = run(case, impl, transform=surrounded)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(clean, dirty)


@pytest.mark.parametrize("impl", ("cpu", "triton"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_are_bit_equal(impl, layout):
    case = make_case(**LAYOUTS[layout], batch=1, dtype=torch.bfloat16)
    first = run(case, impl, torch.bfloat16)
    for _ in range(20 if GPU else 1):
        assert_same_bits(first, run(case, impl, torch.bfloat16))


@pytest.mark.parametrize("impl", ("reference", "cpu"))
def test_finite_differences_of_gate_and_bias(impl):
    case = make_case([3, 4, 5], [4, 3], dim=8, dtype=torch.float64)
    q, k, v, bias, gate = case.tensors

    def function(bias, gate):
        out, lse = block_sparse_attention(q, k, v, case.selection, bias, gate, impl=impl)
        return out, torch.where(lse.isinf(), 0.0, lse)

    assert torch.autograd.gradcheck(function, (bias.requires_grad_(), gate.requires_grad_()))


def test_finite_differences_of_the_triton_gate():
    """fp32 leaves about 3 digits to a central difference of step 1e-2; a wrong block sum is off by its own size."""
    case = make_case([16, 16, 7], [16, 16, 5], batch=1, heads=1)
    analytic = run(case, "triton")[6]
    for slot in ((0, 0, 1, 0), (0, 0, 1, 2), (0, 0, 2, 0)):
        values = []
        for step in (1e-2, -1e-2):
            gate = case.tensors[4].clone()
            gate[slot] += step
            moved = make_case([16, 16, 7], [16, 16, 5], batch=1, heads=1)
            moved.tensors[4] = gate
            out, lse, *_ = run(moved, "triton")
            finite = torch.isfinite(lse)
            values.append((out.double() * case.grad_out).sum() + (lse.double() * case.grad_lse)[finite].sum())
        numeric = (values[0] - values[1]) / 2e-2
        assert abs(numeric - analytic[slot]) <= 2e-3 * max(1.0, abs(numeric))


@pytest.mark.parametrize(("impl", "examples"), [("cpu", 25), ("triton", 8)])
def test_any_shape(impl, examples):
    sizes = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda x: sum(x) > 0)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(sizes, sizes, st.integers(1, 2), st.sampled_from((0.0, 0.3, 1.0)), st.booleans(), st.integers(0, 2**31))
    def check(q_sizes, kv_sizes, heads, density, per_head, seed):
        case = make_case(q_sizes, kv_sizes, batch=1, heads=heads, density=density, per_head=per_head, seed=seed)
        assert_close(run(case, impl), case, torch.float32)

    check()


def test_batching_of_ragged_rows_on_the_cpu(monkeypatch):
    """Many batches with padding inside each: the limits are lowered until the small case needs them."""
    from usv_kernels.block_sparse_attention import cpu_plan

    monkeypatch.setattr(cpu_plan, "BATCH_ELEMENTS", 3000)
    monkeypatch.setattr(cpu_plan, "MAX_ROWS", 20)
    for layout in (dict(q_sizes=[50, 9, 31, 18], kv_sizes=[40, 3, 25, 12], per_head=True), dict(q_sizes=[12] * 7 + [5], kv_sizes=[10] * 6 + [3])):
        case = make_case(**layout, batch=2, heads=3, bias_heads=3)
        assert_close(run(case, "cpu"), case, torch.float32)


@pytest.mark.parametrize("impl", ("cpu", "triton"))
def test_only_lse_or_only_out_is_differentiated(impl):
    case = make_case([16, 16], [16, 16])
    device = "cuda" if GPU and impl == "triton" else "cpu"
    for which, silent in ((0, "grad_lse"), (1, "grad_out")):
        leaves = [x.to(device, torch.float32, copy=True).requires_grad_() for x in case.tensors]
        q, k, v, bias, gate = leaves
        results = block_sparse_attention(q, k, v, case.selection.to(device), bias, gate, scale=case.scale, impl=impl)
        grad = (case.grad_out, torch.where(results[1].cpu().isinf(), 0.0, case.grad_lse))[which]
        results[which].backward(grad.to(results[which]))
        half = replace(case, **{silent: torch.zeros_like(getattr(case, silent))})
        assert_close([results[0].detach().cpu(), results[1].detach().cpu(), *(x.grad.cpu() for x in leaves)], half, torch.float32)


def test_rows_more_than_two_billion_elements_apart():
    """Element offsets beyond 2**31: rows 2**24 elements apart in memory that is reserved but never touched."""
    if GPU:
        pytest.skip("the interpreter shows it without 5 GB of GPU memory")
    from usv_kernels.block_sparse_attention import triton_launch

    case = make_case([16] * 9, [16, 16], batch=1, heads=1, density=0.2, dtype=torch.float16, bias_heads=0, gate=False)
    q, k, v = (x.half() for x in case.tensors[:3])
    far = torch.empty(144 * 2**24, dtype=torch.float16).as_strided((1, 1, 144, 32), (0, 0, 2**24, 1))
    far.copy_(q)
    results = []
    for x in (q, far):
        selection = case.selection.tensors()
        out, lse = triton_launch.forward(x, k, v, selection, None, None, case.scale, 16, 16)
        grads = triton_launch.backward(case.grad_out.half(), None, x, k, v, out, lse, selection, None, None, case.scale, 16, 16)
        results.append([out, lse, *grads[:3]])
    for near, spread in zip(*results, strict=True):
        assert torch.equal(near, spread)


def test_the_oracle_itself_against_autograd():
    """The textbook gradients of the oracle against torch's autograd through a plain softmax (no empty rows)."""
    case = make_case([4, 5], [6, 3], dim=8, mask=torch.tensor([[True, False], [True, True]]).expand(2, 2, 2, 2), dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in case.tensors]
    expected = dense(case)
    s = case.selection
    gate = torch.full((2, 2, 2, 2), float("-inf"), dtype=torch.float64)
    gate = gate.scatter(-1, s.kv_indices.long(), torch.where(s.used_slots(), leaves[4], float("-inf")))
    added = gate.repeat_interleave(s.q_sizes, 2).repeat_interleave(s.kv_sizes, 3) + leaves[3].unsqueeze(2)
    logits = leaves[0] @ leaves[1].transpose(-1, -2) * case.scale + added
    out, lse = logits.softmax(-1) @ leaves[2], logits.logsumexp(-1)
    torch.autograd.backward([out, lse], [case.grad_out, case.grad_lse])
    for truth, value in zip(expected, [out, lse, *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(value, truth, atol=1e-12, rtol=1e-12)
