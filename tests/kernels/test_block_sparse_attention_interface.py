"""block_sparse_attention as a product: refusals, announcements, torch.library, torch.compile, selections, cold import."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import usv_kernels
from attention_cases import GPU, assert_close, dense, make_case, run
from usv_kernels import BlockSelection, block_sparse_attention
from usv_kernels.block_sparse_attention import flex, operator, triton_launch
from usv_kernels.selection import inverted_lists, regular_tile


def arguments(**changes):
    case = make_case([16, 16, 5], [16, 16, 7])
    q, k, v, bias, gate = (x.float() for x in case.tensors)
    return {"q": q, "k": k, "v": v, "selection": case.selection, "key_bias": bias, "block_gate": gate} | changes


def selection(**changes):
    s = arguments()["selection"]
    names = ("kv_num_blocks", "kv_indices", "q_starts", "q_sizes", "kv_starts", "kv_sizes")
    return BlockSelection(**{**dict(zip(names, s.tensors(), strict=True)), **changes})


REFUSED = {
    "q: got shape": lambda: arguments(q=torch.zeros(2, 37, 32)),
    "q: got torch.int32": lambda: arguments(q=torch.zeros(2, 2, 37, 32, dtype=torch.int32)),
    "k: got shape": lambda: arguments(k=torch.zeros(2, 2, 39, 16)),
    "k: got torch.float16": lambda: arguments(k=torch.zeros(2, 2, 39, 32, dtype=torch.float16)),
    "v: got shape": lambda: arguments(v=torch.zeros(2, 2, 38, 32)),
    "v: got meta": lambda: arguments(v=torch.zeros(2, 2, 39, 32, device="meta")),
    "selection: got": lambda: arguments(selection="dense"),
    "selection.kv_indices: got shape": lambda: arguments(**{n: torch.zeros(1, 2, s, 32) for n, s in (("q", 37), ("k", 39), ("v", 39))}),
    "key_bias: got shape": lambda: arguments(key_bias=torch.zeros(2, 3, 39)),
    "key_bias: got torch.int64": lambda: arguments(key_bias=torch.zeros(2, 1, 39, dtype=torch.int64)),
    "block_gate: got shape": lambda: arguments(block_gate=torch.zeros(2, 2, 3, 2)),
    "impl: got 'cuda'": lambda: arguments(impl="cuda"),
    "kv_indices: got shape": lambda: selection(kv_indices=torch.zeros(2, 2, 3, dtype=torch.int32)),
    "kv_indices: got torch.int64": lambda: selection(kv_indices=torch.zeros(2, 2, 3, 3, dtype=torch.int64)),
    "kv_num_blocks: got shape": lambda: selection(kv_num_blocks=torch.zeros(2, 2, 4, dtype=torch.int32)),
    "q_starts: got shape": lambda: selection(q_starts=torch.zeros(4, dtype=torch.int32)),
    "kv_sizes: got shape": lambda: selection(kv_sizes=torch.zeros(2, 2, 3, dtype=torch.int32)),
    r"selection.kv_num_blocks: got \[9": lambda: arguments(selection=selection(kv_num_blocks=torch.full((2, 2, 3), 9, dtype=torch.int32))),
    r"selection.kv_num_blocks: got \[-1": lambda: arguments(selection=selection(kv_num_blocks=torch.full((2, 2, 3), -1, dtype=torch.int32))),
    r"selection.kv_indices: got \[3": lambda: arguments(selection=selection(kv_indices=torch.full((2, 2, 3, 3), 3, dtype=torch.int32))),
    r"selection.kv_indices: got \[-2": lambda: arguments(selection=selection(kv_indices=torch.full((2, 2, 3, 3), -2, dtype=torch.int32))),
    r"selection.q_sizes: got \[38": lambda: arguments(selection=selection(q_sizes=torch.tensor([16, 16, 6], dtype=torch.int32))),
    r"selection.kv_sizes: got \[40": lambda: arguments(selection=selection(kv_sizes=torch.tensor([16, 16, 8], dtype=torch.int32))),
    r"selection.kv_indices: got shape \(2, 2, 3, 0\)": lambda: arguments(selection=selection(kv_indices=torch.zeros(2, 2, 3, 0, dtype=torch.int32)), block_gate=None),
    r"selection.q_sizes: got \[16, 16\]": lambda: arguments(selection=selection(q_max=15)),
    r"selection.kv_sizes: got \[16, 16\]": lambda: arguments(selection=selection(kv_max=15)),
    "mask: got": lambda: BlockSelection.from_mask(torch.zeros(2, 3, 3), torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1])),
    "capacity: got 4": lambda: BlockSelection.from_mask(torch.ones(1, 1, 3, 3).bool(), torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1]), 4),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_argument_got_and_expected(message):
    with pytest.raises(ValueError, match=message) as error:
        given = REFUSED[message]()
        block_sparse_attention(**given)
    assert ", expected " in str(error.value)


def test_debug_makes_the_same_refusals_on_the_device(monkeypatch):
    """What a GPU runs in debug mode, here on CPU tensors: the conditions become device-side assertions, none waits."""
    from usv_kernels import _checks

    plain = _checks.require_each
    monkeypatch.setattr(_checks, "require_each", lambda *given: plain(*given, on_device=True))
    for message, given in REFUSED.items():
        if "\\[" in message:  # wrong values, not shapes
            name = message.split(":")[0]
            with pytest.raises(RuntimeError, match=f"{name}: expected "):
                block_sparse_attention(**given(), debug=True)
    block_sparse_attention(**arguments(), debug=True)


def test_values_are_looked_at_where_it_is_cheap_or_asked_for():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from usv_kernels._checks import looks_at_values

    assert looks_at_values(torch.zeros(1), False) and not looks_at_values(torch.zeros(1, device="meta"), True)
    with FakeTensorMode():
        assert not looks_at_values(torch.zeros(1), True)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(zip("qkv", [torch.zeros(2, 2, s, 40) for s in (37, 39, 39)], strict=True)), "D = 40"),
    (dict(zip("qkv", [torch.zeros(2, 2, s, 32, dtype=torch.float64) for s in (37, 39, 39)], strict=True)), "float64"),
])  # fmt: skip
def test_an_explicit_choice_never_falls_back(changes, message):
    with pytest.raises(ValueError, match=f"q: got .*{message}"):
        block_sparse_attention(**arguments(**changes), impl="triton")
    block_sparse_attention(**arguments(**changes), impl="cpu")


def test_auto_says_what_it_runs(caplog):
    import importlib

    importlib.import_module("usv_kernels.block_sparse_attention")._announced.clear()
    with caplog.at_level(logging.INFO, "usv_kernels"):
        auto = block_sparse_attention(**arguments())
        block_sparse_attention(**arguments())
    messages = [r.getMessage() for r in caplog.records if "block_sparse_attention" in r.getMessage()]
    assert messages == ["block_sparse_attention: impl=auto runs 'cpu' on cpu"]
    assert torch.equal(auto[0], block_sparse_attention(**arguments(), impl="cpu")[0])


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(("num_q", "num_kv"), [(0, 2), (2, 0), (0, 0)])
def test_no_blocks_on_a_side(impl, num_q, num_kv):
    """Tokens that no block covers attend to nothing and are attended by nobody, also where that is all of them."""
    device = "cuda" if GPU and impl == "triton" else "cpu"
    sizes = [torch.full((n,), 4, dtype=torch.int32, device=device) for n in (num_q, num_kv)]
    layout = [x for s in sizes for x in (s.cumsum(0, dtype=torch.int32) - s, s)]
    lists = BlockSelection(*(torch.zeros(*s, dtype=torch.int32, device=device) for s in ((1, 2, num_q), (1, 2, num_q, 1))), *layout)
    q, k, v = (torch.randn(1, 2, 8, 32, device=device, requires_grad=True) for _ in range(3))
    out, lse = block_sparse_attention(q, k, v, lists, impl=impl)
    assert out.eq(0).all() and lse.eq(float("-inf")).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


def test_import_and_run_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, usv_kernels
s = usv_kernels.BlockSelection.from_mask(torch.ones(1, 1, 2, 2).bool(), torch.tensor([4, 4]), torch.tensor([4, 4]))
q = torch.randn(1, 1, 8, 8, requires_grad=True)
out, _ = usv_kernels.block_sparse_attention(q, q, q, s)
out.sum().backward()
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
"""
    path = [*usv_kernels.__path__][0].rsplit("/", 1)[0]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path, "PATH": ""})


SHORT = ("test_schema", "test_autograd_registration", "test_faketensor")
UTILS = (*SHORT, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("impl", ("cpu", "triton"))
@pytest.mark.parametrize("extras", (True, False))
def test_opcheck(impl, extras):
    given = arguments()
    device = "cuda" if GPU and impl == "triton" else "cpu"
    tensors = [given[n].to(device).requires_grad_() for n in ("q", "k", "v")]
    tensors += [given[n].to(device).requires_grad_() if extras else None for n in ("key_bias", "block_gate")]
    lists = given["selection"].to(device)
    inputs = (*tensors, *lists.tensors(), lists.q_max, lists.kv_max, 0.3, impl)
    # AOT dispatch sees the operator and not its kernels, which the interpreter would run a dozen times: once is enough
    torch.library.opcheck(operator.forward_op, inputs, test_utils=UTILS if impl == "cpu" else SHORT)
    out, lse = operator.forward_op(*(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs))
    plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    for grad_lse in (torch.ones_like(lse), None):
        torch.library.opcheck(operator.backward_op, (torch.ones_like(out), grad_lse, *plain[:3], out, lse, *plain[3:]),
                              test_utils=("test_schema", "test_faketensor"))  # fmt: skip


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("impl", ("auto", "reference"))
def test_compile_fullgraph(impl, backend):
    """A mask becomes a selection inside the graph, gradients included: the same bits as eager."""
    torch._dynamo.reset()
    given = arguments()

    def step(q, k, v, bias, gate, mask, q_sizes, kv_sizes):
        lists = BlockSelection.from_mask(mask, q_sizes, kv_sizes)
        out, lse = block_sparse_attention(q, k, v, lists, bias, gate, impl=impl)
        return out * 2, lse

    s = given["selection"]
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (step, compiled):
        leaves = [given[n].clone().requires_grad_() for n in ("q", "k", "v", "key_bias", "block_gate")]
        out, lse = function(*leaves, s.to_mask(), s.q_sizes, s.kv_sizes)
        (out.sum() + torch.where(lse.isinf(), 0.0, lse).sum()).backward()
        results.append([out.detach(), lse.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("extras", (True, False))
def test_flex_attention_agrees(extras):
    case = make_case([16, 16, 5], [16, 16, 7], bias_heads=2 * extras, gate=extras)
    tensors = [None if x is None else x.float() for x in case.tensors]
    out, lse = block_sparse_attention(*tensors[:3], case.selection, *tensors[3:], scale=case.scale, impl="flex")
    truth = dense(case)
    rows = torch.isfinite(truth[1])
    torch.testing.assert_close(out.double(), truth[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double()[rows], truth[1][rows], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="impl: got 'flex' with inputs that require gradients"):
        block_sparse_attention(*(x.requires_grad_() for x in tensors[:3]), case.selection, impl="flex")


@pytest.mark.parametrize("last", [48, 20])
def test_compiled_flex_attention_agrees(last):
    """Also with a smaller last block on both sides: 32,760 tokens are not a multiple of 64."""
    g = torch.Generator().manual_seed(3)
    sizes = torch.tensor([48, 48, last]), torch.tensor([48, 48, 48, last])
    q, k, v = (torch.randn(2, 2, int(sizes[side].sum()), 32, generator=g) for side in (0, 1, 1))
    mask = torch.rand(2, 2, 3, 4, generator=g) < 0.6
    mask[..., 0] = True
    selection = BlockSelection.from_mask(mask, *sizes)
    (out, lse), truth = (block_sparse_attention(q, k, v, selection, impl=impl) for impl in ("flex_compiled", "reference"))
    torch.testing.assert_close(out, truth[0], atol=1e-5, rtol=1e-5)
    assert lse.isnan().all(), "FlexAttention gives the CPU no lse; if it does now, return it"
    partial = BlockSelection.from_mask(mask, sizes[0], torch.tensor([48, 48, 40, last + 8]))
    with pytest.raises(ValueError, match="kv_sizes: got other blocks, expected consecutive blocks of 48 tokens"):
        block_sparse_attention(q, k, v, partial, impl="flex_compiled")
    with pytest.raises(ValueError, match="impl: got 'flex_compiled' with a bias or gates"):
        block_sparse_attention(q, k, v, selection, key_bias=torch.zeros(2, 1, k.shape[2]), impl="flex_compiled")


def test_backward_tiles_for_small_blocks(monkeypatch):
    """What FlexAttention's backward chooses from on a Hopper GPU, in this thread and in new ones, has a tile that divides 64."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(InductorChoices, "get_flex_attention_bwd_configs", InductorChoices.get_flex_attention_bwd_configs)

    def sizes():
        found = V.choices.get_flex_attention_bwd_configs(128, torch.bfloat16, "cuda")
        return [{c.block_m1, c.block_n1, c.block_m2, c.block_n2} for c in found]

    assert {64} not in sizes(), "torch has such a tile now: offer_small_tiles can go"
    flex.offer_small_tiles()
    with ThreadPoolExecutor(1) as pool:
        assert {64} in sizes() and {64} in pool.submit(sizes).result()


@pytest.mark.parametrize("shared", (True, False))
def test_longest_lists_first(shared):
    """Key tiles in falling order of their lists' lengths, head by head, none lost; spare programs keep their 0 rows."""
    starts = torch.tensor([0, 16, 48], dtype=torch.int32)
    sizes = torch.tensor([16, 32, 8], dtype=torch.int32)
    layout = (starts, sizes) if shared else (starts.expand(1, 2, 3), sizes.expand(1, 2, 3))
    block, start, rows, _ = triton_launch.tile_table(*layout, 16, 0, 56)
    offsets = torch.tensor([[[0, 1, 6, 9], [0, 4, 5, 5]]], dtype=torch.int32)
    ordered = triton_launch._longest_first(block, start, rows, offsets)
    assert all(x.shape == (2, block.shape[1]) and x.is_contiguous() for x in ordered)
    for head, lengths in enumerate(([1, 5, 3], [4, 1, 0])):
        blocks = ordered[0][head].tolist()
        assert [lengths[n] for n in blocks] == sorted((lengths[n] for n in block[0].tolist()), reverse=True)
        tiles = sorted(zip(*(x[head].tolist() for x in ordered), strict=True))
        assert tiles == sorted(zip(*(x[0].tolist() for x in (block, start, rows)), strict=True))
        assert sorted(t[1:] for t in tiles if t[2]) == [(0, 16), (16, 16), (32, 16), (48, 8)]


def test_selection_round_trips():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 5, 4, generator=g) < 0.5
    q_sizes, kv_sizes = torch.tensor([3, 0, 7, 2, 9]), torch.tensor([4, 6, 1, 0])
    s = BlockSelection.from_mask(mask, q_sizes, kv_sizes)
    assert torch.equal(s.to_mask(), mask) and torch.equal(s.transpose().to_mask(), mask.transpose(-1, -2))
    assert s.q_starts.tolist() == [0, 3, 3, 10, 12] and s.kv_starts.tolist() == [0, 4, 10, 11]
    pairs = (mask * q_sizes[:, None] * kv_sizes).sum()
    assert float(s.density()) == pytest.approx(float(pairs / (21 * 11 * 6)))
    full = BlockSelection.from_mask(torch.ones(1, 1, 2, 2).bool(), torch.tensor([3, 4]), torch.tensor([5, 6]))
    assert float(full.density()) == 1.0 and (full.q_max, full.kv_max) == (4, 6)
    assert torch.equal(s.transpose().transpose().to_mask(), mask)
    narrow = BlockSelection.from_mask(mask, q_sizes, kv_sizes, capacity=int(mask.sum(-1).max()))
    assert torch.equal(narrow.to_mask(), mask)


def test_bounds_are_known_only_where_one_tile_fits():
    def bound(sizes):
        sizes = torch.tensor(sizes)
        return BlockSelection.from_mask(torch.ones(1, 1, len(sizes), 1).bool(), sizes, torch.tensor([1])).q_max

    assert [bound(x) for x in ([128, 128, 5], [48, 24, 12], [128, 5, 128], [0, 300])] == [128, 48, 0, 0]


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not GPU, reason="no GPU"))))
def test_regular_tiles(device):
    """Equal tiles from 0 to the end, the last one smaller or not, the same in every head; nothing else."""
    def tile(sizes, length, starts=None):
        sizes = torch.tensor(sizes, device=device)
        return regular_tile(sizes.cumsum(-1) - sizes if starts is None else torch.tensor(starts, device=device), sizes, length)

    assert [tile(s, n) for s, n in (([16, 16], 32), ([16, 16, 9], 41), ([7], 7), ([[8, 8, 3], [8, 8, 3]], 19))] == [16, 16, 7, 8]
    assert [tile(s, n) for s, n in (([], 0), ([0], 0), ([16, 16], 33), ([16, 9, 16], 41), ([16, 16, 0], 32), ([9, 16], 25))] == [0] * 6
    assert tile([16, 9, 16], 48, starts=[0, 16, 32]) == 0 and tile([[8, 8, 3], [8, 7, 4]], 19) == 0
    assert tile([8, 8], 17, starts=[1, 9]) == 0 and tile([8, 8], 16, starts=[8, 0]) == 0


def test_inverted_lists_are_sorted_and_complete():
    s = arguments()["selection"]
    offsets, entries = inverted_lists(s.kv_num_blocks, s.kv_indices, 3)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, (2, 2, 3))).tolist():
        span = entries[b, h, offsets[b, h, n] : offsets[b, h, n + 1]].tolist()
        expected = [m * 3 + slot for m in range(3) for slot in range(int(s.kv_num_blocks[b, h, m])) if s.kv_indices[b, h, m, slot] == n]
        assert span == expected


def test_tile_tables_cover_every_row_once():
    from usv_kernels.block_sparse_attention.triton_launch import tile_table

    for sizes, largest in (([5, 0, 40, 16, 1], 0), ([16, 16, 9], 16), ([32, 32, 7], 32)):
        sizes = torch.tensor(sizes, dtype=torch.int32)
        starts = sizes.cumsum(0, dtype=torch.int32) - sizes
        block, start, rows, first = (x[0].tolist() for x in tile_table(starts, sizes, 16, largest, int(sizes.sum())))
        owner = [None] * int(sizes.sum())
        for tile, (b, s, r) in enumerate(zip(block, start, rows, strict=True)):
            assert 0 <= r <= 16
            for row in range(s, s + r):
                assert owner[row] is None and first[b] <= tile < first[b + 1]
                owner[row] = b
        assert owner == [b for b, size in enumerate(sizes.tolist()) for _ in range(size)]


def test_no_block_at_all():
    """Zero blocks, zero tokens: shapes and zeros, no crash."""
    case = make_case([16], [16], density=0.0)
    for impl in ("reference", "cpu", "triton"):
        results = run(case, impl)
        assert_close(results, case, torch.float32)
        assert not any(x.any() for x in results[2:])
