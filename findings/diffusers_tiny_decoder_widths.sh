#!/usr/bin/env bash
# AutoencoderTiny takes a tuple of widths for its decoder, one a stage, as its encoder does. Widths that differ build without a word and
# cannot decode: every stage's last convolution keeps its own width, which the next stage does not take. Nor does the class know its
# own config when it is loaded again: it writes block_out_channels and then says that it ignores it.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy
"$here/venv/bin/python" - "$here" 2>&1 <<'PY'
import contextlib
import io
import logging
import sys

import diffusers
import torch
from diffusers import AutoencoderTiny

print("diffusers", diffusers.__version__)
outcome = {}
for widths in ((16, 16, 16), (32, 16, 8)):
    model = AutoencoderTiny(decoder_block_out_channels=widths, num_decoder_blocks=(1, 1, 1), encoder_block_out_channels=(8,), num_encoder_blocks=(0,))
    try:
        outcome[widths] = tuple(model.decode(torch.zeros(1, 4, 4, 4)).sample.shape)
    except RuntimeError as error:
        outcome[widths] = str(error).splitlines()[0]
    print(widths, outcome[widths])
heard = io.StringIO()
handler = logging.StreamHandler(heard)
logging.getLogger("diffusers").addHandler(handler)
AutoencoderTiny().save_pretrained(sys.argv[1] + "/tiny")
AutoencoderTiny.from_pretrained(sys.argv[1] + "/tiny")
print("loading what was just saved says:", heard.getvalue().strip())
assert outcome[16, 16, 16] == (1, 3, 16, 16) and "channels" in outcome[32, 16, 8], "diffusers does something else now"
assert "block_out_channels" in heard.getvalue() and "ignored" in heard.getvalue(), "diffusers says something else now"
PY
