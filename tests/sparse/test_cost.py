"""usv/sparse/cost.py: its formulas against a count of real forwards, operation by operation, and the known numbers of Wan2.1."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from usv.models.forward import SparseTransformer
from usv.sparse.cost import ModelShape, block_flops, dense_flops, plan_cost, rung_costs, rung_flops
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import RUNGS, Rung, SparsityPlan, timestep_bins

TEXT = 6


@pytest.fixture(scope="module")
def model():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=48, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return SparseTransformer(transformer, Tile(2, 2, 2)).eval()


def attention_flops(q, k, v, key_bias, block_gate, num_blocks, indices, q_starts, q_sizes, kv_starts, kv_sizes, *_, **__):
    """Two products of 2·D for each executed token pair, counted pair of blocks by pair of blocks from the lists."""
    pairs = 0
    for counts, rows in zip(num_blocks.flatten(0, 1).tolist(), indices.flatten(0, 1).tolist()):
        for m, (count, row) in enumerate(zip(counts, rows)):
            pairs += int(q_sizes[m]) * sum(int(kv_sizes[n]) for n in row[:count])
    return 4 * pairs * q.shape[-1]


attention_flops._get_raw = True


def counted(model, rungs, latents):
    """FLOPs of the blocks of one forward, as torch counts them."""
    op = torch.ops.usv_kernels.block_sparse_attention
    counter = FlopCounterMode(display=False, custom_mapping={op: attention_flops})
    text = torch.randn(1, TEXT, 8)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(latents, torch.tensor([500.0]), text, rungs, impl="cpu")
    head = FlopCounterMode(display=False)
    inner = model.transformer
    with torch.no_grad(), head:  # what is not a block: patches, conditions, the last projection
        x = inner.patch_embedding(latents).flatten(2).transpose(1, 2)
        inner.condition_embedder(torch.tensor([500.0]), text, None)
        inner.proj_out(inner.norm_out(x))
    return counter.get_total_flops() - head.get_total_flops()


def shape_of(model):
    return ModelShape.of(model.config, TEXT)


def test_dense_forward(model):
    latents = torch.randn(1, 4, 3, 8, 12)  # 3 × 4 × 6 tokens
    assert counted(model, None, latents) == dense_flops(shape_of(model), 72)


@pytest.mark.parametrize("rung", [Rung(1, 0), Rung(3, 0), Rung(0, 1), Rung(2, 2), Rung(5, 3)], ids=str)
def test_sparse_forward_of_whole_tiles(model, rung):
    """4 × 4 × 4 tokens in 8 equal tiles: every formula is exact."""
    latents = torch.randn(1, 4, 4, 8, 8)
    layout = tile_layout(TokenGrid(4, 4, 4), Tile(2, 2, 2))
    assert counted(model, (rung,) * 2, latents) == 2 * rung_flops(shape_of(model), layout, rung)


@pytest.mark.parametrize("rung", [Rung(1, 0), Rung(2, 1), Rung(4, 3)], ids=str)
def test_sparse_forward_of_partial_tiles(model, rung):
    """3 × 5 × 5 tokens: all but attention is exact; attention's pairs depend on which blocks are kept."""
    latents = torch.randn(1, 4, 3, 10, 10)
    grid = TokenGrid(3, 5, 5)
    layout, shape = tile_layout(grid, Tile(2, 2, 2)), shape_of(model)
    real = counted(model, (rung,) * 2, latents)
    most = 2 * block_flops(shape, grid.num_tokens)["attention"]
    model_says = 2 * rung_flops(shape, layout, rung)
    assert abs(real - model_says) < most
    full = Rung(0, max(rung.merge, 1))  # all blocks kept: exact again, so tokens merged in partial tiles are counted right
    assert counted(model, (full,) * 2, latents) == pytest.approx(2 * rung_flops(shape, layout, full), rel=1e-12)


def test_wan_1_3b_480p():
    """283 TFLOP of which 198 attention at 32,760 tokens and 512 of text."""
    shape = ModelShape(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30, text_length=512)
    parts = block_flops(shape, 32_760)
    assert 30 * parts["attention"] / 1e12 == pytest.approx(198, abs=0.5)
    assert dense_flops(shape, 32_760) / 1e12 == pytest.approx(283, abs=0.5)


def test_wan_14b_720p():
    shape = ModelShape(dim=5120, num_heads=40, ffn_dim=13824, num_layers=40, text_length=512)
    assert 40 * block_flops(shape, 75_600)["attention"] / 1e12 == pytest.approx(4682, abs=1)
    assert dense_flops(shape, 75_600) / 1e12 == pytest.approx(6523, abs=1)


def test_rungs_of_wan_get_cheaper_along_both_ladders():
    shape = ModelShape(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30, text_length=512)
    costs = dict(zip(RUNGS, rung_costs(shape, tile_layout(TokenGrid(21, 30, 52), Tile(4, 4, 4)))))
    assert costs[Rung()] == 1.0
    for rung, cost in costs.items():
        assert 0 < cost <= 1
        assert Rung(rung.density + 1, rung.merge) not in costs or costs[Rung(rung.density + 1, rung.merge)] < cost
        assert Rung(rung.density, rung.merge + 1) not in costs or costs[Rung(rung.density, rung.merge + 1)] < cost
    # an idealised 95% sparse forward is 2.98 times cheaper (32 blocks of 624); the coarse branch takes a little of it
    sparse = costs[Rung(4, 0)]
    ideal = 1 - (198 / 283) * (1 - 1 / 16)
    assert ideal < sparse < ideal + 0.01


def test_plan_cost_is_the_mean_of_its_cells(model):
    layout, shape = tile_layout(TokenGrid(4, 4, 4), Tile(2, 2, 2)), shape_of(model)
    plan = SparsityPlan(timestep_bins(2, 3.0), ((Rung(), Rung(1, 0)), (Rung(2, 1), Rung())))
    cells = [rung_flops(shape, layout, r) for row in plan.rungs for r in row]
    assert plan_cost(plan, shape, layout) == pytest.approx(sum(cells) / 4 / rung_flops(shape, layout, Rung()))
    assert plan_cost(SparsityPlan.uniform(Rung(), plan.edges, 2), shape, layout) == 1.0
