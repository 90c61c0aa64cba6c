#!/bin/bash
# safetensors' save_file makes a file that only its owner can read, whatever the umask says, and takes the permissions from one
# that stood there: a model folder written for a group (umask 002, or a file of mode 664 that is replaced) holds a config.json that all
# can read and weights that nobody else can. Python's own open() and json beside it follow the umask. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder/site" safetensors==0.8.0 numpy==2.2.6
cd "$folder"
umask 022
PYTHONPATH="$folder/site" python3 - <<'PY'
import os
import stat

import numpy
import safetensors
from safetensors.numpy import save_file

mode = lambda name: oct(stat.S_IMODE(os.stat(name).st_mode))
open("config.json", "w").write("{}")
save_file({"w": numpy.zeros(3)}, "new.safetensors")
open("shared.safetensors", "w").close()
os.chmod("shared.safetensors", 0o664)
save_file({"w": numpy.zeros(3)}, "shared.safetensors")
found = {name: mode(name) for name in ("config.json", "new.safetensors", "shared.safetensors")}
print("safetensors", safetensors.__version__, found)
assert found == {"config.json": "0o644", "new.safetensors": "0o600", "shared.safetensors": "0o600"}, "it follows the umask now"
PY
