"""A tiny decoder: every frame of a latent, near to the decoder it was distilled from, and refused where it does not fit."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import infer
from usv.config import InferConfig, ModelConfig, SettingError
from usv.metrics import psnr
from usv.sampling.decoder import FOLDER, TinyDecoder, load_decoder, new_decoder
from usv.sampling.generate import decode, load_pipeline
from usv.training import decoder as distilling
from usv.training.data import ShardDataset

WAN_MINI = Path(__file__).resolve().parents[2] / "data" / "wan-mini"


def vae_like(z_dim=16, frames=4, space=8):
    return SimpleNamespace(config=SimpleNamespace(z_dim=z_dim, scale_factor_temporal=frames, scale_factor_spatial=space))


@pytest.fixture(scope="module")
def distilled(tiny_wan, tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "tiny"
    settings = {"steps": 20, "batch_size": 4, "lr": 1e-3, "width": 32, "blocks": 0}
    report = distilling.run(argparse.Namespace(model=str(tiny_wan), shards=str(tiny_shards), out=folder, **settings))
    return folder, report


@torch.no_grad()
def test_every_frame_of_a_latent_stands_in_its_place():
    """Output channel (frame, colour, y, x) of latent t, y, x is pixel (space·y + dy, space·x + dx) of frame 4 t + k − 3."""
    decoder = new_decoder(vae_like(), width=4, blocks=0)
    last = decoder.tiny.decoder.layers[-1]
    last.weight.zero_()
    last.bias.copy_(torch.arange(4 * 3 * 64).float())
    video = decoder(torch.zeros(2, 16, 3, 5, 6)) * 2 - 1  # the class scales [0, 1] to [-1, 1], we back
    video = (video + 1) / 2
    assert video.shape == (2, 9, 3, 40, 48)
    for frame, k in ((0, 3), (1, 0), (4, 3), (5, 0), (8, 3)):
        for colour, y, x in ((0, 0, 0), (1, 3, 7), (2, 15, 9)):
            assert float(video[1, frame, colour, y, x]) == pytest.approx((k * 3 + colour) * 64 + (y % 8) * 8 + x % 8, rel=1e-5)


def test_distilled_it_is_near_to_the_full_one_on_clips_it_never_saw(distilled, tiny_wan, tiny_shards):
    folder, report = distilled
    pipe = load_pipeline(str(tiny_wan))
    latents = next(iter(ShardDataset(tiny_shards, 2, split="val", shuffle=False, repeat=False)))["latents"]
    loaded = load_decoder(str(folder), str(tiny_wan), pipe)
    full = decode(pipe, latents)
    near, blank = psnr(decode(pipe, latents, loaded), full), psnr(full.mean((1, 3, 4), keepdim=True).expand_as(full), full)
    assert (near > blank + 6).all(), "half the error of what knows a clip's mean colours only"
    assert report["psnr_mean"] > float(blank.mean()) + 6
    assert json.loads((folder / "decoder.json").read_text()) == report
    plain = AutoencoderTiny.from_pretrained(folder)  # a folder of diffusers'
    assert torch.equal(TinyDecoder(plain, loaded.frames, loaded.space)(latents), loaded(latents))


def test_infer_decodes_with_it(distilled, tiny_wan, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(TinyDecoder, "forward", lambda self, latents, forward=TinyDecoder.forward: calls.append(1) or forward(self, latents))
    home = tmp_path / "model"
    shutil.copytree(tiny_wan, home)
    shutil.copytree(distilled[0], home / FOLDER)
    model = ModelConfig(str(home), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE), num_inference_steps=1, guidance_scale=1.0)
    paths = []
    for decoder in ("full", "tiny", str(distilled[0])):
        report = infer.run(InferConfig(model=model, prompt="a cat", output_dir=str(tmp_path / "videos"), decoder=decoder))
        paths.append(report["videos"][0]["path"])
    assert len(calls) == 2 and len(set(paths)) == 3, "what a video was decoded with is part of its name"


def test_what_does_not_fit_is_refused(distilled, tiny_wan, tmp_path):
    pipe = load_pipeline(str(tiny_wan))
    with pytest.raises(SettingError, match="decoder: got tiny, .* holds no decoder; accepted: full, tiny where"):
        load_decoder("tiny", str(tiny_wan), pipe)
    new_decoder(vae_like(z_dim=4), 4, 0).tiny.save_pretrained(tmp_path / "other")
    with pytest.raises(SettingError, match=r"got .*other of 4 latent and 768 output channels, accepted: 16 and 48, of a VAE that makes 1 frames of 4x4"):
        load_decoder(str(tmp_path / "other"), str(tiny_wan), pipe)
    shutil.copytree(distilled[0], tmp_path / "damaged")
    (tmp_path / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(SettingError, match="damaged cannot be read"):
        load_decoder(str(tmp_path / "damaged"), str(tiny_wan), pipe)
    with pytest.raises(SettingError, match="--steps: got -1, accepted: "):
        distilling.run(argparse.Namespace(model=str(tiny_wan), shards="x", out=None, steps=-1, batch_size=4, lr=1e-3, width=8, blocks=0))
