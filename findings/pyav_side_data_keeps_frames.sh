#!/usr/bin/env bash
# PyAV: asking a decoded frame for its side data keeps the frame, pixels and all, until Python's cycle collector runs.
# One would guess that a frame goes when the last reference to it does: 30 frames are decoded one after another, and
# one name holds the latest. Without `frame.side_data` one or two are alive at the end; with it all 30 are (12 MB each at 4K).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q av==18.1.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" - <<'PY'
import gc

import av
import numpy as np

with av.open("v.mp4", "w") as out:
    stream = out.add_stream("mpeg4", rate=24)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i in range(30):
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * i, np.uint8), format="rgb24")
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


def alive(ask):
    gc.collect()
    gc.disable()
    with av.open("v.mp4") as file:
        for frame in file.decode(video=0):
            if ask:
                list(frame.side_data.keys())
    count = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    gc.enable()
    del frame
    return count


without, asked = alive(False), alive(True)
print(f"PyAV {av.__version__}: frames alive after decoding 30: {without} untouched, {asked} asked for side_data")
assert without <= 2 and asked >= 30, "the behaviour has changed"
PY
