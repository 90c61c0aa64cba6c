#!/usr/bin/env bash
# Distillation LoRAs of Wan carry whole differences beside their low-rank pairs: `.diff` of norms, of the modulation and of the patch
# embedding, `.diff_b` of biases. diffusers takes the biases of the layers that have a pair and drops every other difference at its
# default verbosity without a word, so what is loaded is not the file; nothing that loads says how much of it was left out.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 numpy
"$here/venv/bin/python" - 2>&1 <<'PY'
import io
import logging

import diffusers
import torch
from diffusers import WanPipeline

print("diffusers", diffusers.__version__)
heard = io.StringIO()
logging.getLogger("diffusers").addHandler(logging.StreamHandler(heard))
width, prefix = 64, "diffusion_model."
pair = {"blocks.0.self_attn.q.lora_down.weight": torch.ones(4, width), "blocks.0.self_attn.q.lora_up.weight": torch.ones(width, 4)}
differences = {
    "blocks.0.self_attn.q.diff_b": width,
    "blocks.0.norm3.diff": width,
    "blocks.0.norm3.diff_b": width,
    "blocks.0.self_attn.norm_q.diff": width,
    "blocks.0.modulation.diff": (1, 6, width),
    "patch_embedding.diff": (width, 16, 1, 2, 2),
    "patch_embedding.diff_b": width,
}
kept = []
for name, shape in differences.items():
    given = {prefix + key: value for key, value in {**pair, name: torch.ones(shape)}.items()}
    taken = WanPipeline.lora_state_dict(given)
    kept += [name] if len(taken) == len(given) else []
    print(f"{name}: {len(given)} tensors given, {len(taken)} taken")
print("said:", repr(heard.getvalue()))
assert kept == ["blocks.0.self_attn.q.diff_b"] and not heard.getvalue(), "diffusers does something else now"
PY
