"""What a pipeline's encode_prompt gives, packed by data/encoder.py, is what `Family.inputs` hands the transformer again."""

from types import SimpleNamespace

import encoder
import pytest
import torch

from usv.models import cogvideox, hunyuan_video, hunyuan_video15, ltx

WORDS, MASK = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 1, 1, 1, 0, 0]])


def pipe(name, *encoded):
    return type(name, (), {"device": "cpu", "encode_prompt": lambda self, caption, **options: encoded})()


def padded(text, length=9):
    return torch.nn.functional.pad(text, (0, 0, 0, length - len(text)))[None]


def config(**more):
    return SimpleNamespace(config=SimpleNamespace(patch_size=1, patch_size_t=1, in_channels=4, **more))


def test_hunyuan_video():
    pooled = torch.ones(1, 5)
    text = encoder.packed_text(pipe("HunyuanVideoPipeline", WORDS, pooled, MASK), "", 7)
    call = hunyuan_video.inputs(config(pooled_projection_dim=5, guidance_embeds=True), torch.zeros(1, 4, 1, 2, 2), torch.tensor([500.0]), padded(text))
    assert torch.equal(call["encoder_hidden_states"][:, :4], WORDS[:, :4]) and torch.equal(call["pooled_projections"], pooled)
    assert call["encoder_attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] and call["guidance"].tolist() == [6000.0]


@pytest.mark.parametrize("glyphs", [0, 2])
def test_hunyuan_video15(glyphs):
    other, other_mask = torch.randn(1, 3, 8), torch.arange(3)[None] < glyphs
    text = encoder.packed_text(pipe("HunyuanVideo15Pipeline", WORDS, MASK, other, other_mask), "", 9)
    model = config(text_embed_dim=12, text_embed_2_dim=8, image_embed_dim=6)
    call = hunyuan_video15.inputs(model, torch.zeros(1, 4, 1, 2, 2), torch.tensor([500.0]), padded(text))
    assert torch.equal(call["encoder_hidden_states"], WORDS[:, :4]) and call["encoder_attention_mask"].tolist() == [[1] * 4]
    assert call["encoder_attention_mask_2"].sum() == glyphs and torch.equal(call["encoder_hidden_states_2"][:, :glyphs], other[:, :glyphs])


def test_ltx_and_cogvideox():
    text = encoder.packed_text(pipe("LTXPipeline", WORDS, MASK, None, None), "", 9)
    call = ltx.inputs(config(), torch.zeros(1, 4, 1, 2, 2), torch.tensor([500.0]), padded(text))
    assert call["encoder_attention_mask"].sum() == 4 and torch.equal(call["encoder_hidden_states"][:, :4], WORDS[:, :4])
    assert torch.equal(encoder.packed_text(pipe("CogVideoXPipeline", WORDS, None), "", 6), WORDS[0])
    with pytest.raises(ValueError, match="got a LattePipeline, accepted: one of Wan"):
        encoder.packed_text(pipe("LattePipeline", WORDS), "", 6)


def test_normalised_latents():
    """With all that a VAE may state, and with nothing but a factor."""
    z = torch.randn(2, 3, 1, 2, 2)
    vae = SimpleNamespace(config=SimpleNamespace(latents_mean=[1.0, 2.0, 3.0], latents_std=[2.0, 2.0, 4.0], scaling_factor=0.5))
    back = encoder.normalised(vae, z) * torch.tensor([4.0, 4.0, 8.0]).view(1, 3, 1, 1, 1) + torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(back, z)
    assert torch.equal(encoder.normalised(SimpleNamespace(config=SimpleNamespace(scaling_factor=0.7)), z), z * 0.7)


@pytest.mark.parametrize("rope", [True, False], ids=["5b", "2b"])
def test_cogvideox_levels_are_the_flows(rope):
    """A perfect v-prediction on CogVideoX's circle is the flow's velocity, at every timestep to both ends, and timesteps turn back."""
    model = config(use_rotary_positional_embeddings=rope, ofs_embed_dim=None, sample_height=2, sample_width=2, attention_head_dim=16)
    model.config.patch_size_t = None
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(5, 4, 1, 2, 2, generator=generator), torch.randn(5, 4, 1, 2, 2, generator=generator)
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.05])
    s = sigma.view(-1, 1, 1, 1, 1)
    call = cogvideox.inputs(model, (1 - s) * x0 + s * noise, 1000 * sigma, torch.zeros(5, 6, 12))
    length = ((1 - s) ** 2 + s**2).sqrt()
    data, own = (1 - s) / length, s / length
    torch.testing.assert_close(call["hidden_states"].transpose(1, 2), data * x0 + own * noise)
    velocity = cogvideox.outputs(model, (data * noise - own * x0).transpose(1, 2), call)
    torch.testing.assert_close(velocity, noise - x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cogvideox.flow_timestep(model, call["timestep"]), 1000 * sigma, rtol=1e-4, atol=1e-2)
    assert call["timestep"][0] == 999
