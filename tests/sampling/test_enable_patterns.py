"""One reversible line on stock diffusers pipelines, tiny and random."""

import re

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

import usv
from usv.patterns import SVG2


def transformer(seed):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def pipeline(second=False):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler, "transformer": transformer(0)}
    if second:
        parts |= {"transformer_2": transformer(1), "boundary_ratio": 0.9}
    pipe = WanPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, num_steps=5, guidance=3.0):
    generator = torch.Generator().manual_seed(0)
    text, negative = torch.randn(2, 1, 7, 16, generator=generator)
    return pipe(
        prompt_embeds=text, negative_prompt_embeds=negative, height=64, width=64, num_frames=9, output_type="latent",
        num_inference_steps=num_steps, guidance_scale=guidance, generator=generator,
    ).frames  # fmt: skip


OPTIONS = {"q_clusters": 5, "k_clusters": 9, "dense_layers": 0.3, "dense_steps": 0.4}


def test_enable_summary_disable():
    pipe = pipeline()
    stock, processors = generate(pipe), dict(pipe.transformer.attn_processors)
    assert usv.enable(pipe, attention="svg2", top_p=0.3, floor=0.0, recall_rows=8, **OPTIONS) is pipe
    sparse = generate(pipe)
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, stock, atol=1e-3)
    record = pipe._usv.record
    # 5 steps × 2 branches × 3 layers; two steps and the first layer are dense.
    assert record.forwards == 10 and len(record.calls) == 30
    assert [call.step for call in record.calls] == [step for step in range(5) for _ in range(6)]
    assert [not call.dense for call in record.calls] == [step >= 2 and layer >= 1 for step in range(5)
                                                         for _ in range(2) for layer in range(3)]  # fmt: skip
    assert 0 < record.sparse_density() < record.mean_density() < 1 and 0 < record.mean_recall() < 1
    assert record.mean_density() == pytest.approx((12 * record.sparse_density() + 18) / 30)
    text = usv.summary(pipe)
    assert "SVG2(top_p=0.3" in text and f"density {record.mean_density():.3f}" in text and "12 of 30" in text
    assert re.search(r"cluster \d+\.\d\d", text) and f"{record.mean_recall():.3f}" in text
    assert torch.equal(generate(pipe), sparse), "a second video starts afresh"
    assert usv.disable(pipe) is pipe and not hasattr(pipe, "_usv")
    assert pipe.transformer.attn_processors == processors
    assert torch.equal(generate(pipe), stock) and "not enabled" in usv.summary(pipe)


@pytest.mark.parametrize("name", ["svg", "svg2", "sliding_tile", "tile_top_k"])
def test_density_one_is_the_stock_pipeline(name):
    pipe = pipeline()
    stock = generate(pipe, 3)
    own = {"q_clusters": 5, "k_clusters": 9} if name == "svg2" else {}
    usv.enable(pipe, attention=name, density=1.0, dense_layers=0.0, dense_steps=0.0, **own)
    torch.testing.assert_close(generate(pipe, 3), stock, rtol=1e-3, atol=1e-4)
    assert pipe._usv.record.mean_density() == 1.0 and not any(call.dense for call in pipe._usv.record.calls)


def test_both_transformers_of_wan22_run_sparse():
    pipe = pipeline(second=True)
    stock = generate(pipe)
    usv.enable(pipe, attention="svg2", top_p=0.3, **OPTIONS)
    generate(pipe)
    assert len(pipe._usv.record.calls) == 30
    runs = {getattr(pipe, name).blocks[0].attn1.processor.run for name in ("transformer", "transformer_2")}
    assert len(runs) == 2 and all(run.grid is not None for run in runs), "both were called"
    usv.disable(pipe)
    assert torch.equal(generate(pipe), stock)


def test_enabling_twice_replaces_and_a_refusal_changes_nothing():
    pipe = pipeline()
    stock = generate(pipe, 2)
    usv.enable(pipe, attention="svg2", **OPTIONS)
    usv.enable(pipe, attention="svg2", top_p=0.5, **OPTIONS)
    before = pipe.transformer.blocks[0].attn1.processor
    with pytest.raises(ValueError, match="top_p: got 1.5, accepted"):
        usv.enable(pipe, attention="svg2", top_p=1.5)
    with pytest.raises(ValueError, match="attention: got 'svgg', accepted: .*did you mean 'svg'"):
        usv.enable(pipe, attention="svgg")
    with pytest.raises(ValueError, match="enable: got neither of checkpoint and attention"):
        usv.enable(pipe)
    with pytest.raises(ValueError, match="top_p: got an option of a pattern"):
        usv.enable(pipe, "folder", top_p=0.5)
    assert pipe._usv.pattern == SVG2(top_p=0.5, **OPTIONS)
    assert pipe.transformer.blocks[0].attn1.processor is before
    usv.disable(usv.disable(pipe))
    assert torch.equal(generate(pipe, 2), stock)
    with pytest.raises(ValueError, match="pipe: got a object"):
        usv.enable(object(), attention="svg")


def cogvideox():
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=3, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=6, use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    pipe = CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler())
    call = {"num_frames": 9, "guidance_scale": 3.0, "prompt_embeds": torch.randn(1, 6, 16),
            "negative_prompt_embeds": torch.randn(1, 6, 16)}  # fmt: skip
    return pipe, call, 5  # guidance is one batch of two


def hunyuan():
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip
    pipe = HunyuanVideoPipeline(None, None, model, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)
    call = {"num_frames": 9, "prompt_embeds": torch.randn(1, 6, 16), "pooled_prompt_embeds": torch.randn(1, 8),
            "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}  # fmt: skip
    return pipe, call, 5


@pytest.mark.parametrize("make", [cogvideox, hunyuan])
def test_joint_text_pipelines(make):
    """Stock to rounding at full density; sparse in the right steps and layers; stock again when disabled."""
    pipe, call, forwards = make()
    pipe.set_progress_bar_config(disable=True)

    def video():
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, height=64, width=64, num_inference_steps=5, output_type="latent", generator=generator).frames

    stock = video()
    usv.enable(pipe, attention="svg2", top_p=1.0, **OPTIONS)
    torch.testing.assert_close(video(), stock, rtol=1e-3, atol=1e-3)
    usv.enable(pipe, attention="svg2", top_p=0.3, floor=0.0, **OPTIONS)
    assert not torch.allclose(video(), stock, atol=1e-2)
    record = pipe._usv.record
    assert record.forwards == forwards
    assert [not call.dense for call in record.calls] == [step >= 2 and layer >= 1 for step in range(5) for layer in range(3)]
    assert record.sparse_density() < 1
    usv.disable(pipe)
    assert torch.equal(video(), stock)
