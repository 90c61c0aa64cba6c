#!/usr/bin/env bash
# Kandinsky5I2VPipeline with 9 or 13 frames, numbers that it accepts and keeps: a run ends with the first four latent frames normed
# to those after them, of which there are none below 17 frames. All latents are NaN, and nothing is said.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy pillow ftfy
"$here/venv/bin/python" - <<'PY'
import diffusers, torch
from diffusers import (AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5I2VPipeline,
                       Kandinsky5Transformer3DModel)
from PIL import Image

torch.manual_seed(0)
model = Kandinsky5Transformer3DModel(in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, model_dim=24,
                                     ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 4), visual_cond=True).eval()
vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval()
pipe = Kandinsky5I2VPipeline(transformer=model, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
                             scheduler=FlowMatchEulerDiscreteScheduler())
pipe.set_progress_bar_config(disable=True)
text = {f"{sign}prompt_{name}": value for sign in ("", "negative_")
        for name, value in (("embeds_qwen", torch.randn(1, 6, 16)), ("embeds_clip", torch.randn(1, 8)),
                            ("cu_seqlens", torch.tensor([0, 6], dtype=torch.int32)))}
print("diffusers", diffusers.__version__)
finite = {}
for frames in (9, 13, 17):
    latents = pipe(image=Image.new("RGB", (64, 64), (90, 120, 40)), **text, height=64, width=64, num_frames=frames,
                   num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    finite[frames] = bool(torch.isfinite(latents).all())
    print(frames, "frames:", tuple(latents.shape), "share that is NaN:", float(latents.isnan().float().mean()))
assert finite == {9: False, 13: False, 17: True}, "diffusers does something else now"
PY
