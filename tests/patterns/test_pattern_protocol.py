import pytest
import torch
from pattern_reference import masked_attention, qkv

from usv.patterns import SVG, SVG2, PatternState, Radial, SlidingTile, Text, TileTopK, attend, make_pattern
from usv.patterns.protocol import Clock, is_dense, join_text, plan_recall
from usv.sparse.grid import TokenGrid

NO_WARM_UP = {"dense_layers": 0.0, "dense_steps": 0.0}
GRID = TokenGrid(4, 5, 6)
FULL = [
    SVG(density=1.0, block=16, **NO_WARM_UP),
    SVG2(top_p=1.0, q_clusters=7, k_clusters=11, **NO_WARM_UP),
    SVG2(num_kept=11, q_clusters=7, k_clusters=11, **NO_WARM_UP),
    Radial(decay=100.0, block=16, **NO_WARM_UP),
    SlidingTile(density=1.0, tile=(2, 2, 4), **NO_WARM_UP),
    TileTopK(density=1.0, tile=(2, 2, 4), **NO_WARM_UP),
]
SPARSE = [
    SVG(density=0.5, block=8, **NO_WARM_UP),
    SVG2(top_p=0.3, floor=0.0, q_clusters=7, k_clusters=11, **NO_WARM_UP),
    Radial(decay=0.3, block=8, **NO_WARM_UP),
    SlidingTile(window=(1, 2, 1), tile=(2, 2, 4), **NO_WARM_UP),
    TileTopK(density=0.25, tile=(2, 2, 4), **NO_WARM_UP),
]
TEXTS = [None, Text(9, True), Text(9, False), Text(9, False, torch.tensor([4, 9])), Text(9, True, torch.tensor([0, 5]))]


def name_of(value):
    return type(value).__name__ if not isinstance(value, Text) else f"{value.before}-{value.valid}"


def real_tokens(text, length):
    """(B, T + S) bool, counted token by token."""
    real = torch.ones(2, length, dtype=torch.bool)
    if text is not None and text.valid is not None:
        first = 0 if text.before else GRID.num_tokens
        for b, valid in enumerate(text.valid.tolist()):
            real[b, first + valid : first + text.num] = False
    return real


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
@pytest.mark.parametrize("pattern", FULL, ids=name_of)
def test_density_one_is_dense(pattern, text):
    length = GRID.num_tokens + (0 if text is None else text.num)
    q, k, v = qkv(2, 3, length, 16)
    real = real_tokens(text, length)
    expected = masked_attention(q, k, v, real[:, None, None]) * real[:, None, :, None]
    out, stats = attend(q, k, v, GRID, pattern, PatternState(recall_rows=9), text)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert stats.density == 1.0 and not stats.dense and stats.recall == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("text", TEXTS[1:], ids=name_of)
@pytest.mark.parametrize("pattern", SPARSE, ids=name_of)
def test_text_rows_and_columns_stay_dense(pattern, text):
    """The joint output is attention with the plan's video mask, framed by full text rows and columns."""
    length, num = GRID.num_tokens + text.num, GRID.num_tokens
    q, k, v = qkv(2, 3, length, 16, scale=2.0)
    plan = pattern.plan(q, k, v, GRID, PatternState(), text, Clock(q.device))
    first = text.num if text.before else 0
    mask = torch.ones(2, 3, length, length, dtype=torch.bool)
    blocks = plan.selection.to_mask()
    for b in range(2):
        for h in range(3):
            of = []
            for order, sizes in ((plan.q_order, plan.selection.q_sizes), (plan.kv_order, plan.selection.kv_sizes)):
                order = torch.arange(num) if order is None else order.expand(2, 3, num)[b, h]
                block = torch.empty(num, dtype=torch.long)
                block[order] = torch.repeat_interleave(sizes.expand(2, 3, sizes.shape[-1])[b, h].long())
                of.append(block)
            mask[b, h, first : first + num, first : first + num] = blocks[b, h][of[0]][:, of[1]]
    real = real_tokens(text, length)
    mask &= real[:, None, None] & real[:, None, :, None]
    out, stats = attend(q, k, v, GRID, pattern, PatternState(recall_rows=num), text)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)
    pairs = 3 * (real.sum(-1) ** 2).sum()
    assert stats.density == pytest.approx(float(mask.sum() / pairs), abs=1e-6) and stats.density < 0.9
    scores = (q.double() @ k.double().transpose(-1, -2) / 4).masked_fill(~real[:, None, None], float("-inf"))
    recall = (scores.softmax(-1) * mask).sum(-1)[:, :, first : first + num].mean()
    assert stats.recall == pytest.approx(float(recall), abs=1e-5)


def test_joining_text_to_a_shared_selection_copies_no_head():
    q, k, v = qkv(2, 3, GRID.num_tokens + 9, 8)
    text = Text(9, True)
    plan = SPARSE[2].plan(q, k, v, GRID, PatternState(), text, Clock(q.device))
    joint = join_text(plan.selection, text, GRID.num_tokens)
    assert joint.kv_indices.stride()[:2] == (0, 0)
    assert joint.to_mask()[:, :, -1].all() and joint.to_mask()[..., -1].all()


def test_warm_up_layers_and_steps_are_dense_and_exact():
    pattern = SVG2(q_clusters=2, k_clusters=2, dense_layers=0.03, dense_steps=0.2)
    dense = [(layer, step) for layer in range(30) for step in range(50)
             if is_dense(pattern, PatternState(layer, 30, step, 50))]  # fmt: skip
    # 0.03 · 30 = 0.9: the first layer; 0.2 · 50: ten steps.
    assert dense == [(layer, step) for layer in range(30) for step in range(50) if layer < 1 or step < 10]
    assert [is_dense(SVG(dense_layers=0.07, dense_steps=0), PatternState(layer, 100)) for layer in (6, 7)] == [True, False]
    q, k, v = qkv(2, 2, GRID.num_tokens, 8)
    out, stats = attend(q, k, v, GRID, pattern, PatternState(layer=0, num_layers=30, step=40, num_steps=50))
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, torch.tensor(True)), rtol=1e-5, atol=1e-5)
    assert stats.dense and stats.density == 1.0 and stats.seconds["cluster"] == 0


def test_half_precision_and_gradients_of_the_values():
    q, k, v = (x.bfloat16() for x in qkv(1, 2, GRID.num_tokens, 16))
    v.requires_grad_()
    for pattern in SPARSE:
        out, _ = attend(q, k, v, GRID, pattern, PatternState())
        (gradient,) = torch.autograd.grad(out.float().sum(), v)
        assert out.dtype == torch.bfloat16
        # Every output row is a mean of values, so gradients of the sum add up to rows · channels.
        assert float(gradient.float().sum()) == pytest.approx(out.numel(), rel=0.02)


def test_recall_without_text_of_a_shared_plan_uses_every_head():
    q, k, v = qkv(2, 2, GRID.num_tokens, 8, scale=3.0)
    plan = SPARSE[3].plan(q, k, v, GRID, PatternState(), None, Clock(q.device))
    whole = plan_recall(q, k, plan, None, 40)
    each = [plan_recall(q[b : b + 1, h : h + 1], k[b : b + 1, h : h + 1],
            SPARSE[3].plan(q[:1, :1], k, v, GRID, PatternState(), None, Clock(q.device)), None, 40)
            for b in range(2) for h in range(2)]  # fmt: skip
    assert float(whole) == pytest.approx(float(sum(each)) / 4, abs=1e-6)
    assert len({round(float(x), 4) for x in each}) > 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svg3", {}, r"attention: got 'svg3', accepted: svg, svg2, .*did you mean 'svg2?'\?"),
        ("slidingtile", {}, "did you mean 'sliding_tile'"),
        ("svg2", {"topp": 0.9}, "topp: got an unknown option of svg2, accepted: .*did you mean 'top_p'"),
        ("svg", {"density": 2}, "density: got 2"),
        ("svg", {"rows": 0}, "rows: got 0"),
    ],
)
def test_wrong_names_and_options_name_the_nearest(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_pattern(name, **options)


def test_a_grid_that_does_not_fit_is_refused():
    q, k, v = qkv(1, 1, GRID.num_tokens, 8)
    with pytest.raises(ValueError, match="grid: got None, accepted: the TokenGrid"):
        attend(q, k, v, None, SPARSE[0], PatternState())
    with pytest.raises(ValueError, match=r"q: got shape \(1, 1, 120, 8\), accepted: \(B, H, 129, D\)"):
        attend(q, k, v, GRID, SPARSE[0], PatternState(), Text(9, True))
    with pytest.raises(ValueError, match="k: got shape"):
        attend(q, k[:, :, 1:], v, GRID, SPARSE[0], PatternState())
