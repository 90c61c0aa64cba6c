"""token_merge: choices against a list sorted by hand, exact identities, both gradients, partial tiles, refusals."""

import math

import pytest
import torch
from companion_checks import (
    DEVICE,
    DTYPES,
    IMPLS,
    SCALES,
    assert_as_good_as_eager,
    assert_compiles,
    gradients,
    poisoned,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from usv_kernels.token_merge import MergeLayout, _match, _merge, _sum, _unmerge, gather_kept, match, merge, unmerge

__all__ = ["poisoned"]
ALL = [*IMPLS, pytest.param("reference", DEVICE, id="reference")]
CELLS = torch.tensor([[5, 1, 2, 0], [3, 4, 6, 7]])  # the dst of a cell is its first position, not its smallest


def cells_of(cells, size):
    """The cells of one tile as lists of present positions."""
    return [c for c in ([p for p in cell if 0 <= p < size] for cell in torch.as_tensor(cells).tolist()) if c]


def cosine(a, b):
    return (a @ b / (a.norm().clamp(min=1e-12) * b.norm().clamp(min=1e-12))).item()


def check_map(merge_map, descriptor, cells, sizes, counts):
    """Rebuilds what the map must say, in float64 and Python lists; where choices may tie, compares similarities."""
    descriptor, slack = descriptor.double().cpu(), 8 * descriptor.shape[-1] * torch.finfo(torch.float32).eps
    for b in range(descriptor.shape[0]):
        kept, slots = merge_map.kept_index[b].tolist(), merge_map.token_slot[b].tolist()
        assert kept == sorted(kept) and len(set(kept)) == len(kept) == sum(sizes) - sum(counts)
        start = 0
        for size, count in zip(sizes, counts, strict=True):
            similarity = {}
            for cell in cells_of(cells, size):
                for position in cell[1:]:
                    source, target = start + position, start + cell[0]
                    similarity[source] = cosine(descriptor[b, source], descriptor[b, target])
                    if source not in kept:
                        assert kept[slots[source]] == target
            gone = [s for s in range(start, start + size) if s not in kept]
            best = sorted(similarity, key=lambda s: (-similarity[s], s))[:count]
            assert len(gone) == count and set(gone) <= set(similarity)
            assert [round(similarity[s], 12) for s in best] == pytest.approx(
                sorted((similarity[s] for s in gone), reverse=True), abs=slack
            )
            start += size
        assert all(slots[s] == i for i, s in enumerate(kept))
        assert merge_map.sizes[b].tolist() == [slots.count(i) for i in range(len(kept))]


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_match(impl, device, dtype, poisoned):
    torch.manual_seed(0)
    sizes, counts = [8, 8, 5, 0, 1], [3, 6, 2, 0, 0]
    descriptor = torch.randn(2, 22, 40, device=device).to(dtype)
    descriptor[:, 3] = 0.0  # a dst without direction
    merge_map = match(descriptor, MergeLayout.build(CELLS, sizes, counts, device), impl=impl)
    check_map(merge_map, descriptor, CELLS, sizes, counts)
    assert torch.equal(merge_map.log_sizes(), merge_map.sizes.float().log())
    starts, kept = merge_map.layout.kept_starts.tolist(), merge_map.layout.kept_sizes.tolist()
    assert kept == [5, 2, 3, 0, 1] and starts == [0, 5, 7, 10, 10]


@pytest.mark.parametrize(("impl", "device"), ALL)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data(), cell=st.integers(1, 5), tile=st.integers(1, 20), width=st.integers(1, 40))
def test_random_layouts(impl, device, data, cell, tile, width):
    positions = data.draw(st.permutations(range(tile)))
    positions += [-1] * (-tile % cell)
    cells = torch.tensor(positions).view(-1, cell)
    sizes = data.draw(st.lists(st.integers(0, tile), min_size=1, max_size=2)) + [tile]
    sources = [sum(len(c) - 1 for c in cells_of(cells, n)) for n in sizes]
    counts = [data.draw(st.integers(0, n)) for n in sources]
    descriptor = torch.randn(2, sum(sizes), width, device=device)
    layout = MergeLayout.build(cells, sizes, counts, device)
    check_map(match(descriptor, layout, impl=impl), descriptor, cells, sizes, counts)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_ties_go_to_the_lower_position(impl, device):
    descriptor = torch.ones(1, 8, 16, device=device)
    merge_map = match(descriptor, MergeLayout.build(CELLS, [8], [4], device), impl=impl)
    assert merge_map.kept_index.tolist() == [[3, 5, 6, 7]]  # src are 0, 1, 2, 4, 6, 7
    descriptor[0, 6] = float("nan")
    merge_map = match(descriptor, MergeLayout.build(CELLS, [8], [2], device), impl=impl)
    assert merge_map.kept_index.shape == (1, 6) and 6 not in merge_map.kept_index.tolist()[0]


def eager_merge(x, merge_map):
    """The formula as written: sum, then divide, in x's own dtype."""
    index = merge_map.token_slot[..., None].expand(x.shape)
    kept = torch.zeros(*merge_map.kept_index.shape, x.shape[2], dtype=x.dtype, device=x.device)
    return kept.scatter_add(1, index, x) / merge_map.sizes[..., None].to(x.dtype)


def eager_unmerge(update, merge_map):
    return torch.stack([row[slot] for row, slot in zip(update, merge_map.token_slot, strict=True)])


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_merge_and_unmerge(impl, device, dtype, scale, poisoned):
    torch.manual_seed(1)
    layout = MergeLayout.build(CELLS, [8, 5, 8], [6, 2, 3], device)
    merge_map = match(torch.randn(2, 21, 16, device=device), layout, impl="reference")
    for function, oracle, rows in ((merge, eager_merge, 21), (unmerge, eager_unmerge, 10)):
        x = (torch.randn(2, rows, 48, device=device) * scale).to(dtype).requires_grad_()
        exact_x = x.detach().double().requires_grad_()
        out, low, exact = function(x, merge_map, impl=impl), oracle(x, merge_map), oracle(exact_x, merge_map)
        assert_as_good_as_eager(function.__name__, out, low, exact)
        grad = torch.randn_like(exact).to(dtype)
        found, low, exact = (gradients(*pair, grad)[0] for pair in ((out, x), (low, x), (exact, exact_x)))
        assert_as_good_as_eager(f"gradient of {function.__name__}", found, low, exact)


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identities_are_exact(impl, device, dtype):
    torch.manual_seed(2)
    x = torch.randn(2, 16, 24, device=device).to(dtype) * math.pi
    nothing = match(x, MergeLayout.build(CELLS, [8, 8], 0, device), impl=impl)
    assert nothing.is_identity and torch.equal(nothing.kept_index, torch.arange(16, device=device).expand(2, 16))
    assert torch.equal(merge(x, nothing, impl=impl), x) and torch.equal(unmerge(x, nothing, impl=impl), x)
    assert torch.equal(nothing.log_sizes(), torch.zeros(2, 16, device=device))
    # Seven equal tokens: in float32 (z + ... + z) / 7 is not z for most z.
    cells = torch.arange(8).view(1, 8)
    x = x[:, ::8].repeat_interleave(8, dim=1)
    merge_map = match(x, MergeLayout.build(cells, [8, 8], 6, device), impl=impl)
    merged = merge(x, merge_map, impl=impl)
    assert torch.equal(merged, gather_kept(x, merge_map)) and torch.equal(unmerge(merged, merge_map, impl=impl), x)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_more_channels_than_a_program_holds(impl, device):
    """Wan 2.1 has 1,536; a Triton program takes 1,024. And the same bits again."""
    torch.manual_seed(3)
    merge_map = match(torch.randn(1, 16, 16, device=device), MergeLayout.build(CELLS, [8, 8], 4, device), impl="reference")
    x = torch.randn(1, 16, 1100, device=device, requires_grad=True)
    merged = merge(x, merge_map, impl=impl)
    torch.testing.assert_close(merged, eager_merge(x, merge_map))
    spread = unmerge(merged, merge_map, impl=impl)
    assert torch.equal(spread, eager_unmerge(merged, merge_map))
    grad = torch.randn_like(spread)
    expected = gradients(eager_unmerge(eager_merge(x, merge_map), merge_map), x, grad)[0]
    found = gradients(spread, x, grad)[0]
    torch.testing.assert_close(found, expected)
    again = unmerge(merge(x, merge_map, impl=impl), merge_map, impl=impl)
    assert torch.equal(again, spread) and torch.equal(gradients(again, x, grad)[0], found)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_no_clip_and_no_token(impl, device):
    layout = MergeLayout.build(CELLS, [8, 8], 3, device)
    empty = match(torch.randn(0, 16, 4, device=device), layout, impl=impl)
    x = torch.randn(0, 16, 6, device=device, requires_grad=True)
    spread = unmerge(merge(x, empty, impl=impl), empty, impl=impl)
    assert spread.shape == (0, 16, 6) and gradients(spread, x, spread.detach())[0].shape == (0, 16, 6)
    nothing = MergeLayout.build(CELLS, [], 0, device)
    assert nothing.num_tokens == 0 and nothing.members.shape == (0, 3)


def test_gradcheck():
    merge_map = match(torch.randn(2, 13, 5), MergeLayout.build(CELLS, [8, 5], [4, 1]))
    x = torch.randn(2, 13, 2, dtype=torch.float64, requires_grad=True)
    update = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)
    for impl in ("reference", "cpu"):
        assert torch.autograd.gradcheck(lambda x, impl=impl: merge(x, merge_map, impl=impl), x)
        assert torch.autograd.gradcheck(lambda u, impl=impl: unmerge(u, merge_map, impl=impl), update)


def test_gather_kept_takes_rows_of_any_rank():
    merge_map = match(torch.randn(2, 16, 4, device=DEVICE), MergeLayout.build(CELLS, [8, 8], 3, DEVICE))
    for x in (torch.randn(2, 16, 3, 5), torch.randn(1, 16, 1, 4), torch.arange(16)[None]):
        found = gather_kept(x.to(DEVICE), merge_map)
        for b in range(2):
            assert torch.equal(found[b], x.to(DEVICE)[b % x.shape[0], merge_map.kept_index[b]])


def test_bound_of_the_kept_sizes():
    assert MergeLayout.build(CELLS, [8, 8], 3).kept_max == 5
    one_cell = torch.arange(200).view(1, 200)
    assert MergeLayout.build(one_cell, [200, 200, 90], [10, 10, 5]).kept_max == 190
    assert MergeLayout.build(one_cell, [200, 90, 200], [10, 5, 10]).kept_max == 0  # no one tile shape fits


def test_layout():
    one_count = MergeLayout.build(CELLS, [8, 4, 8, 1], 4)
    assert one_count.num_merged.tolist() == [4, 2, 4, 0]  # in proportion: 4 * 4 // 8, then no src is left
    assert one_count.num_kept_tokens == 11
    tile_cells = torch.tensor([[[0, 1, 2, 3]], [[3, 2, -1, -1]]])
    per_tile = MergeLayout.build(tile_cells, [4, 4], [3, 1])
    assert per_tile.dst.tolist() == [0, 0, 0, 0, 4, 5, 7, 7]
    assert per_tile.members[0].tolist() == [1, 2, 3] and per_tile.members[7].tolist() == [6, -1, -1]
    for bad, name in (
        ((torch.tensor([[0, 1], [1, 2]]), [4], 1), "cells"),
        ((torch.tensor([[0, 0]]), [4], 1), "cells"),
        ((torch.arange(4), [4], 1), "cells"),
        ((tile_cells, [4], 1), "cells"),
        ((CELLS, [8], 7), "num_merged"),
        ((CELLS, [8], -1), "num_merged"),
        ((CELLS, [8, 8], [1]), "num_merged"),
        ((CELLS, [8, -1], 0), "tile_sizes"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            MergeLayout.build(*bad)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration(impl, device):
    layout = MergeLayout.build(CELLS, [8, 8], 3, device)
    x = torch.randn(2, 16, 12, device=device, requires_grad=True)
    tensors = (layout.dst, layout.tile_starts, layout.tile_sizes, layout.num_merged, layout.kept_starts)
    torch.library.opcheck(_match, (x.detach(), *tensors, layout.num_kept_tokens, layout.max_tile, impl))
    found = match(x, layout, impl=impl)
    arrays = (found.kept_index, found.token_slot)
    torch.library.opcheck(_merge, (x, *arrays, found.sizes, layout.members, impl))
    torch.library.opcheck(_sum, (x.detach(), *arrays, layout.members, impl))
    torch.library.opcheck(_unmerge, (x[:, :10].detach().requires_grad_(), *arrays, layout.members, impl))

    def whole(x):
        found = match(x, layout, impl=impl)
        return unmerge(merge(x, found, impl=impl).sin(), found, impl=impl)

    assert_compiles(whole, x)


def test_refusals():
    layout = MergeLayout.build(CELLS, [8, 8], 3)
    x = torch.randn(2, 16, 4)
    found = match(x, layout)
    for call, name in (
        (lambda: match(x[0], layout), "descriptor"),
        (lambda: match(x[:, :15], layout), "descriptor"),
        (lambda: match(x.int(), layout), "descriptor"),
        (lambda: match(x[:0, :15], layout), "descriptor"),
        (lambda: merge(x[:, :15], found), "x"),
        (lambda: merge(x[:1], found), "x"),
        (lambda: unmerge(x, found), "update"),
        (lambda: gather_kept(x[:, :15], found), "x"),
        (lambda: gather_kept(torch.randn(3, 16, 4), found), "x"),
        (lambda: gather_kept(torch.randn(2, 15, 0), found), "x"),
        (lambda: merge(x, found, impl="fast"), "impl"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            call()
    large = MergeLayout.build(torch.arange(300).view(1, 300), [300], 3)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="^layout: got .*, expected "):
            match(torch.randn(1, 300, 4), large, impl="triton")
