"""Proxies of key blocks that are not listed: every implementation, layout, precision and gradient.

The oracle is that of attention itself (`attention_cases`): a proxy is one more key in a block of its own, listed by just the query
blocks that do not list the block it stands for, with its log size as key bias.
"""

import pytest
import torch
from attention_cases import GPU, NAMES, Case, assert_close, assert_same_bits, dense, eager_errors, make_case, run
from usv_kernels import BlockProxy, BlockSelection, block_proxy, block_sparse_attention
from usv_kernels.block_sparse_attention import cpu_plan, operator

IMPLS = ("reference", "cpu", "triton")
LAYOUTS = {
    "tiles": dict(q_sizes=[16] * 4, kv_sizes=[16] * 5),
    "partial": dict(q_sizes=[16, 16, 16, 5], kv_sizes=[24, 24, 24, 7]),
    "two tiles a block": dict(q_sizes=[96, 96, 20], kv_sizes=[80, 80, 33]),
    "clusters": dict(q_sizes=[9, 70, 1, 0, 33], kv_sizes=[13, 0, 66, 2, 40], per_head=True),
}


def make_proxy(case: Case, dtype, seed=1) -> BlockProxy:
    """Any keys, values and sizes, rounded to `dtype`, in fp64; the last block of the last head stands for nothing."""
    g = torch.Generator().manual_seed(seed)
    k = case.tensors[1]
    shape = (*k.shape[:2], case.selection.num_kv_blocks, k.shape[3])
    keys, values = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).double() for _ in range(2))
    sizes = torch.rand(shape[:3], generator=g, dtype=torch.float64).float().double() * 60 + 1
    sizes[:, -1, -1] = 0
    return BlockProxy(keys * k.std().round(), values, sizes)


def extended(case: Case, proxy: BlockProxy) -> Case:
    """The same attention without proxies."""
    q, k, v, bias, gate = case.tensors
    s = case.selection
    batch, heads, num_kv = proxy.keys.shape[:3]
    mask = s.to_mask()
    ones = torch.ones(batch, heads, num_kv, dtype=torch.int32)
    layout = [x.expand(batch, heads, -1) for x in (s.kv_starts, s.kv_sizes)]
    both = BlockSelection.from_mask(torch.cat((mask, ~mask), -1), s.q_sizes, torch.cat((layout[1], ones), -1))
    starts = torch.cat((layout[0], k.shape[2] + torch.arange(num_kv, dtype=torch.int32).expand_as(ones)), -1)
    both = BlockSelection(both.kv_num_blocks, both.kv_indices, s.q_starts, s.q_sizes, starts, torch.cat((layout[1], ones), -1))
    bias = torch.zeros(batch, 1, k.shape[2], dtype=torch.float64) if bias is None else bias
    bias = torch.cat((bias.expand(batch, heads, -1), proxy.sizes.log().expand(batch, heads, -1)), -1)
    if gate is not None:
        gates = torch.zeros(both.kv_indices.shape, dtype=torch.float64)
        gates[..., : s.capacity] = torch.where(s.used_slots(), gate, 0.0)
        gate = gates
    tensors = [q, torch.cat((k, proxy.keys), 2), torch.cat((v, proxy.values), 2), bias, gate]
    return Case(tensors, both, case.grad_out, case.grad_lse, case.scale)


def run_with(case: Case, proxy: BlockProxy, impl: str, dtype=torch.float32):
    """out, lse, gradients of q, k, v, key_bias, block_gate, and of the proxy's three tensors, on the CPU."""
    device = "cuda" if GPU and impl == "triton" else "cpu"
    plain = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (dtype,) * 3 + (plain,) * 2 + (dtype, dtype, plain)
    leaves = [None if x is None else x.to(device, t, copy=True).requires_grad_() for x, t in zip([*case.tensors, *proxy], kinds, strict=True)]
    q, k, v, bias, gate, *parts = leaves
    out, lse = block_sparse_attention(q, k, v, case.selection.to(device), bias, gate, scale=case.scale, impl=impl, proxy=BlockProxy(*parts))
    grad_lse = torch.where(lse.isinf(), 0.0, case.grad_lse.to(lse))
    torch.autograd.backward([out, lse], [case.grad_out.to(out), grad_lse])
    return [out.detach().cpu(), lse.detach().cpu(), *(None if x is None else x.grad.cpu() for x in leaves)]


def assert_proxied(results, case: Case, proxy: BlockProxy, dtype) -> None:
    """Every result within twice the error of eager attention in that dtype, as in `attention_cases.assert_close`."""
    both = extended(case, proxy)
    exact = dense(both)
    eager = dict(zip(NAMES, eager_errors(both, dtype, exact), strict=True))
    truth = dict(zip(NAMES, exact, strict=True))
    length, capacity = case.tensors[1].shape[2], case.selection.capacity
    bias = truth["dkey_bias"][..., :length]
    bias = bias if case.tensors[3] is None or case.tensors[3].shape[1] > 1 else bias.sum(1, keepdim=True)
    sizes = torch.where(proxy.sizes > 0, truth["dkey_bias"][..., length:] / proxy.sizes, 0.0)
    gates = None if case.tensors[4] is None else torch.where(case.selection.used_slots(), truth["dblock_gate"][..., :capacity], 0.0)
    wanted = [("out", truth["out"], "out"), ("lse", truth["lse"], "lse"), ("dq", truth["dq"], "dq"), ("dk", truth["dk"][:, :, :length], "dk"),
              ("dv", truth["dv"][:, :, :length], "dv"), ("dkey_bias", bias, "dkey_bias"),
              ("dblock_gate", gates, "dblock_gate"),
              ("dproxy keys", truth["dk"][:, :, length:], "dk"), ("dproxy values", truth["dv"][:, :, length:], "dv"),
              ("dproxy sizes", sizes, "dkey_bias")]  # fmt: skip
    for (name, right, bound), result in zip(wanted, results, strict=True):
        if right is None or result is None:
            assert result is None
            continue
        finite = torch.isfinite(right)
        assert torch.equal(torch.isfinite(result), finite), name
        error = (result[finite].double() - right[finite]).abs().max()
        allowed = 2 * eager[bound] + 32 * torch.finfo(torch.float32).eps * right[finite].abs().max()
        assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_every_gradient(impl, layout):
    """The first query block lists nothing, and has proxies alone; the second lists everything."""
    case = make_case(**LAYOUTS[layout], bias_heads=2)
    proxy = make_proxy(case, torch.float32)
    assert_proxied(run_with(case, proxy, impl), case, proxy, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=("fp32", "fp16", "bf16"))
@pytest.mark.parametrize(("dim", "qk_scale"), [(32, 1.0), (64, 4.0), (128, 16.0)])
def test_head_sizes_precisions_and_activation_scales(impl, dtype, dim, qk_scale):
    case = make_case([16, 16, 9], [16, 16, 11], dim=dim, qk_scale=qk_scale, dtype=dtype, bias_heads=1)
    proxy = make_proxy(case, dtype)
    assert_proxied(run_with(case, proxy, impl, dtype), case, proxy, dtype)


@pytest.mark.parametrize("dim", (96, 128))
def test_heads_walked_in_two_parts(monkeypatch, dim):
    """As on GPUs that multiply from registers: 64 channels and the rest, with proxies and without."""
    from usv_kernels.block_sparse_attention import triton_launch
    from usv_kernels.block_sparse_attention.tiles import Config

    monkeypatch.setattr(triton_launch, "config", lambda *_: Config(16, 16, 4, 2, halves=True))
    case = make_case([16, 9], [16, 11], dim=dim, batch=1, bias_heads=2)
    assert_close(run(case, "triton"), case, torch.float32)
    proxy = make_proxy(case, torch.float32)
    assert_proxied(run_with(case, proxy, "triton"), case, proxy, torch.float32)


@pytest.mark.parametrize("impl", ("cpu", "triton"))
def test_without_bias_and_gate_and_known_bounds(impl):
    """Counts that are equal everywhere, which is a path of its own on a CPU, and blocks whose size nobody knows."""
    mask = torch.zeros(2, 2, 5, 6, dtype=torch.bool)
    mask[..., :3] = mask[:, 1, :, 5] = True
    mask[:, 1, :, 0] = False
    case = make_case([16] * 4 + [7], [16] * 6, mask=mask, bias_heads=0, gate=False)
    proxy = make_proxy(case, torch.float32)
    one = case.selection.kv_sizes.double()  # shared by all heads, as `block_proxy` gives them
    results = run_with(case, proxy._replace(sizes=one), impl)
    assert_proxied(results[:-1] + [None], case, proxy._replace(sizes=one.expand(2, 2, -1)), torch.float32)
    assert_proxied(run_with(case, proxy, impl), case, proxy, torch.float32)
    case.selection = BlockSelection(*case.selection.tensors())
    assert_proxied(run_with(case, proxy, impl), case, proxy, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_that_exp_alone_cannot_hold(impl):
    """Proxies of e^-87 and e^87 beside each other: without a maximum the sum of a row has no fp32."""
    case = make_case([16, 16, 5], [16, 16, 7])
    proxy = make_proxy(case, torch.float32)
    proxy.sizes[:] = torch.tensor([1e-38, 1.0, 1e38], dtype=torch.float64)
    assert_proxied(run_with(case, proxy, impl), case, proxy, torch.float32)


@pytest.mark.parametrize("uniform", (True, False))
@pytest.mark.parametrize("qk_scale", (1.0, 16.0))
@pytest.mark.parametrize(("q_sizes", "kv_sizes"), [([16] * 7, [16] * 6), ([16] * 6 + [9], [16] * 5 + [7]), ([16, 9, 16, 1, 16], [16, 7, 16])])
def test_runs_of_a_head_on_the_cpu(monkeypatch, q_sizes, kv_sizes, qk_scale, uniform):
    """Several batches of a run meet the proxies in one product, several runs are a head's: of tiles, with a partial one, and of neither."""
    for name, value in (("BATCH_ELEMENTS", 1), ("RUN_ROWS", 48), ("PIECE_ELEMENTS", 16 * 32)):
        monkeypatch.setattr(cpu_plan, name, value)
    mask = torch.rand(2, 2, len(q_sizes), len(kv_sizes), generator=torch.Generator().manual_seed(4)).argsort(-1) < 2 if uniform else None
    case = make_case(q_sizes, kv_sizes, mask=mask, qk_scale=qk_scale, gate=not uniform, bias_heads=0 if uniform else 2)
    proxy = make_proxy(case, torch.float32)
    assert_proxied(run_with(case, proxy, "cpu"), case, proxy, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_keys_that_are_all_alike_it_is_dense_attention(impl):
    """Blocks of one key and any values, approximated by their means: whatever is listed, attention is that over everything."""
    case = make_case([16, 16, 5], [16, 24, 7], bias_heads=0, gate=False, dtype=torch.float32)
    s = case.selection
    first = s.kv_starts.repeat_interleave(s.kv_sizes)
    case.tensors[1] = case.tensors[1][:, :, first]
    q, k, v = (x.float() for x in case.tensors[:3])
    out, lse = block_sparse_attention(q, k, v, s, scale=case.scale, impl=impl, proxy=block_proxy(k, v, s))
    logits = case.tensors[0] @ case.tensors[1].transpose(-1, -2) * case.scale
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ case.tensors[2], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", ("cpu", "triton"))
def test_where_all_is_listed_nothing_is_approximated(impl):
    case = make_case([16, 16], [16, 16, 5], mask=torch.ones(2, 2, 2, 3, dtype=torch.bool))
    proxy = make_proxy(case, torch.float32)
    assert_same_bits(run_with(case, proxy, impl)[:7], run(case, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_outside_every_block_and_unused_slots(impl):
    """Query rows of no block have no proxies either; what lies in unused slots tells nobody what is listed."""
    case = make_case([16, 16, 16], [16, 16, 16])
    s = case.selection
    keep = torch.tensor([0, 2])
    small = BlockSelection.from_mask(s.to_mask()[:, :, keep], s.q_sizes[keep], s.kv_sizes)
    poison = torch.where(small.used_slots(), small.kv_indices, 2**31 - 1)
    case.selection = BlockSelection(small.kv_num_blocks, poison, s.q_starts[keep], s.q_sizes[keep], s.kv_starts, s.kv_sizes)
    case.tensors[4] = case.tensors[4][:, :, :2].contiguous()
    proxy = make_proxy(case, torch.float32)
    out, lse, dq, *_ = run_with(case, proxy, impl)
    assert (out[:, :, 16:32] == 0).all() and (dq[:, :, 16:32] == 0).all() and (lse[:, :, 16:32] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, :16]).all() and torch.isfinite(lse[:, :, 32:]).all()


@pytest.mark.parametrize("impl", ("cpu", "triton"))
@pytest.mark.parametrize("layout", ("partial", "clusters"))
def test_runs_are_bit_equal(impl, layout):
    case = make_case(**LAYOUTS[layout], batch=1, dtype=torch.bfloat16)
    proxy = make_proxy(case, torch.bfloat16)
    first, second = (run_with(case, proxy, impl, torch.bfloat16) for _ in range(2))
    assert all(a is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_many_query_tiles_are_summed_in_parts(monkeypatch):
    """The gradients of proxies are of several programs, each with a part of the queries; the last part is shorter."""
    from usv_kernels.block_sparse_attention import triton_launch

    case = make_case([16] * 69, [16] * 3, batch=1, heads=1, density=0.3)
    proxy, grids = make_proxy(case, torch.float32), []
    launch = triton_launch._launch
    monkeypatch.setattr(triton_launch, "_launch", lambda kernel, name, q, cfg, grid, *a, **k: grids.append((name, grid)) or launch(kernel, name, q, cfg, grid, *a, **k))
    assert_proxied(run_with(case, proxy, "triton"), case, proxy, torch.float32)
    assert dict(grids)["proxy_dkv"][1] == 2


@pytest.mark.parametrize("impl", ("reference", "cpu"))
@pytest.mark.parametrize("per_head", (False, True))
def test_finite_differences_through_the_means(impl, per_head):
    """q, k, v and key bias, whose gradients also come through the means."""
    case = make_case([3, 4, 5], [4, 3, 2], dim=8, dtype=torch.float64, per_head=per_head, batch=1)

    def function(q, k, v, bias):
        proxy = block_proxy(k, v, case.selection, bias)
        out, lse = block_sparse_attention(q, k, v, case.selection, bias, case.tensors[4], impl=impl, proxy=proxy)
        return out, lse

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case.tensors[:4]])


def test_means_of_any_layout():
    """Token by token: gaps, an empty block that claims to begin inside another, blocks out of order; a bias weighs tokens."""
    starts, sizes = torch.tensor([20, 22, 45, 7, 12]), torch.tensor([10, 0, 5, 5, 8])
    k, v = (torch.randn(2, 2, 50, 4, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(2, 1, 50, dtype=torch.float64)
    lists = torch.ones(2, 2, 1, dtype=torch.int32), torch.zeros(2, 2, 1, 1, dtype=torch.int32)
    for shape in ((5,), (2, 2, 5)):
        layout = (x.to(torch.int32).expand(shape).contiguous() for x in (starts, sizes))
        selection = BlockSelection(*lists, torch.zeros(1, dtype=torch.int32), torch.full((1,), 50, dtype=torch.int32), *layout)
        for added in (None, bias):
            weights = torch.ones(2, 1, 50, 1, dtype=torch.float64) if added is None else added.exp().unsqueeze(-1)
            keys, values, count = block_proxy(k, v, selection, added)
            for n, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
                w = weights[:, :, start : start + size]
                for x, mean in ((k, keys), (v, values)):
                    right = (x[:, :, start : start + size] * w).sum(2) / w.sum(2).clamp(min=1e-300) if size else torch.zeros(2, 2, 4).double()
                    torch.testing.assert_close(mean[:, :, n], right)
                torch.testing.assert_close(count.expand(2, 2, 5)[..., n], w.sum((2, 3)).expand(2, 2))


def test_refusals():
    case = make_case([16, 16], [16, 16])
    q, k, v = (x.float() for x in case.tensors[:3])
    good = block_proxy(k, v, case.selection)
    for proxy, message in (
        (good.keys, "^proxy: got Tensor, expected a BlockProxy"),
        (good._replace(keys=good.keys[:, :, :1]), r"^proxy.keys: got shape \(2, 2, 1, 32\), expected \(B, H, N, D\) = \(2, 2, 2, 32\)"),
        (good._replace(values=good.values.half()), "^proxy.values: got torch.float16, expected q's dtype torch.float32"),
        (good._replace(sizes=good.sizes[:1]), r"^proxy.sizes: got shape \(1,\)"),
        (good._replace(sizes=good.sizes.int()), "^proxy.sizes: got torch.int32, expected a floating dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, case.selection, proxy=proxy)
    for impl in ("flex", "flex_compiled"):
        with pytest.raises(ValueError, match=f"^impl: got '{impl}' with a proxy, expected impl='triton', 'cpu' or 'reference'"):
            block_sparse_attention(q, k, v, case.selection, impl=impl, proxy=good)


def test_registration_and_compilation():
    case = make_case([16, 16], [16, 9], bias_heads=0, gate=False)
    q, k, v = (x.float().requires_grad_() for x in case.tensors[:3])
    s, proxy = case.selection, make_proxy(case, torch.float32)
    parts = (proxy.keys.float().requires_grad_(), proxy.values.float().requires_grad_(), proxy.sizes.float().clamp(min=1.0).log().requires_grad_())
    torch.library.opcheck(operator.forward_op, (q, k, v, None, None, *s.tensors(), 16, 16, case.scale, "cpu", *parts))

    def function(q, k, v):
        return block_sparse_attention(q, k, v, s, scale=case.scale, impl="cpu", proxy=block_proxy(k, v, s))[0]

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v), function(q, k, v))
