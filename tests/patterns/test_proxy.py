"""Patterns that approximate what they do not list: the same lists, and the other blocks by their means in the same softmax."""

import pytest
import torch

from usv.patterns import PatternState, Text, attend, make_pattern
from usv.patterns.protocol import Clock
from usv.sparse.grid import TokenGrid

GRID = TokenGrid(4, 4, 4)
NO_WARM_UP = {"dense_layers": 0.0, "dense_steps": 0.0}
PATTERNS = [("svg", "svg", {"density": 0.4, "block": 8}), ("svg2", "svg2", {"density": 0.3, "q_clusters": 4, "k_clusters": 9}),
            ("tile_top_k", "tile_top_k_proxy", {"density": 0.3, "tile": (2, 2, 2)})]  # fmt: skip


def inputs(length: int):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, length, 8, generator=g) for _ in range(3)]


@pytest.mark.parametrize(("plain", "name", "options"), PATTERNS)
def test_unlisted_blocks_by_their_means(plain, name, options):
    """Written out: for every row exp of its listed tokens, and size times exp of the mean key of every other block."""
    q, k, v = inputs(GRID.num_tokens)
    option = {"proxy": True} if plain == name else {}
    pattern = make_pattern(name, **options, **option, **NO_WARM_UP)
    plan = pattern.plan(q, k, v, GRID, PatternState(), None, Clock(q.device))
    assert plan.proxy and not make_pattern(plain, **options, **NO_WARM_UP).plan(q, k, v, GRID, PatternState(), None, Clock(q.device)).proxy
    out, stats = attend(q, k, v, GRID, pattern, PatternState())
    s, wanted = plan.selection, torch.empty_like(out)
    mask = s.to_mask()
    for b in range(2):
        for h in range(2):
            orders = [order if order is None or order.dim() == 1 else order[b, h] for order in (plan.q_order, plan.kv_order)]
            q_order, kv_order = (torch.arange(GRID.num_tokens) if order is None else order for order in orders)
            layout = [x if x.dim() == 1 else x[b, h] for x in (s.q_sizes, s.kv_sizes)]
            q_blocks, kv_blocks = (order.split(sizes.tolist()) for order, sizes in zip((q_order, kv_order), layout))
            for m, rows in enumerate(q_blocks):
                logits, values = [], []
                for n, keys in enumerate(kv_blocks):
                    if not len(keys):
                        continue
                    listed = bool(mask[b, h, m, n])
                    kept = [x[b, h, keys].double() for x in (k, v)]
                    kept = kept if listed else [x.mean(0, keepdim=True) for x in kept]
                    score = q[b, h, rows].double() @ kept[0].T / 8**0.5
                    logits.append(score if listed else score + torch.tensor(len(keys)).log())
                    values.append(kept[1])
                wanted[b, h, rows] = (torch.cat(logits, 1).softmax(-1) @ torch.cat(values)).float()
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=2e-6)
    assert 0 < stats.density < 0.8


@pytest.mark.parametrize(("plain", "name", "options"), PATTERNS)
def test_beside_text_it_is_nearer_to_dense_attention(plain, name, options):
    """Text before the video, of two lengths: its blocks lie before the others though they are listed last."""
    q, k, v = inputs(5 + GRID.num_tokens)
    text = Text(5, True, torch.tensor([5, 3]))
    real = text.key_mask(GRID.num_tokens)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None]) * real[..., None]
    option = {"proxy": True} if plain == name else {}
    errors = []
    for pattern in (make_pattern(plain, **options, **NO_WARM_UP), make_pattern(name, **options, **option, **NO_WARM_UP)):
        out, _ = attend(q, k, v, GRID, pattern, PatternState(), text)
        errors.append(float((out - dense).norm()))
        torch.testing.assert_close(out[:, :, :5], dense[:, :, :5], rtol=1e-4, atol=1e-5)  # text rows list everything
    assert errors[1] < errors[0]
