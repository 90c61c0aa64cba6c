"""usv/models/wan.py: dense is diffusers', full density is dense, merging is exact where it must be, probes point downhill."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from usv_kernels.token_merge import match

from usv.models import attend, forward, tokens
from usv.models.attend import merge_layout
from usv.models.forward import Probe, SparseTransformer
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import Rung

LAYERS, TILE = 2, Tile(2, 2, 2)
SIDES = {"aligned": (4, 8, 8), "partial": (3, 10, 6)}  # latents; tokens (4, 4, 4) and (3, 5, 3)
FULL = Rung(0, 1)  # all blocks kept, but the sparse path; the tests below set the merged fraction to zero


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=48, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    with torch.no_grad():  # norms' weights and tables that matter
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def sparse(transformer):
    return SparseTransformer(copy.deepcopy(transformer), TILE).eval()


def inputs(kind="aligned", batch=2, seed=0, per_token=False):
    g = torch.Generator().manual_seed(seed)
    frames, height, width = SIDES[kind]
    latents = torch.randn(batch, 4, frames, height, width, generator=g)
    text = torch.randn(batch, 5, 8, generator=g)
    if not per_token:
        return latents, torch.tensor([900.0, 350.0])[:batch], text
    tokens = frames * (height // 2) * (width // 2)
    timestep = torch.full((batch, tokens), 600.0)
    timestep[:, : tokens // frames] = 0.0  # TI2V: the first frame is given
    return latents, timestep, text


def tolerance(reference):
    return 1e-5 * max(1.0, float(reference.detach().abs().max()))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", SIDES)
@torch.no_grad()
def test_plan_none_is_diffusers(transformer, sparse, kind, per_token):
    """1e-5 in fp32, batch 2, one timestep a clip and one a token."""
    latents, timestep, text = inputs(kind, per_token=per_token)
    theirs = transformer(latents, timestep, text, return_dict=False)[0]
    ours, stats = sparse(latents, timestep, text)
    assert stats == {} and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance(theirs)
    rows = [sparse(latents[i : i + 1], timestep[i : i + 1], text[i : i + 1])[0] for i in range(2)]
    assert (torch.cat(rows) - theirs).abs().max() <= tolerance(theirs)


def full_density(monkeypatch, kind):
    """Make `FULL` keep every block and merge nothing, so that the sparse code runs where the result is known."""
    from usv.sparse.plan import LayerPlan

    monkeypatch.setattr(forward, "layer_plan", lambda rung, blocks: LayerPlan(blocks, 0.0) if rung == FULL else None)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", SIDES)
def test_sparse_path_at_full_density_is_dense(sparse, monkeypatch, kind, per_token):
    """Outputs, and the gradient of every parameter the dense path has."""
    batch = inputs(kind, per_token=per_token)
    dense, _ = sparse(*batch)
    wanted = torch.autograd.grad(dense.square().sum(), list(sparse.transformer.parameters()))
    full_density(monkeypatch, kind)
    out, stats = sparse(*batch, (FULL,) * LAYERS)
    assert (out - dense).abs().max() <= tolerance(dense)
    assert set(stats) == set(range(LAYERS)) and all(float(s.density) == 1.0 for s in stats.values())
    got = torch.autograd.grad(out.square().sum(), list(sparse.transformer.parameters()))
    for (name, _), a, b in zip(sparse.transformer.named_parameters(), got, wanted):
        assert (a - b).abs().max() <= 5e-5 * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("kind", SIDES)
@torch.no_grad()
def test_merging_nothing_is_exact(sparse, monkeypatch, kind):
    """num_merged = 0 in every tile, through the merging code: bit-equal to the sparse path without merging."""
    latents, timestep, text = inputs(kind)
    rung = Rung(1, 1)
    monkeypatch.setattr(attend, "merged_tokens", lambda plan, layout: [0] * layout.num_blocks)
    merge_layout.cache_clear()
    try:
        merged, _ = sparse(latents, timestep, text, (rung,) * LAYERS)
    finally:
        merge_layout.cache_clear()
    plain, _ = sparse(latents, timestep, text, (Rung(1, 0),) * LAYERS)
    assert (merged - plain).abs().max() <= tolerance(plain)


@pytest.mark.parametrize("merge", [1, 2, 3])
@torch.no_grad()
def test_merging_identical_tokens_is_exact(sparse, merge):
    """Tokens that are equal inside a cell, without positions: merging and log(size) must change nothing at all."""
    sparse.transformer.rope.freqs_cos.fill_(1.0)
    sparse.transformer.rope.freqs_sin.fill_(0.0)
    latents, timestep, text = inputs("aligned")
    square = latents[..., :2, :2].repeat(1, 1, 1, 2, 2)  # one 2×2 patch repeated over each cell of 2×2 tokens …
    latents = torch.cat([torch.cat([square * (1 + i + j) for j in (0.0, 0.5)], -1) for i in (0.0, 0.25)], -2)
    assert latents.shape[-2:] == (8, 8)  # … another one in each of the four cells of a frame
    dense, _ = sparse(latents, timestep, text)
    out, _ = sparse(latents, timestep, text, (Rung(0, merge),) * LAYERS)
    assert (out - dense).abs().max() <= tolerance(dense)
    other, _ = sparse(latents + 0.5 * torch.randn_like(latents), timestep, text, (Rung(0, merge),) * LAYERS)
    assert (other - dense).abs().max() > 100 * tolerance(dense)  # and it is not exact by ignoring the input


@torch.no_grad()
def test_merged_tokens_keep_their_own_residual(sparse):
    """The update is unmerged, not the state: with the blocks' gates closed the output is that of no blocks at all."""
    latents, timestep, text = inputs("partial")
    for block in sparse.transformer.blocks:
        block.scale_shift_table[:, [2, 5]] = 0.0
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()
    sparse.transformer.condition_embedder.time_proj.weight.zero_()
    sparse.transformer.condition_embedder.time_proj.bias.zero_()
    dense, _ = sparse(latents, timestep, text)
    merged, _ = sparse(latents, timestep, text, (Rung(2, 3),) * LAYERS)
    assert (merged - dense).abs().max() <= tolerance(dense)


@torch.no_grad()
def test_a_run_of_merging_layers_shares_one_match(sparse, monkeypatch):
    """One match for a run; unmerging and merging again between its layers with that match gives the same states."""
    maps = []
    monkeypatch.setattr(tokens, "match", lambda *args: maps.append(match(*args)) or maps[-1])
    shared, _ = sparse(*inputs(), (Rung(1, 2), Rung(2, 2)))
    assert len(maps) == 1
    sparse(*inputs(), (Rung(1, 2), Rung(2, 1)))
    assert len(maps) == 3
    forget = forward._run_rung
    monkeypatch.setattr(tokens, "match", lambda *args: maps[0])
    monkeypatch.setattr(forward, "_run_rung", lambda run, index, now, *rest: forget(run, index, now.unmerged(), *rest))
    again, _ = sparse(*inputs(), (Rung(1, 2), Rung(2, 2)))
    torch.testing.assert_close(again, shared, rtol=0, atol=tolerance(shared))


@pytest.mark.parametrize("rung", [Rung(2, 0), Rung(1, 2)], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", SIDES)
@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other(sparse, kind, per_token, rung):
    latents, timestep, text = inputs(kind, per_token=per_token)
    together, _ = sparse(latents, timestep, text, (rung,) * LAYERS)
    alone = [sparse(latents[i : i + 1], timestep[i : i + 1], text[i : i + 1], (rung,) * LAYERS)[0] for i in range(2)]
    assert (together - torch.cat(alone)).abs().max() <= tolerance(together)


@pytest.mark.parametrize("rung", [Rung(2, 0), Rung(1, 2)], ids=str)
@torch.no_grad()
def test_a_timestep_for_each_token_equals_one_for_all(sparse, rung):
    latents, _, text = inputs("partial")
    one = torch.tensor([600.0, 600.0])
    each = one[:, None].expand(2, 45)
    a, _ = sparse(latents, one, text, (rung,) * LAYERS)
    b, _ = sparse(latents, each, text, (rung,) * LAYERS)
    assert (a - b).abs().max() <= tolerance(a)


def gradients(model, batch, rungs, mix=None):
    probes = None if mix is None else {1: Probe(Rung(3, 1), mix)}
    out, _ = model(*batch, rungs, probes)
    leaves = [p for p in model.parameters()] + ([mix] if mix is not None else [])
    return torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)


@pytest.mark.parametrize("rungs", [(Rung(), Rung(1, 0)), (Rung(2, 1), Rung(2, 1))], ids=str)
def test_gradient_checkpointing_changes_nothing(sparse, rungs):
    """Bit-equal gradients of weights, gates and mix: what is recomputed sees the same plan."""
    batch, mix = inputs("partial"), torch.tensor(0.5, requires_grad=True)
    sparse.train()
    plain = gradients(sparse, batch, rungs, mix)
    sparse.transformer.enable_gradient_checkpointing()
    again = gradients(sparse, batch, rungs, mix)
    sparse.transformer.disable_gradient_checkpointing()
    assert plain[-1] is not None and any(g is not None for g in plain[:-1])
    for a, b in zip(plain, again):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_gates_get_gradients_in_sparse_layers_only(sparse):
    grads = dict(zip([n for n, _ in sparse.named_parameters()], gradients(sparse, inputs(), (Rung(), Rung(1, 0)))))
    assert grads["gates.0.weight"] is None
    assert grads["gates.1.weight"].abs().sum() > 0 and grads["gates.1.bias"].abs().sum() > 0


@pytest.mark.parametrize("other", [Rung(3, 0), Rung(2, 1), Rung(1, 0)], ids=str)
def test_probe_gives_the_difference_of_losses(sparse, other):
    """d loss / d mix at 1/2 has the sign and nearly the size of loss(other) − loss(rung), and is the derivative (norms run in fp32)."""
    sparse, rung = sparse.double(), Rung(2, 0)
    latents, timestep, text = (x.double() for x in inputs("aligned"))
    with torch.no_grad():
        target, _ = sparse(latents, timestep, text)

    def loss(mix, layer=1):
        rungs = [Rung()] * LAYERS
        rungs[layer] = rung
        out, _ = sparse(latents, timestep, text, rungs, {layer: Probe(other, mix)}, "reference")
        return (out - target).square().mean()

    mix = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(mix), mix)
    with torch.no_grad():
        low, high = loss(torch.tensor(0.49).double()), loss(torch.tensor(0.51).double())
        difference = float(loss(torch.tensor(1.0).double()) - loss(torch.tensor(0.0).double()))
    assert float(slope) == pytest.approx(float((high - low) / 0.02), rel=1e-3)
    assert difference != 0 and float(slope) * difference > 0
    assert float(slope) == pytest.approx(difference, rel=0.5)


@torch.no_grad()
def test_probe_ends_are_the_two_rungs(sparse):
    batch, rungs, other = inputs(), (Rung(), Rung(1, 0)), Rung(3, 2)
    zero, _ = sparse(*batch, rungs, {1: Probe(other, torch.tensor(0.0))})
    one, _ = sparse(*batch, rungs, {1: Probe(other, torch.tensor(1.0))})
    assert (zero - sparse(*batch, rungs)[0]).abs().max() <= tolerance(zero)
    assert (one - sparse(*batch, (Rung(), other))[0]).abs().max() <= tolerance(one)


@torch.no_grad()
def test_deepcopy_is_its_own_model(sparse):
    batch, rungs = inputs(), (Rung(1, 1), Rung(2, 0))
    before, _ = sparse(*batch, rungs)
    twin = copy.deepcopy(sparse)
    assert torch.equal(twin(*batch, rungs)[0], before)
    for p in twin.parameters():
        p.add_(0.1)
    assert torch.equal(sparse(*batch, rungs)[0], before) and not torch.equal(twin(*batch, rungs)[0], before)


def test_bf16_stays_bf16_and_close(sparse):
    latents, timestep, text = inputs()
    with torch.no_grad():
        exact, _ = sparse(latents, timestep, text, (Rung(1, 1), Rung(0, 1)))
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = sparse(latents, timestep, text, (Rung(1, 1), Rung(0, 1)))
    assert out.isfinite().all()
    assert (out.float() - exact).norm() <= 0.1 * exact.norm()  # selections may differ near ties; garbage would not pass


def test_stats_are_those_of_the_plan(sparse):
    _, stats = sparse(*inputs("aligned"), (Rung(1, 0), Rung(3, 2)))
    assert [float(stats[i].density) for i in range(2)] == [4 / 8, 1 / 8]
    layout = merge_layout(tile_layout(TokenGrid(4, 4, 4), TILE), 0.5)
    assert layout.num_kept_tokens == 32 and layout.kept_sizes.tolist() == [4] * 8


def test_shapes_that_do_not_fit_are_refused(sparse):
    latents, timestep, text = inputs()
    with pytest.raises(ValueError, match=r"latents: got \(T, H, W\) = \(4, 7, 8\), expected multiples of the patch"):
        sparse(latents[..., :7, :], timestep, text)
    with pytest.raises(ValueError, match=r"rungs: got 3, expected one for each of the 2 layers"):
        sparse(latents, timestep, text, (Rung(),) * 3)


def test_pipeline_in_inference_mode_then_training(sparse):
    """Cached layouts and tables made under inference_mode must serve a backward."""
    from usv.sparse.grid import tile_layout as cached

    cached.cache_clear()
    merge_layout.cache_clear()
    batch, rungs = inputs("partial"), (Rung(1, 1), Rung(1, 0))
    with torch.inference_mode():
        sparse(*batch, rungs)
    assert gradients(sparse, batch, rungs)[0].isfinite().all()
