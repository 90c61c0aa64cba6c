#!/usr/bin/env bash
# Latents are kept in fp16 to save memory and joined to a batch. Under CPU autocast (bf16) torch.stack and torch.cat of fp16 tensors raise
# an internal error about a scalar type; of fp32 or bf16 tensors, or of one alone by index, they work. On a GPU autocast joins them.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install torch==2.13.0 numpy
"$here/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    clips = [torch.ones(2, 3, dtype=dtype) for _ in range(2)]
    for name, join in (("stack", torch.stack), ("cat", torch.cat)):
        with torch.autocast("cpu", torch.bfloat16):
            try:
                found[name, dtype] = str(join(clips).dtype)
            except RuntimeError as error:
                found[name, dtype] = str(error).splitlines()[0]
        print(f"{name} of {dtype}: {found[name, dtype]}")
assert all(found[name, torch.float32] == "torch.float32" for name in ("stack", "cat"))
assert all(found[name, torch.bfloat16] == "torch.bfloat16" for name in ("stack", "cat"))
assert all("Unexpected floating ScalarType" in found[name, torch.float16] for name in ("stack", "cat")), "torch does something else now"
PY
