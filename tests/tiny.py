"""A complete Wan folder in a second, and shards for it: real classes, two random layers, the PCA codec as VAE."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "data") not in sys.path:
    sys.path.insert(0, str(ROOT / "data"))

SIZE, FRAMES, TEXT = 32, 5, 16  # latents (16, 5, 8, 8), tokens (5, 4, 4)
TILE = (3, 2, 2)  # 8 tiles, those of the last frames partial


def make_transformer(layers: int = 2, seed: int = 0):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, text_dim=64,
        freq_dim=16, ffn_dim=48, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval()


def save_model(folder: Path, layers: int = 2, seed: int = 0) -> Path:
    """A diffusers WanPipeline folder with random transformer and text encoder."""
    import camera_motion
    import wan_mini_parts as parts
    from diffusers import WanPipeline

    torch.manual_seed(seed)
    clips = torch.stack([camera_motion.sample_clip(i, 7, FRAMES, SIZE).frames for i in range(4)])
    vae = parts.make_vae(*parts.fit_pca(clips.transpose(1, 2).float() / 127.5 - 1))
    tokenizer = parts.make_tokenizer()
    text_encoder = parts.make_text_encoder(len(tokenizer)).eval()
    WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=parts.make_scheduler(),
        transformer=make_transformer(layers, seed),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_shards(folder: Path, model: Path, clips: int = 14, seed: int = 1, frames: int = FRAMES) -> Path:
    import prepare

    settings = prepare.Settings(
        model, folder, SIZE, SIZE, frames, 8, camera_motion=clips, seed=seed, split={"val": 0.2}, max_sequence_length=TEXT,
        shard_size=4,
    )  # fmt: skip
    prepare.run(settings)
    return folder


IMAGE_SIZE, IMAGE_FRAMES = 64, 9  # of image to video: latents (4, 3, 8, 8), tokens (3, 4, 4)
IMAGE_MODELS = {  # name -> (in_channels, further numbers of the transformer, tokens of a caption, expand_timesteps)
    "wan21_i2v": (12, {"image_dim": 16, "added_kv_proj_dim": 32}, 512, False),
    "wan21_flf2v": (12, {"image_dim": 16, "added_kv_proj_dim": 32, "pos_embed_seq_len": 10}, 512, False),
    "wan22_i2v": (12, {}, TEXT, False),
    "wan22_ti2v": (4, {}, TEXT, True),
}


def save_image_model(folder: Path, name: str) -> Path:
    """A WanImageToVideoPipeline folder of random parts: a codec of Wan's factors (4 in time, 8 in space), for Wan 2.1 CLIP's image encoder."""
    import wan_mini_parts as parts
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    channels, numbers, _, expand = IMAGE_MODELS[name]
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[0.5, 1.0, 0.7, 2.0],
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, text_dim=64, freq_dim=16,
        ffn_dim=48, num_layers=2, rope_max_seq_len=32, **numbers,
    )  # fmt: skip
    tokenizer = parts.make_tokenizer()
    images = {"image_encoder": None, "image_processor": None}
    if "image_dim" in numbers:
        clip = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        size = {"height": 28, "width": 28}
        images = {"image_encoder": CLIPVisionModel(clip), "image_processor": CLIPImageProcessor(size=size, crop_size=size)}
    WanImageToVideoPipeline(
        tokenizer=tokenizer, text_encoder=parts.make_text_encoder(len(tokenizer)).eval(), vae=vae, scheduler=parts.make_scheduler(),
        transformer=transformer.eval(), expand_timesteps=expand, **images,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_image_shards(folder: Path, model: Path, name: str, clips: int = 8) -> Path:
    import prepare

    prepare.run(prepare.Settings(
        model, folder, IMAGE_SIZE, IMAGE_SIZE, IMAGE_FRAMES, 8, camera_motion=clips, seed=1, split={"val": 0.25}, max_sequence_length=IMAGE_MODELS[name][2],
        shard_size=4,
    ))  # fmt: skip
    return folder
