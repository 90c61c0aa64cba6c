"""Cases and the oracle of the block-sparse attention tests.

The oracle builds its mask token by token from the block lists, shares no code with the package, and computes in fp64.
`eager` is the same attention with operands, probabilities and dS rounded to the low precision and fp32 logits: what an
exact implementation in that precision must lose. Its rounding errors, and their maximum above all, depend on the order of
its sums, so the largest over a few orders of the channels counts. An implementation may err twice as much, plus 32 units of
fp32.
"""

from dataclasses import dataclass, replace

import torch
from usv_kernels import BlockSelection, block_sparse_attention

GPU = torch.cuda.is_available()
NAMES = ("out", "lse", "dq", "dk", "dv", "dkey_bias", "dblock_gate")


@dataclass
class Case:
    """Inputs in fp64, q and k already scaled; tensors that a test does not want are None."""

    tensors: list
    selection: BlockSelection
    grad_out: torch.Tensor
    grad_lse: torch.Tensor
    scale: float


def make_case(q_sizes, kv_sizes, batch=2, heads=2, dim=32, density=0.5, qk_scale=1.0, bias_heads=1, gate=True, seed=0,
              dtype=torch.float32, mask=None, per_head=False):  # fmt: skip
    """Random inputs, already rounded to `dtype`; the first query block lists nothing and the second everything."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, factor=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * factor).to(dtype).double()

    def shuffled(sizes):
        sizes = torch.tensor(sizes)
        if not per_head:
            return sizes
        rows = [sizes[torch.randperm(len(sizes), generator=g)] for _ in range(batch * heads)]
        return torch.stack(rows).view(batch, heads, -1)

    num_q, num_kv, q_len, kv_len = len(q_sizes), len(kv_sizes), sum(q_sizes), sum(kv_sizes)
    if mask is None:
        mask = torch.rand(batch, heads, num_q, num_kv, generator=g) < density
        mask[:, :, 0] = False
        if num_q > 1:
            mask[:, :, 1] = True
    selection = BlockSelection.from_mask(mask, shuffled(q_sizes), shuffled(kv_sizes))
    tensors = [
        randn(batch, heads, q_len, dim, factor=qk_scale),
        randn(batch, heads, kv_len, dim, factor=qk_scale),
        randn(batch, heads, kv_len, dim),
        randn(batch, bias_heads, kv_len) if bias_heads else None,
        randn(batch, heads, num_q, num_kv) if gate else None,
    ]
    # Not 1 / sqrt(D): a power of two would hide roundings of a pre-scaled operand.
    return Case(tensors, selection, randn(batch, heads, q_len, dim), randn(batch, heads, q_len), 0.9 / dim**0.5)


def dense_logits(case):
    """fp64 scores with bias and gate, -inf where nothing is listed; built token by token."""
    q, k, _, bias, gate = case.tensors
    s = case.selection
    added = torch.full((*q.shape[:3], k.shape[2]), float("-inf"), dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            layout = [x[b, h].tolist() if x.dim() == 3 else x.tolist() for x in (s.q_starts, s.q_sizes, s.kv_starts, s.kv_sizes)]
            for m, (start, size) in enumerate(zip(layout[0], layout[1], strict=True)):
                for slot in range(int(s.kv_num_blocks[b, h, m])):
                    n = int(s.kv_indices[b, h, m, slot])
                    value = 0.0 if gate is None else gate[b, h, m, slot]
                    added[b, h, start : start + size, layout[2][n] : layout[2][n] + layout[3][n]] = value
    return added if bias is None else added + bias.unsqueeze(2)


def block_sums(case, ds):
    """Sum of dS over every listed pair of blocks, (B, H, M, K)."""
    s = case.selection
    result = torch.zeros(s.kv_indices.shape, dtype=ds.dtype)
    for b, h, m in torch.cartesian_prod(*(torch.arange(x) for x in s.kv_num_blocks.shape)).tolist():
        layout = [x[b, h] if x.dim() == 3 else x for x in (s.q_starts, s.q_sizes, s.kv_starts, s.kv_sizes)]
        for slot in range(int(s.kv_num_blocks[b, h, m])):
            n = int(s.kv_indices[b, h, m, slot])
            rows = ds[b, h, layout[0][m] : layout[0][m] + layout[1][m]]
            result[b, h, m, slot] = rows[:, layout[2][n] : layout[2][n] + layout[3][n]].sum()
    return result


def dense(case, dtype=torch.float64):
    """out, lse and all gradients by the textbook formulas; below fp64 with the roundings of `dtype`."""
    work = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(x):
        return x.to(dtype).to(work)

    q, k, v, bias, _ = (None if x is None else x.to(work) for x in case.tensors)
    grad, grad_lse = case.grad_out.to(work), case.grad_lse.to(work)
    added = dense_logits(case).to(work)
    s = q @ k.transpose(-1, -2) * case.scale + added
    lse = torch.logsumexp(s, -1)
    empty = lse == float("-inf")
    p = torch.exp(s - torch.where(empty, float("inf"), lse).unsqueeze(-1))
    out = rounded(rounded(p) @ v)
    delta = (grad * out).sum(-1) - torch.where(empty, 0.0, grad_lse)
    ds = p * (grad @ v.transpose(-1, -2) - delta.unsqueeze(-1))
    dq, dk = rounded(ds) @ k * case.scale, rounded(ds).transpose(-1, -2) @ q * case.scale
    dv = rounded(p).transpose(-1, -2) @ grad
    columns = ds.sum(2)
    dbias = None if bias is None else columns if bias.shape[1] == columns.shape[1] else columns.sum(1, keepdim=True)
    dgate = None if case.tensors[4] is None else block_sums(case, ds)
    return [out, lse, rounded(dq), rounded(dk), rounded(dv), dbias, dgate]


def run(case, impl, dtype=torch.float32, transform=lambda x: x):
    """The implementation's out, lse and gradients, on the CPU."""
    device = "cuda" if GPU and impl == "triton" else "cpu"
    kinds = (dtype,) * 3 + (torch.float64 if dtype == torch.float64 else torch.float32,) * 2
    leaves = [None if x is None else x.to(device, t, copy=True).requires_grad_() for x, t in zip(case.tensors, kinds, strict=True)]
    inputs = [None if x is None else transform(x) for x in leaves]
    out, lse = block_sparse_attention(*inputs[:3], case.selection.to(device), *inputs[3:], scale=case.scale, impl=impl)
    grad_lse = torch.where(lse.isinf(), 0.0, case.grad_lse.to(lse))
    torch.autograd.backward([out, lse], [case.grad_out.to(out), grad_lse])
    results = [out.detach(), lse.detach(), *(None if x is None else x.grad for x in leaves)]
    return [None if x is None else x.cpu() for x in results]


def eager_errors(case, dtype, exact):
    """Largest error of every result over four orders of the channels of q and k, which leave the exact results alone."""
    g = torch.Generator().manual_seed(0)
    dim = case.tensors[0].shape[-1]
    largest = [0.0] * len(NAMES)
    for order in [torch.arange(dim), *(torch.randperm(dim, generator=g) for _ in range(3))]:
        q, k, *rest = case.tensors
        results = dense(replace(case, tensors=[q[..., order], k[..., order], *rest]), dtype)
        for i in (2, 3):
            results[i] = results[i][..., order.argsort()]
        for i, (result, truth) in enumerate(zip(results, exact, strict=True)):
            if truth is not None and (finite := torch.isfinite(truth)).any():
                largest[i] = max(largest[i], (result[finite].double() - truth[finite]).abs().max().item())
    return largest


def assert_close(results, case, dtype):
    """Every result within twice the error of `eager` against fp64."""
    exact = dense(case)
    for name, result, truth, eager in zip(NAMES, results, exact, eager_errors(case, dtype, exact), strict=True):
        if truth is None:
            assert result is None
            continue
        finite = truth != float("-inf")
        assert torch.equal(result == float("-inf"), ~finite), f"{name}: -inf in other places than the fp64 reference"
        if finite.any():
            truth = truth[finite]
            error = (result[finite].double() - truth).abs().max()
            allowed = 2 * eager + 32 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e} (2 x eager in {dtype} + floor)"


def assert_same_bits(first, second):
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert a is None and b is None or torch.equal(a, b), f"{name} differs in bits"
