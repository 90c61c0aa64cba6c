#!/usr/bin/env bash
# FFmpeg: white that is converted from 10-bit YUV to rgb24 comes out as 253 in some channels, tinted; to gbrp, the same
# 8 bits in planes, as 255 in all. One would guess that the layout of the output does not change its values. With
# `full_chroma_int` rgb24 is 255 too.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q imageio-ffmpeg==0.8.1
cd "$work" && "$work/venv/bin/python" - <<'PY'
import subprocess

import imageio_ffmpeg

ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()


def white(pixels, flags=""):
    command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", "color=white:s=64x48:d=0.1,format=yuv420p10le", "-vf"]
    command += [f"scale=64:48{flags},format={pixels}", "-frames:v", "1", "-f", "rawvideo", "-"]
    return sorted(set(subprocess.run(command, capture_output=True, check=True).stdout))


packed, planar, exact = white("rgb24"), white("gbrp"), white("rgb24", ":flags=bicubic+full_chroma_int")
print(subprocess.run([ffmpeg, "-version"], capture_output=True, text=True).stdout.splitlines()[0])
print(f"white of yuv420p10le: rgb24 {packed}, gbrp {planar}, rgb24 with full_chroma_int {exact}")
assert min(packed) == 253 and planar == [255] and exact == [255], "the behaviour has changed"
PY
