"""Tiny random transformers of every family and the keyword arguments of their forward: one function a case."""

import torch

WAN = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
           ffn_dim=48, num_layers=3, rope_max_seq_len=32)  # fmt: skip
SIDES = (3, 10, 6)  # latents; 3 × 5 × 3 tokens, which no tile divides


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_arguments(channels=4, text=5, **more):
    base = {"hidden_states": normal(2, channels, *SIDES), "timestep": torch.tensor([900.0, 350.0])}
    return {**base, "encoder_hidden_states": normal(2, text, 8, seed=1), **more}


def wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**WAN), wan_arguments()


def wan_ti2v():
    """Per-token timesteps: the first frame is given."""
    timestep = torch.full((2, 45), 600.0)
    timestep[:, :15] = 0.0
    return wan()[0], wan_arguments(timestep=timestep)


def wan_i2v():
    """Wan 2.1: image embeddings in the cross-attention, mask and first frame as channels."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**WAN | {"in_channels": 9, "image_dim": 12, "added_kv_proj_dim": 32})
    return model, wan_arguments(9, 512, encoder_hidden_states_image=normal(2, 7, 12, seed=2))


def wan_vace():
    from diffusers import WanVACETransformer3DModel

    model = WanVACETransformer3DModel(**WAN, vace_layers=[0, 2], vace_in_channels=6)
    return model, wan_arguments(control_hidden_states=normal(2, 6, *SIDES, seed=3), control_hidden_states_scale=torch.tensor([1.0, 0.7]))


def wan_animate():
    from diffusers import WanAnimateTransformer3DModel

    model = WanAnimateTransformer3DModel(
        **WAN | {"in_channels": 12}, latent_channels=4, image_dim=12, added_kv_proj_dim=32, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )  # fmt: skip
    return model, wan_arguments(
        12, 512, encoder_hidden_states_image=normal(2, 7, 12, seed=2), pose_hidden_states=normal(2, 4, 2, 10, 6, seed=3),
        face_pixel_values=normal(2, 3, 5, 16, 16, seed=4),
    )  # fmt: skip


def skyreels_v2():
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**WAN), wan_arguments(timestep=torch.tensor([900, 350]))


def skyreels_v2_forcing():
    """Diffusion forcing: a timestep a frame."""
    from diffusers import SkyReelsV2Transformer3DModel

    timestep = torch.tensor([[100, 500, 900], [0, 0, 350]])
    return SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True), wan_arguments(timestep=timestep, enable_diffusion_forcing=True, fps=[1])


def chronoedit():
    from diffusers import ChronoEditTransformer3DModel

    model = ChronoEditTransformer3DModel(**WAN | {"in_channels": 9, "image_dim": 12, "added_kv_proj_dim": 32})
    return model, wan_arguments(9, 512, encoder_hidden_states_image=normal(2, 7, 12, seed=2))


HUNYUAN = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
               num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6))  # fmt: skip


def padded_text(text=7, width=12, valid=(7, 3)):
    """Texts of two lengths, and the mask of what is real."""
    return {"encoder_hidden_states": normal(2, text, width, seed=1), "encoder_attention_mask": (torch.arange(text) < torch.tensor(valid)[:, None]).long()}


def hunyuan_video(**more):
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(**HUNYUAN | more)
    return model, {
        "hidden_states": normal(2, model.config.in_channels, *SIDES), "timestep": torch.tensor([900.0, 350.0]), **padded_text(),
        "pooled_projections": normal(2, 8, seed=2), "guidance": torch.tensor([6000.0, 6000.0]),
    }  # fmt: skip


def hunyuan_video_concat():
    return hunyuan_video(in_channels=9, image_condition_type="latent_concat", guidance_embeds=False)


def hunyuan_video_replace():
    """A given first frame, whose tokens have a modulation of their own."""
    return hunyuan_video(image_condition_type="token_replace")


COGVIDEOX = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12, num_layers=3,
                 sample_width=6, sample_height=10, sample_frames=9, max_text_seq_length=7)  # fmt: skip


def cogvideox(**more):
    """2B: a table of positions, no RoPE."""
    from diffusers import CogVideoXTransformer3DModel

    from usv.models.cogvideox import grid, rotary_tables

    model = CogVideoXTransformer3DModel(**COGVIDEOX | more)
    frames = 3 * (model.config.patch_size_t or 1)
    call = {
        "hidden_states": normal(2, frames, model.config.in_channels, 10, 6), "timestep": torch.tensor([900, 350]),
        "encoder_hidden_states": normal(2, 7, 12, seed=1),
    }  # fmt: skip
    return model, call | {"image_rotary_emb": rotary_tables(model.config, grid(model, call), "cpu")}


def cogvideox_rope():
    """5B, image to video."""
    return cogvideox(in_channels=8, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True)


def cogvideox_15():
    """1.5, image to video: two frames a token."""
    model, call = cogvideox(in_channels=8, patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True, ofs_embed_dim=8)
    return model, call | {"ofs": torch.tensor([2.0])}


LTX = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=3, caption_channels=12)


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(**LTX), {
        "hidden_states": normal(2, 45, 4), "timestep": torch.tensor([900.0, 350.0]), **padded_text(), "num_frames": 3, "height": 5,
        "width": 3, "rope_interpolation_scale": (8 / 25, 32, 32),
    }  # fmt: skip


def ltx_i2v():
    """A timestep a token: the first frame is given."""
    model, call = ltx()
    timestep = torch.full((2, 45), 600.0)
    timestep[:, :15] = 0.0
    return model, call | {"timestep": timestep}


def coords(*places):
    """(2, 3, S) coordinates (t, y, x) of tokens, row-major in each grid of sides (t, h, w) that begins at frame `first`."""
    grids = [torch.cartesian_prod(torch.arange(first, first + t), torch.arange(h), torch.arange(w)) for first, (t, h, w) in places]
    return (torch.cat(grids).T * torch.tensor([8 / 25, 32, 32])[:, None]).expand(2, -1, -1)


def ltx_beside():
    """A given frame before the video's tokens, at the place of its last one, and at a noise level of its own."""
    model, call = ltx()
    timestep = torch.tensor([[900.0], [350.0]]).repeat(1, 60)
    timestep[:, :15] = 50.0
    call |= {"hidden_states": normal(2, 60, 4), "timestep": timestep, "video_coords": coords((2, (1, 5, 3)), (0, (3, 5, 3)))}
    return model, {name: value for name, value in call.items() if name not in ("num_frames", "height", "width")}


def framepack():
    """History at three resolutions before the video's tokens: 15, 6 and 2."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    model = HunyuanVideoFramepackTransformer3DModel(**HUNYUAN, has_image_proj=True, image_proj_dim=6, has_clean_x_embedder=True)
    _, call = hunyuan_video()
    history = {"latents_clean": (1, [0]), "latents_history_2x": (2, [1, 2]), "latents_history_4x": (4, [3, 4, 5, 6])}
    for number, (name, (frames, places)) in enumerate(history.items()):
        call |= {name: normal(2, 4, frames, *SIDES[1:], seed=5 + number), f"indices_{name}": torch.tensor(places)}
    return model, call | {"image_embeds": normal(2, 5, 6, seed=4), "indices_latents": torch.tensor([7, 8, 9])}


def hunyuan_video15(image=False):
    """Texts of two encoders with padding, and an image's tokens, absent in text to video."""
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3, num_refiner_layers=1, patch_size=1,
        text_embed_dim=12, text_embed_2_dim=8, image_embed_dim=6, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 9, 3, 5, 3), "timestep": torch.tensor([900.0, 350.0]), **padded_text(),
        "encoder_hidden_states_2": normal(2, 4, 8, seed=2), "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]),
        "image_embeds": normal(2, 5, 6, seed=3) * image,
    }  # fmt: skip


def hunyuan_video15_i2v():
    return hunyuan_video15(image=True)


def ltx2(**more):
    from diffusers import LTX2VideoTransformer3DModel

    model = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, audio_in_channels=4,
        audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=3,
        caption_channels=12, **more,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 45, 4), "audio_hidden_states": normal(2, 6, 4, seed=2), "timestep": torch.tensor([900.0, 350.0]),
        "sigma": torch.tensor([900.0, 350.0]), **padded_text(), "audio_encoder_hidden_states": normal(2, 7, 12, seed=3), "num_frames": 3,
        "height": 5, "width": 3, "audio_num_frames": 6,
    }  # fmt: skip


def ltx2_i2v():
    """2.3's gates and split RoPE; a timestep a token."""
    model, call = ltx2(rope_type="split", gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True, perturbed_attn=True)
    timestep = torch.full((2, 45), 600.0)
    timestep[:, :15] = 0.0
    return model, call | {"timestep": timestep, "audio_timestep": torch.tensor([600.0, 600.0])}


def ltx2_beside():
    """A reference behind the video's tokens, at half the resolution, some of it attended weakly or not at all, and a key frame it does not see."""
    model, call = ltx2_i2v()
    starts = coords((0, (3, 5, 3)), (0, (1, 3, 2)), (2, (1, 5, 3)))
    timestep = torch.cat((call["timestep"], torch.full((2, 6), 20.0), torch.zeros(2, 15)), 1)
    mask = torch.ones(1, 66, 66)
    mask[:, :45, 45:51] = strength = torch.tensor([1.0, 0.9999, 0.0, 1.0, 0.9998, 0.0])  # bias: −10,000 (1 − strength)
    mask[:, 45:51, :45] = strength[:, None]
    mask[:, 45:51, 51:] = mask[:, 51:, 45:51] = 0
    call |= {"hidden_states": normal(2, 66, 4), "timestep": timestep, "video_coords": torch.stack((starts, starts + 8 / 25), -1)}
    return model, call | {"video_self_attention_mask": mask.expand(2, -1, -1)}


def mochi():
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
        time_embed_dim=8,
    )  # fmt: skip
    text = padded_text(width=16)
    return model, {"hidden_states": normal(2, 4, *SIDES), "timestep": torch.tensor([100.0, 650.0]), **text, "encoder_attention_mask": text["encoder_attention_mask"].bool()}


CASES = (wan, wan_ti2v, wan_i2v, wan_vace, wan_animate, skyreels_v2, skyreels_v2_forcing, chronoedit, hunyuan_video, hunyuan_video_concat, hunyuan_video_replace,
         cogvideox, cogvideox_rope, cogvideox_15, ltx, ltx_i2v, ltx_beside, framepack, hunyuan_video15, hunyuan_video15_i2v, ltx2, ltx2_i2v, ltx2_beside, mochi)  # fmt: skip
