#!/usr/bin/env bash
# WanImageToVideoPipeline takes max_sequence_length. The transformer does not know it: with image embeddings its cross-attention takes
# the last 512 tokens for text and what stands before them for the image. With 256 tokens of text, half of the image's tokens are
# multiplied by the text's key and value matrices, without an error; the image's own matrices then see one token of 257.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy
"$here/venv/bin/python" - 2>&1 <<'PY'
import diffusers
import torch
from diffusers import WanTransformer3DModel

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=1,
    image_dim=12, added_kv_proj_dim=32,
).eval()
seen = {}
attention = model.blocks[0].attn2
for name in ("to_k", "add_k_proj"):
    getattr(attention, name).register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, inputs[0].shape[1]))
found = {}
for text in (512, 256):
    with torch.no_grad():
        model(torch.randn(1, 4, 1, 4, 4), torch.tensor([500]), torch.randn(1, text, 8), encoder_hidden_states_image=torch.randn(1, 257, 12))
    found[text] = dict(seen)
    print(f"{text} tokens of text and 257 of an image: {seen['to_k']} through the text's keys, {seen['add_k_proj']} through the image's")
assert found == {512: {"to_k": 512, "add_k_proj": 257}, 256: {"to_k": 512, "add_k_proj": 1}}, "diffusers does something else now"
PY
