"""Published sizes on a CPU: 32,760 tokens run, 75,600 and 119,056 are planned, and nothing is ever S × S."""

import resource
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from pattern_reference import qkv
from usv_kernels import inverse_permutation, permute

from usv.patterns import SVG, SVG2, PatternState, Radial, SlidingTile, Text, TileTopK, attend
from usv.patterns.protocol import Clock, executed_pairs, join_text
from usv.patterns.svg import token_major_order
from usv.sparse.grid import TokenGrid

NO_WARM_UP = {"dense_layers": 0.0, "dense_steps": 0.0}
WAN_480P, WAN_720P, HUNYUAN = TokenGrid(21, 30, 52), TokenGrid(21, 45, 80), TokenGrid(33, 45, 80)
svg2 = partial(SVG2, q_clusters=100, k_clusters=500, first_iters=2, **NO_WARM_UP)


@contextmanager
def memory_limit(more_bytes):
    """Allocations that grow the address space by more than this fail: independent of what ran before."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("pattern", [SVG(density=0.1, sink=False, **NO_WARM_UP), svg2(density=0.1)], ids=["svg", "svg2"])
def test_32760_tokens_run_and_sampled_rows_are_attention_over_the_listed_keys(pattern):
    q, k, v = qkv(1, 1, WAN_480P.num_tokens, 16)
    state = PatternState(num_steps=3)
    out, stats = attend(q, k, v, WAN_480P, pattern, state)
    assert 0.08 < stats.density < 0.12
    plan = pattern.plan(q, k, v, WAN_480P, PatternState(), None, Clock(q.device))
    order = torch.arange(WAN_480P.num_tokens)
    q_order, kv_order = (order if x is None else x[0, 0] for x in (plan.q_order, plan.kv_order))
    q_block, kv_block = (torch.repeat_interleave(x.flatten().long()) for x in (plan.selection.q_sizes, plan.selection.kv_sizes))
    listed = plan.selection.to_mask()[0, 0]
    for position in (0, 5000, 17123, 32759):
        token = q_order[position]
        keys = kv_order[listed[q_block[position]][kv_block]]
        weights = (k[0, 0, keys].double() @ q[0, 0, token].double() / 4).softmax(0)
        torch.testing.assert_close(out[0, 0, token].double(), weights @ v[0, 0, keys].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "num_text"), [(WAN_720P, 0), (HUNYUAN, 256)], ids=["wan_720p", "hunyuan"])
@pytest.mark.parametrize(
    "pattern",
    [SVG(density=0.25, **NO_WARM_UP), svg2(density=0.25), Radial(decay=0.25, **NO_WARM_UP), SlidingTile(tile=(3, 5, 8), **NO_WARM_UP),
     TileTopK(tile=(3, 5, 8), **NO_WARM_UP)],
    ids=lambda p: type(p).__name__,
)  # fmt: skip
def test_planning_needs_no_square_memory(grid, num_text, pattern):
    assert grid.num_tokens + num_text in (75600, 119056)
    text = Text(num_text, before=False) if num_text else None
    q, k, v = qkv(1, 2, grid.num_tokens + num_text, 8)
    with memory_limit(10**9):
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(grid.num_tokens, grid.num_tokens, dtype=torch.bool)  # 5.7 GB at 75,600 tokens
        plan = pattern.plan(q, k, v, grid, PatternState(), text, Clock(q.device))
        selection = plan.selection if text is None else join_text(plan.selection, text, grid.num_tokens)
        done, total = executed_pairs(selection)
    assert total == 2 * (grid.num_tokens + num_text) ** 2
    extra = 2 * num_text / (grid.num_tokens + num_text)
    # SVG adds the first frame's columns to a band of 0.25.
    low, high = {SVG: (0.25, 0.31), SVG2: (0.24, 0.25), TileTopK: (0.25, 0.26)}.get(type(pattern), (0.03, 0.35))
    assert low < done / total <= high + extra


@pytest.mark.parametrize("grid", [WAN_720P, HUNYUAN], ids=["wan_720p", "hunyuan"])
@pytest.mark.parametrize("pattern", [SVG(density=0.02, sink=False, **NO_WARM_UP), svg2(density=0.02)], ids=["svg", "svg2"])
def test_attention_needs_no_square_memory(grid, pattern):
    """Planning, permutation, attention and recall of a whole call, and its first and last row."""
    q, k, v = qkv(1, 1, grid.num_tokens, 8)
    with memory_limit(10**9):
        out, stats = attend(q, k, v, grid, pattern, PatternState(recall_rows=4))
    assert 0.015 < stats.density < 0.03 and 0 < stats.recall < 1
    plan = pattern.plan(q, k, v, grid, PatternState(), None, Clock(q.device))
    order = torch.arange(grid.num_tokens)
    q_order, kv_order = (order if x is None else x[0, 0] for x in (plan.q_order, plan.kv_order))
    ends = plan.selection.kv_sizes.flatten().long().cumsum(0)
    q_block = torch.repeat_interleave(plan.selection.q_sizes.flatten().long())
    for position in (0, -1):
        block = q_block[position]
        blocks = plan.selection.kv_indices[0, 0, block][: plan.selection.kv_num_blocks[0, 0, block]].long()
        sizes = plan.selection.kv_sizes.flatten().long()
        keys = torch.cat([kv_order[ends[b] - sizes[b] : ends[b]] for b in blocks])
        weights = (k[0, 0, keys].double() @ q[0, 0, q_order[position]].double() / 8**0.5).softmax(0)
        torch.testing.assert_close(out[0, 0, q_order[position]].double(), weights @ v[0, 0, keys].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [TokenGrid(21, 52, 68), WAN_720P, HUNYUAN], ids=lambda grid: str(grid.num_tokens))
@pytest.mark.parametrize("per_head", [False, True])
def test_74256_tokens_and_more_return_to_their_places(per_head, grid):
    order = token_major_order(grid)
    if per_head:
        generator = torch.Generator().manual_seed(0)
        order = torch.stack([order, torch.randperm(grid.num_tokens, generator=generator)])[None]
    x = qkv(1, 2, grid.num_tokens, 4)[0]
    moved = permute(x, order)
    assert not torch.equal(moved, x)
    assert torch.equal(permute(moved, inverse_permutation(order)), x)
