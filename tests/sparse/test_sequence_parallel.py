"""usv.sparse.sequence_parallel: two real processes that share clips give one process's outputs, gradients and statistics.

Rounding: the dense reference is diffusers' own block, and sums over tokens are formed in another order; 1e-5 of the largest output
and 5e-5 of the largest gradient in fp32, the bounds of tests/models/test_wan.py.
"""

import pytest
import torch
import torch.distributed as dist
from processes import mean, two

from usv.models.forward import Probe, SparseTransformer
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import Rung
from usv.sparse.sequence_parallel import SequenceGroup, ShardError, alone, shards_of, tile_bounds

DENSE, HALF, MERGED = Rung(), Rung(1, 0), Rung(2, 1)
CASES = {  # rungs of three layers, probe of layer 1, a timestep for each token, checkpointing
    "dense": ((DENSE, DENSE, DENSE), None, False, False),
    "sparse": ((HALF, Rung(2, 0), DENSE), None, False, False),
    "merged": ((MERGED, MERGED, HALF), None, True, False),
    "of a mass": ((Rung(2, 0, mass=0.4), Rung(2, 1, mass=0.6), DENSE), None, False, False),  # one threshold for the heads of both
    "probe": ((DENSE, MERGED, MERGED), Rung(3, 1), False, True),
    "probe of another fraction": ((Rung(1, 2), Rung(1, 2), DENSE), Rung(1, 1), True, True),
}


def build() -> SparseTransformer:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=48, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    sparse = SparseTransformer(model, Tile(2, 2, 2)).train()
    with torch.no_grad():
        for p in sparse.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return sparse


def forward(model: SparseTransformer, case: str) -> dict[str, torch.Tensor]:
    """Output, gradients (zeros where there is none) and statistics on tokens (3, 5, 3): 12 tiles, most of them partial."""
    rungs, other, per_token, checkpointing = CASES[case]
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 3, 10, 6, generator=g), torch.randn(2, 5, 8, generator=g)
    timestep = 1000 * torch.rand((2, 45) if per_token else (2,), generator=g)
    mix = torch.tensor(0.5, requires_grad=True)
    model.transformer.gradient_checkpointing = False
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    out, stats = model(latents, timestep, text, rungs, None if other is None else {1: Probe(other, mix)})
    names, leaves = zip(*model.named_parameters(), ("mix", mix))
    grads = torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)
    found = {f"gradient of {n}": torch.zeros_like(p) if g is None else g for n, p, g in zip(names, leaves, grads)}
    measured = {
        f"{k} of layer {i}": getattr(s, k) for i, s in stats.items() for k in ("entropy", "coarse_recall", "density")
    }
    return {"output": out.detach(), **found, **measured}


def work(rank: int, file: str) -> None:
    """What both processes find, averaged as runtimes average gradients."""
    model = build()
    model.sequence_group = SequenceGroup(rank, 2, dist.group.WORLD)
    results = {case: mean(forward(model, case)) for case in CASES}
    with alone(model):  # as rank 0 validates
        results["alone"] = forward(model, "sparse") if rank == 0 else None
    if rank == 0:
        torch.save(results, file)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    file = tmp_path_factory.mktemp("shared") / "results.pt"
    two(work, str(file))
    return torch.load(file)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(shared, case):
    wanted = forward(build(), case)
    assert shared[case].keys() == wanted.keys()
    for name, value in wanted.items():
        bound = 1e-5 if name == "output" else 5e-5
        worst = float((shared[case][name] - value).abs().max())
        assert worst <= bound * max(1.0, float(value.abs().max())), f"{name}: {worst}"
    assert float(wanted["gradient of mix"].abs()) > 0 or CASES[case][1] is None


def test_one_of_them_alone_is_one_process(shared):
    for name, value in forward(build(), "sparse").items():
        torch.testing.assert_close(shared["alone"][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12])
def test_every_tile_has_one_owner(size):
    layout = tile_layout(TokenGrid(3, 5, 3), Tile(2, 2, 2))
    bounds = tile_bounds(layout.num_blocks, size)
    assert bounds[0] == 0 and bounds[-1] == 12 and all(a < b for a, b in zip(bounds, bounds[1:]))
    shards = [shards_of(layout, SequenceGroup(rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat([s.layout.order for s in shards]), layout.order)
    for s in shards:
        assert s.end - s.begin == int(s.layout.sizes.sum()) == len(s.layout.order)
        assert torch.equal(s.layout.starts, s.layout.sizes.cumsum(0, dtype=torch.int32) - s.layout.sizes)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ShardError, match=r"got 5, but the model has 12 heads; accepted: \[1, 2, 3, 4, 6, 12\]"):
        SequenceGroup(0, 5).check(12, 100)
    with pytest.raises(ShardError, match="got 4, but a clip has 3 tiles"):
        SequenceGroup(0, 4).check(12, 3)
    model = build()
    model.sequence_group = SequenceGroup(0, 2)
    with pytest.raises(ValueError, match="fine: another fine branch"):
        model(torch.zeros(1, 4, 3, 10, 6), torch.zeros(1), torch.zeros(1, 5, 8), fine=[None] * 3)
