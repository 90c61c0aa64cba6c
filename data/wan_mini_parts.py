"""The parts of Wan-mini, each an unmodified diffusers / transformers class at a tiny size.

A video of 9 frames at 96×96 px becomes latents (16, 9, 24, 24) and a token grid (9, 12, 12) = 1,296 tokens. At width 128
and d_ff 448 self-attention is 60% of a dense forward's FLOPs (Wan2.1-1.3B at 480p: 70%), so ratios measured here say
something about Wan.
"""

from __future__ import annotations

import torch
from camera_motion import MOTIONS, SPEEDS, SUBJECTS
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

NUM_FRAMES, SIZE, Z_DIM, PATCH = 9, 96, 16, 4
TEXT_LENGTH, TEXT_DIM = 16, 64
FLOW_SHIFT = 3.0
CONST = 1000.0  # the constant channel that turns RMS norm into a fixed scale; (|z|/CONST)^2 < 1e-4


def make_tokenizer(text: str = " ".join([*SUBJECTS, *MOTIONS, *SPEEDS, "the camera"])) -> T5TokenizerFast:
    """A unigram tokenizer over the words of `text` plus letters, so that any prompt has a spelling."""
    words = sorted(set(text.replace(",", " ").split()))
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,-'!?"))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("▁" + word, -1.0) for word in words] + [(",", -1.0), ("▁", -8.0)]
    pieces += [(letter, -10.0) for letter in letters if letter != ","]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two UMT5 layers of width 64: enough to bind a verb to its direction word."""
    config = UMT5Config(
        vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def make_transformer() -> WanTransformer3DModel:
    """8 blocks, width 128 (2 heads × 64), d_ff 448: 2.2M parameters, small-weight gates so that it starts near identity."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=Z_DIM, out_channels=Z_DIM,
        text_dim=TEXT_DIM, freq_dim=128, ffn_dim=448, num_layers=8, rope_max_seq_len=64,
    )  # fmt: skip
    with torch.no_grad():
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
        torch.nn.init.zeros_(model.condition_embedder.time_proj.weight)
        torch.nn.init.zeros_(model.condition_embedder.time_proj.bias)
        model.scale_shift_table.zero_()
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.25  # gates of attention and FFN: 1/sqrt(2 · 8)
    return model


def make_scheduler() -> UniPCMultistepScheduler:
    """Wan's own sampler at Wan's 480p shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )


def fit_pca(videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PCA of 4×4 patches. videos (N, 3, T, H, W) in [-1, 1] -> mean (48,), components (16, 48), std (16,)."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    patches = patchify(videos, PATCH).movedim(1, -1).reshape(-1, 3 * PATCH * PATCH).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    components = vectors.flip(1).T[:Z_DIM]
    return mean.float(), components.float(), values.flip(0)[:Z_DIM].sqrt().float()


def _centre_tap(conv, rows: slice, columns: slice, matrix: torch.Tensor) -> None:
    """Write `matrix` into the tap of a causal 3-D convolution that sees only the current pixel and frame."""
    kt, kh, kw = conv.weight.shape[2:]
    conv.weight[rows, columns, kt - 1, kh // 2, kw // 2] = matrix


def _linear_passage(net: torch.nn.Module, dim: int) -> None:
    """Make every residual branch zero and every norm a fixed scale: what enters conv_in's channels leaves unchanged."""
    for name, module in net.named_modules():
        kind = type(module).__name__
        if kind == "WanResidualBlock":
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            module.norm1.gamma.fill_(CONST / dim**0.5)
            module.norm1.gamma[2 * Z_DIM] = 0.0
        elif kind == "WanAttentionBlock":
            module.proj.weight.zero_()
            module.proj.bias.zero_()
        if name == "norm_out":
            module.gamma.fill_(CONST / dim**0.5)
            module.gamma[2 * Z_DIM] = 0.0
    for conv in (net.conv_in, net.conv_out):
        conv.weight.zero_()
        conv.bias.zero_()
    net.conv_in.bias[2 * Z_DIM] = CONST


@torch.no_grad()
def make_vae(mean: torch.Tensor, components: torch.Tensor, std: torch.Tensor) -> AutoencoderKLWan:
    """AutoencoderKLWan initialised as the exact PCA codec z = W(p − μ), p ≈ Wᵀz + μ of 4×4 patches.

    conv_in writes +z and −z into two channel groups beside one large constant, so RMS norm is a fixed scale, and
    SiLU(a) − SiLU(−a) = a makes the read-out linear. `latents_std` is std^0.5 rather than std: fully whitened latents let
    fine texture dominate the flow loss.
    """
    scale = std.sqrt()
    scale = scale * (std / scale).square().mean().sqrt()  # normalised latents have unit variance on average
    vae = AutoencoderKLWan(
        base_dim=36, decoder_base_dim=36, z_dim=Z_DIM, dim_mult=[1], num_res_blocks=0, temperal_downsample=[],
        latents_mean=[0.0] * Z_DIM, latents_std=scale.tolist(), in_channels=48, out_channels=48, patch_size=PATCH,
        scale_factor_temporal=1, scale_factor_spatial=PATCH,
    )  # fmt: skip
    z, plus, minus = slice(0, Z_DIM), slice(0, Z_DIM), slice(Z_DIM, 2 * Z_DIM)
    eye = torch.eye(Z_DIM)
    enc, dec = vae.encoder, vae.decoder
    _linear_passage(enc, 36)
    _centre_tap(enc.conv_in, plus, slice(None), components)
    _centre_tap(enc.conv_in, minus, slice(None), -components)
    enc.conv_in.bias[plus], enc.conv_in.bias[minus] = -components @ mean, components @ mean
    _centre_tap(enc.conv_out, z, plus, eye)
    _centre_tap(enc.conv_out, z, minus, -eye)
    enc.conv_out.bias[Z_DIM:] = -12.0  # log variance: the posterior is its mean
    _linear_passage(dec, 36)
    _centre_tap(dec.conv_in, plus, slice(None), eye)
    _centre_tap(dec.conv_in, minus, slice(None), -eye)
    _centre_tap(dec.conv_out, slice(None), plus, components.T)
    _centre_tap(dec.conv_out, slice(None), minus, -components.T)
    dec.conv_out.bias.copy_(mean)
    for conv, width in ((vae.quant_conv, 2 * Z_DIM), (vae.post_quant_conv, Z_DIM)):
        conv.weight.copy_(torch.eye(width).view(width, width, 1, 1, 1))
        conv.bias.zero_()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def lap_decoder(vae: AutoencoderKLWan, videos: torch.Tensor, noise: float = 0.1) -> None:
    """Let each 4×4 patch be decoded from its 3×3 latents: the linear decoder of least squared error, closed form.

    A patch that is decoded alone meets its neighbours in a step wherever latents err: a grid. Latents (N, 3, T, H, W) of `videos` get
    noise of standard deviation `noise` (of a mean channel of 1), so the taps also learn which channels to trust: 38.7 → 39.4 dB clean,
    35.1 → 36.1 dB at noise 0.1, steps across patch borders 1.15 → 1.02 times those inside (docs/log.md).
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    from usv.sampling.decoder import linear_taps

    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents = torch.cat([vae.encode(clips).latent_dist.mode() for clips in videos.split(8)]) / std
    latents = latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    weight, bias = linear_taps(*(x.transpose(1, 2).flatten(0, 1) for x in (latents * std, patchify(videos, PATCH))))
    conv = vae.decoder.conv_out
    conv.weight[:, :Z_DIM, -1], conv.weight[:, Z_DIM : 2 * Z_DIM, -1] = weight, -weight
    conv.bias.copy_(bias)
