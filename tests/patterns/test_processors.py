"""Patterns through the attention processors of real (tiny, random) diffusers transformers."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel

from usv.patterns import SVG, SVG2, Radial, SlidingTile
from usv.patterns.processors import attach, token_grid
from usv.sparse.grid import TokenGrid

NO_WARM_UP = {"dense_layers": 0.0, "dense_steps": 0.0}
FULL = [SVG(density=1.0, block=8, **NO_WARM_UP), SVG2(top_p=1.0, q_clusters=5, k_clusters=9, **NO_WARM_UP)]
SPARSE = [SVG(density=0.5, block=8, **NO_WARM_UP), SVG2(top_p=0.3, floor=0, q_clusters=5, k_clusters=9, **NO_WARM_UP),
          Radial(decay=0.1, block=4, **NO_WARM_UP), SlidingTile(tile=(1, 2, 2), window=(2, 2, 2), **NO_WARM_UP)]  # fmt: skip


def name_of(value):
    return getattr(value, "__name__", type(value).__name__)


def wan():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    call = {"hidden_states": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.randn(2, 7, 16)}  # fmt: skip
    return model, call, TokenGrid(3, 4, 4)


def cogvideox():
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=6, use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    rope = torch.randn(48, 8).repeat_interleave(2, 1)
    call = {"hidden_states": torch.randn(2, 3, 4, 8, 8), "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.randn(2, 6, 16), "image_rotary_emb": (rope.cos(), rope.sin())}  # fmt: skip
    return model, call, TokenGrid(3, 4, 4)


def hunyuan():
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    call = {"hidden_states": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.randn(2, 6, 16), "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(2, 8), "guidance": torch.tensor([6000.0, 6000.0])}  # fmt: skip
    return model, call, TokenGrid(3, 4, 4)


def steps(num_steps=4):
    """A Progress whose step the test sets: steps["at"] = 2."""
    at = {"at": 0, "schedule": object()}
    return at, lambda timestep: (at["at"], num_steps, at["schedule"])


class Record(list):
    """What `attach` reports to."""

    forwards, seconds = 0, 0.0
    add = list.append


@torch.no_grad()
def run(model, call):
    return model(**call, return_dict=False)[0]


@pytest.mark.parametrize("pattern", FULL, ids=name_of)
@pytest.mark.parametrize("make", [wan, cogvideox, hunyuan])
def test_full_density_is_the_stock_transformer(make, pattern):
    model, call, grid = make()
    expected = run(model, call)
    assert token_grid(model, call["hidden_states"], call["timestep"]) == grid
    record = Record()
    attached = attach(model, pattern, steps()[1], record)
    torch.testing.assert_close(run(model, call), expected, rtol=1e-4, atol=1e-5)
    layers = sum(name.endswith(("attn1.to_q", "attn.to_q")) and "refiner" not in name for name, _ in model.named_modules())
    assert [stats.layer for stats in record] == list(range(layers))
    assert all(stats.density == 1.0 and not stats.dense for stats in record)
    attached.undo()


@pytest.mark.parametrize("pattern", SPARSE, ids=name_of)
@pytest.mark.parametrize("make", [wan, cogvideox, hunyuan])
def test_a_sparse_run_differs_and_undo_restores(make, pattern):
    model, call, _ = make()
    expected, processors = run(model, call), dict(model.attn_processors)
    record = Record()
    attached = attach(model, pattern, steps()[1], record, recall_rows=16)
    out = run(model, call)
    assert torch.isfinite(out).all() and not torch.allclose(out, expected, atol=1e-4)
    assert all(0 < stats.density < 1 and 0 < stats.recall < 1 for stats in record)
    attached.undo()
    assert model.attn_processors == processors and not model._forward_pre_hooks
    assert torch.equal(run(model, call), expected)
    assert len(record) == len({stats.layer for stats in record}), "after undo nothing is recorded"


@pytest.mark.parametrize("pattern", SPARSE, ids=name_of)
def test_padding_of_a_prompt_changes_nothing(pattern):
    model, call, _ = hunyuan()
    attach(model, pattern, steps()[1], Record())
    expected = run(model, call)
    call["encoder_hidden_states"] = call["encoder_hidden_states"].clone()
    call["encoder_hidden_states"][0, 3:] = 100 * torch.randn(3, 16)
    torch.testing.assert_close(run(model, call), expected, rtol=1e-4, atol=1e-5)
    call["encoder_hidden_states"][0, :3] += 1
    assert not torch.allclose(run(model, call)[0], expected[0], atol=1e-3), "real tokens count"


def test_steps_branches_and_new_videos():
    model, call, _ = wan()
    at, progress = steps(num_steps=5)
    record = Record()
    pattern = SVG2(top_p=0.5, q_clusters=5, k_clusters=9, dense_layers=0.3, dense_steps=0.4)
    attach(model, pattern, progress, record)
    attention = model.blocks[1].attn1.processor.run

    def forward(step):
        at["at"] = step
        record.clear()
        run(model, call)
        return attention.state

    assert forward(0).branch == 0 and all(stats.dense for stats in record)
    assert forward(0).branch == 1
    forward(1)
    assert [stats.dense for stats in record] == [True] * 3
    forward(2)
    assert [stats.dense for stats in record] == [True, False, False], "0.3 · 3 layers: the first"
    state = forward(2)
    assert sorted(state.centroids) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert forward(4).centroids == {key: value for key, value in state.centroids.items() if key[1] == 1}
    forward(3)  # a step back is a new video
    assert sorted(attention.state.centroids) == [(1, 0), (2, 0)]
    at["schedule"] = object()
    assert forward(3) is not state and attention.state.branch == 0, "so is a new schedule"


def test_processors_that_were_kept_refuse_to_run():
    """After `undo` no forward tells them where it is; and under another pattern they would run the old one's blocks."""
    model, call, _ = wan()
    attached = attach(model, SPARSE[2], steps()[1], Record())
    run(model, call)
    kept = dict(model.attn_processors)
    attached.undo()
    model.set_attn_processor(dict(kept))
    with pytest.raises(ValueError, match="grid: got None"):
        run(model, call)
    attach(model, SPARSE[3], steps()[1], Record())
    model.set_attn_processor(dict(kept))
    with pytest.raises(ValueError, match="attention processors: got ones that were set after the pattern was enabled"):
        run(model, call)


def test_projections_unfused_after_undo():
    """CogVideoX's unfuse_qkv_projections sets what fuse_qkv_projections found, which were the pattern's."""
    model, call, _ = cogvideox()
    expected, processors = run(model, call), model.attn_processors
    attached = attach(model, SPARSE[2], steps()[1], Record())
    model.fuse_qkv_projections()
    attached.undo()
    model.unfuse_qkv_projections()
    assert model.attn_processors == processors and torch.equal(run(model, call), expected)


@pytest.mark.parametrize("make", [wan, cogvideox, hunyuan])
def test_gradients_of_a_checkpoint_are_those_without(make):
    """SVG2 whose k-means has not converged: a block that runs again must have the clusters of its first run."""
    pattern, found = SVG2(top_p=0.3, floor=0, q_clusters=5, k_clusters=9, first_iters=1, **NO_WARM_UP), []
    for checkpointing in (False, True):
        model, call, _ = make()
        model.train()
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        attach(model, pattern, steps()[1], Record())
        model(**call, return_dict=False)[0].square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_errors():
    model, call, _ = wan()
    with pytest.raises(ValueError, match="transformer: got Linear: its attention is not known here, accepted: WanTransformer3DModel"):
        attach(torch.nn.Linear(2, 2), FULL[0], steps()[1], Record())
    attach(model, SVG2(**NO_WARM_UP), steps()[1], Record())
    with pytest.raises(ValueError, match="grid: got None"):
        cos = torch.ones(1, 48, 1, 12)
        model.blocks[0](torch.randn(1, 48, 24), torch.randn(1, 7, 24), torch.randn(1, 6, 24), (cos, cos))
    with pytest.raises(ValueError, match="q_clusters: got 100, accepted: 1..48"):
        run(model, call)
    with pytest.raises(ValueError, match=r"latents: got \(T, H, W\) = \(3, 7, 8\), accepted: multiples of the patch"):
        run(model, {**call, "hidden_states": torch.randn(2, 4, 3, 7, 8)})
