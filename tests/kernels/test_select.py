"""select: every row against a list sorted by hand, ties, forbidden blocks, floors, the mass top-p keeps, refusals."""

import pytest
import torch
from companion_checks import DEVICE, IMPLS, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from usv_kernels import select_top_k, select_top_p
from usv_kernels.select import _select

__all__ = ["poisoned"]
ALL = [*IMPLS, pytest.param("reference", DEVICE, id="reference")]
INF = float("inf")


def layout(scores, kv_sizes=None):
    rows, columns = scores.shape[2:]
    kv_sizes = [4] * columns if kv_sizes is None else kv_sizes
    q, kv = (torch.tensor(x, dtype=torch.int32, device=scores.device) for x in ([4] * rows, kv_sizes))
    return q.cumsum(0, dtype=torch.int32) - q, q, kv.cumsum(0, dtype=torch.int32) - kv, kv


def ranked(row):
    """Allowed blocks, best first; Python's sort key states the tie rule."""
    return sorted((n for n, s in enumerate(row) if s != -INF), key=lambda n: (-row[n], n))


def assert_rows(selection, expected):
    """expected: nested (B, H, M) lists of ascending block indices."""
    counts, lists = selection.kv_num_blocks.cpu(), selection.kv_indices.cpu()
    for b, heads in enumerate(expected):
        for h, rows in enumerate(heads):
            for m, row in enumerate(rows):
                assert counts[b, h, m] == len(row)
                assert lists[b, h, m].tolist() == sorted(row) + [0] * (lists.shape[-1] - len(row))


def by_hand(scores, num_kept):
    return [[[ranked(row)[:num_kept] for row in head] for head in batch] for batch in scores.tolist()]


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_kept", [1, 3, 9])
def test_top_k_with_ties(impl, device, dtype, num_kept, poisoned):
    torch.manual_seed(0)
    scores = torch.randint(-2, 3, (2, 2, 2, 9), device=device).to(dtype)  # five values for nine blocks
    scores[0, 0, 0] = 0.0
    scores[0, 0, 0, 0] = -0.0  # equal to 0, so the index decides and block 0 comes first
    scores[0, 1, 1, 2:] = -INF
    selection = select_top_k(scores, num_kept, *layout(scores), impl=impl)
    assert selection.kv_indices.shape[-1] == num_kept
    assert_rows(selection, by_hand(scores, num_kept))


@pytest.mark.parametrize(("impl", "device"), ALL)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), columns=st.integers(1, 20), seed=st.integers(0, 99))
def test_top_k_random(impl, device, data, columns, seed):
    num_kept = data.draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 3, (1, 2, 2, columns), generator=generator).float().to(device)
    scores[:, 1] *= torch.rand(columns, generator=generator).to(device)
    assert_rows(select_top_k(scores, num_kept, *layout(scores), impl=impl), by_hand(scores, num_kept))


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_counts_per_head_and_row(impl, device):
    scores = torch.randn(2, 3, 2, 8, device=device)
    per_head = torch.tensor([1, 5, 100], device=device)
    selection = select_top_k(scores, per_head, *layout(scores), impl=impl)
    assert selection.kv_num_blocks.tolist() == [[[1, 1], [5, 5], [8, 8]]] * 2
    per_row = torch.arange(12, device=device).view(2, 3, 2) % 6
    selection = select_top_k(scores, per_row, *layout(scores), capacity=5, impl=impl)
    assert selection.kv_indices.shape[-1] == 5
    expected = [[[ranked(row)[: max(int(n), 1)] for row, n in zip(*head, strict=True)] for head in zip(*batch,
    strict=True)]
                for batch in zip(scores.tolist(), per_row.tolist(), strict=True)]  # fmt: skip
    assert_rows(selection, expected)


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_forbidden_empty_and_nan(impl, device):
    scores = torch.randn(1, 1, 3, 6, device=device)
    scores[0, 0, 0] = -INF
    scores[0, 0, 1, 3] = float("nan")
    scores[0, 0, 2, :4] = -INF
    sizes = [4, 0, 4, 4, 4, 0]
    for selection in (
        select_top_k(scores, 2, *layout(scores, sizes), impl=impl),
        select_top_p(scores, 1e-6, 0.3, *layout(scores, sizes), impl=impl),
    ):
        mask = selection.to_mask()[0, 0]
        assert not mask[0].any(), "a row without allowed blocks is empty"
        assert mask[1, 3], "a NaN must show"
        assert mask[2].tolist() == [False] * 4 + [True, False]
        assert not mask[:, [1, 5]].any(), "empty key blocks are never listed"
    per_head = torch.tensor(sizes, dtype=torch.int32, device=device).expand(1, 1, 6).contiguous()
    q_starts, q_sizes, _, _ = layout(scores)
    selection = select_top_k(scores, 6, q_starts, q_sizes, per_head, per_head, impl=impl)
    assert not selection.to_mask()[..., [1, 5]].any()
    equal = torch.ones(1, 1, 1, 64, device=device)
    for nan in (float("nan"), -float("nan")):  # of either sign
        equal[..., 40] = nan  # the others are still a tie, for the lower indices
        assert_rows(select_top_k(equal, 5, *layout(equal), impl=impl), [[[[0, 1, 2, 3, 40]]]])


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_counts_above_the_capacity(impl, device):
    """As many as there are slots, never more: attention would read past the list."""
    scores = torch.randn(1, 2, 3, 8, device=device)
    rows = torch.tensor([[[2, 5, 100]] * 2], device=device)
    selection = select_top_k(scores, rows, *layout(scores), capacity=3, impl=impl)
    assert selection.kv_num_blocks.tolist() == [[[2, 3, 3]] * 2]
    expected = [[[ranked(row)[:n] for row, n in zip(head, (2, 3, 3), strict=True)] for head in batch] for batch in scores.tolist()]
    assert_rows(selection, expected)


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("columns", [600, 5000])
def test_many_blocks(impl, device, columns):
    """Rows that a Triton program holds with four warps, and with eight; runs are equal."""
    torch.manual_seed(5)
    scores = torch.randn(1, 1, 2, columns, device=device)
    scores[..., ::7] = 0.5
    selection = select_top_k(scores, columns // 3, *layout(scores), impl=impl)
    assert_rows(selection, by_hand(scores, columns // 3))
    assert torch.equal(select_top_k(scores, columns // 3, *layout(scores), impl=impl).kv_indices, selection.kv_indices)
    assert_top_p(scores, 0.7, 1, select_top_p(scores, 0.7, 0.0, *layout(scores), impl=impl))


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), INF])
def test_scores_without_a_mass(impl, device, value):
    """Softmax of a row with NaN or +inf says nothing: the row keeps its floor, led by that block, or all of them for p = 1."""
    scores = torch.tensor([[0.0, 1.0, 2.0, value, 0.5, -INF], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], device=device)[None, None]
    for p, floor, first in ((0.5, 0.0, [3]), (0.5, 0.5, [1, 2, 3]), (1.0, 0.0, [0, 1, 2, 3, 4])):
        mask = select_top_p(scores, p, floor, *layout(scores), impl=impl).to_mask()[0, 0]
        assert mask[0].nonzero().flatten().tolist() == first, (p, floor)
        assert mask[1, 0] and (p < 1.0 or mask[1].all())


def assert_top_p(scores, p, floor, selection):
    """A prefix of the ranking, which reaches p, and would not without its last block, or has just `floor` blocks."""
    mass = scores.double().softmax(-1).tolist()
    # Summing N masses in float32 is off by at most N roundings of a number below 1; so is each mass.
    slack = 2 * scores.shape[-1] * torch.finfo(torch.float32).eps
    mask = selection.to_mask().tolist()
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        row, order = mass[b][h][m], ranked(scores[b, h, m].tolist())
        kept = [n for n, listed in enumerate(mask[b][h][m]) if listed]
        assert kept == sorted(order[: len(kept)])
        reached = sum(row[n] for n in kept)
        assert reached >= p - slack or len(kept) == len(order)
        assert len(kept) >= min(floor, len(order))
        without_last = sum(row[n] for n in order[: len(kept) - 1])
        assert without_last < p + slack or len(kept) == floor


@pytest.mark.parametrize(("impl", "device"), ALL)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_top_p(impl, device, scale, poisoned):
    torch.manual_seed(0)
    scores = torch.randn(2, 1, 2, 30, device=device) * scale
    scores[1] = scores[1].round()
    for p, floor, least in ((0.5, 0.0, 1), (0.9, 0.1, 3), (0.999, 0.21, 7)):
        assert_top_p(scores, p, least, select_top_p(scores, p, floor, *layout(scores), impl=impl))
    assert select_top_p(scores, 1.0, 0.0, *layout(scores), impl=impl).to_mask().all()


@pytest.mark.parametrize(("impl", "device"), ALL)
def test_top_p_crossing_and_ties(impl, device):
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25] * 4], device=device).log().view(1, 1, 2, 4)

    def kept(p, floor=0.0):
        mask = select_top_p(scores, p, floor, *layout(scores), impl=impl).to_mask()[0, 0]
        return [[n for n in range(4) if row[n]] for row in mask.tolist()]

    assert kept(0.45) == [[0], [0, 1]]
    assert kept(0.6) == [[0, 1], [0, 1, 2]]
    assert kept(0.8) == [[0, 1, 2], [0, 1, 2, 3]]  # of two equal blocks only the lower one is needed
    assert kept(0.1) == [[0], [0]]
    assert kept(0.1, floor=0.75) == [[0, 1, 2], [0, 1, 2]]


def test_floor_is_not_off_by_a_rounding():
    scores = torch.zeros(1, 1, 1, 100)
    scores[..., 0] = 50.0
    for impl in ("reference", "cpu"):
        counts = select_top_p(scores, 0.5, 0.07, *layout(scores), impl=impl).kv_num_blocks
        assert counts.item() == 7  # 0.07 * 100 is 7.000000000000001


def test_known_bounds_travel_with_the_selection():
    scores = torch.randn(1, 1, 2, 5)
    for chosen in (select_top_k(scores, 2, *layout(scores), q_max=7, kv_max=9), select_top_p(scores, 0.5, 0.0, *layout(scores), q_max=7, kv_max=9)):
        assert (chosen.q_max, chosen.kv_max) == (7, 9)
    assert select_top_k(scores, 2, *layout(scores)).kv_max == 0


def test_no_gradient_and_float64():
    scores = torch.randn(1, 1, 2, 5, dtype=torch.float64, requires_grad=True)
    for impl in ("reference", "cpu"):
        assert_rows(select_top_k(scores, 2, *layout(scores), impl=impl), by_hand(scores, 2))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_registration(impl, device):
    scores = torch.randn(1, 1, 2, 6, device=device)
    rows = torch.full((1, 1, 2), 2, dtype=torch.int32, device=device)
    torch.library.opcheck(_select, (scores, rows, 2, 2.0, 0, 2, impl))
    torch.library.opcheck(_select, (scores, rows, 0, 0.5, 2, 6, impl))
    turned = torch.randn(2, 5, 3, 6, device=device).transpose(1, 2)  # heads and rows lie the other way round
    checks = ("test_schema", "test_faketensor")  # which compare strides; the rest was seen above
    for fixed, p, capacity in ((2, 2.0, 2), (0, 2.0, 4), (0, 0.5, 6)):
        torch.library.opcheck(_select, (turned, torch.full((2, 3, 5), 2, dtype=torch.int32, device=device), fixed, p, 1, capacity, impl), test_utils=checks)

    where = layout(scores)

    def lists(scores):
        chosen = select_top_k(scores, 2, *where, impl=impl), select_top_p(scores, 0.5, 0.0, *where, impl=impl)
        return [x for c in chosen for x in (c.kv_num_blocks, c.kv_indices)]

    compiled = torch.compile(lists, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(lists(scores), compiled(scores), strict=True))


def test_refusals():
    scores = torch.randn(1, 2, 3, 4)
    where, wide = layout(scores), torch.zeros(1, 1, 1, 8193)
    for call, name in (
        (lambda: select_top_k(scores[0], 1, *where), "scores"),
        (lambda: select_top_k(scores.int(), 1, *where), "scores"),
        (lambda: select_top_k(scores, 0, *where), "num_kept"),
        (lambda: select_top_k(scores, 5, *where), "num_kept"),
        (lambda: select_top_k(scores, torch.ones(3), *where), "num_kept"),
        (lambda: select_top_k(scores, torch.ones(2), *where), "num_kept"),
        (lambda: select_top_k(scores, torch.ones(2, dtype=torch.int32, device="meta"), *where), "num_kept"),
        (lambda: select_top_k(scores, 3, *where, capacity=2), "capacity"),
        (lambda: select_top_k(scores, 1, *where[:3], where[3][:2]), "kv_sizes"),
        (lambda: select_top_k(scores, 1, *where[:3], where[3].to("meta")), "kv_sizes"),
        (lambda: select_top_p(scores, 0.0, 0.0, *where), "p"),
        (lambda: select_top_p(scores, 1.1, 0.0, *where), "p"),
        (lambda: select_top_p(scores, 0.5, -0.1, *where), "floor"),
        (lambda: select_top_p(scores, 0.5, 0.1, *where, impl="flex"), "impl"),
        (lambda: select_top_k(wide, 1, *layout(wide), impl="triton"), "scores"),
        (lambda: select_top_p(wide, 0.5, 0.1, *layout(wide), impl="triton"), "scores"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
            call()
