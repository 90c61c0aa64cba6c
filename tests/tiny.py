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
