#!/usr/bin/env bash
# AutoModel.from_pretrained says that it takes a str or os.PathLike. A pathlib.Path loads the weights, then raises a TypeError; the
# class itself (here AutoencoderKLWan) loads the same Path.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy
"$here/venv/bin/python" - "$here" <<'PY'
import sys
from pathlib import Path

import diffusers
from diffusers import AutoencoderKLWan, AutoModel

print("diffusers", diffusers.__version__, "annotation:", AutoModel.from_pretrained.__annotations__["pretrained_model_or_path"])
folder = Path(sys.argv[1]) / "vae"
AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=0, temperal_downsample=[], latents_mean=[0.0] * 4,
                 latents_std=[1.0] * 4).save_pretrained(folder)
print("the class, Path:", type(AutoencoderKLWan.from_pretrained(folder)).__name__)
print("AutoModel, str:", type(AutoModel.from_pretrained(str(folder))).__name__)
try:
    AutoModel.from_pretrained(folder)
    said = "loads"
except TypeError as error:
    said = str(error)
print("AutoModel, Path:", said)
assert "expected str instance, PosixPath found" in said, "diffusers does something else now"
PY
