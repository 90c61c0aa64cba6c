#!/usr/bin/env bash
# H.264 with `chromaloc=0` in its stream: chroma lies on even columns, as it does where nothing is said. FFmpeg's `scale` filter, also the one
# that `-pix_fmt` inserts, takes it to lie half a column further right, so every colour moves half a pixel to the right of its grey; the same
# library behind PyAV's `frame.reformat` does not. `in_chroma_loc=left` puts it right.
set -euo pipefail
here=$(mktemp -d); trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" -q install av==18.1.0 imageio-ffmpeg==0.8.1 numpy
cd "$here"
"$here/venv/bin/python" - <<'PY'
import subprocess

import av
import imageio_ffmpeg
import numpy as np

width, height = 64, 32
ramp = 64 + 2 * np.arange(width)  # Cb by column, so an error of one level is half a column
planes = [np.full((height, width), 128), np.tile(ramp[::2], (height // 2, 1)), np.full((height // 2, width // 2), 128)]
with av.open("ramp.mp4", "w") as container:
    stream = container.add_stream("libx264", rate=8)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"qp": "0", "x264-params": "chromaloc=0"}
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, values in zip(frame.planes, planes):
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def columns(cb):
    """By how many columns the ramp has moved to the right."""
    return float(((ramp - cb.astype(int))[8:-8] / 2).mean())


def of_filter(options):
    with av.open("ramp.mp4") as container:
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=container.streams.video[0]), graph.add("scale", f"w={width}:h={height}{options}"),
                 graph.add("format", "yuv444p"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        graph.push(next(container.decode(video=0)))
        return columns(graph.pull().to_ndarray()[1, height // 2])


def of_reformat():
    with av.open("ramp.mp4") as container:
        return columns(next(container.decode(video=0)).reformat(format="yuv444p").to_ndarray()[1, height // 2])


def of_program(*words):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", "ramp.mp4", *words, "-pix_fmt", "yuv444p", "-f", "rawvideo", "-"]
    raw = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)
    return columns(raw.reshape(3, height, width)[1, height // 2])


found = {
    "PyAV, scale filter": of_filter(""),
    "PyAV, scale filter, in_chroma_loc=left": of_filter(":in_chroma_loc=left"),
    "PyAV, frame.reformat": of_reformat(),
    "ffmpeg, -pix_fmt alone": of_program(),
    "ffmpeg, -vf scale with in_chroma_loc=left": of_program("-vf", f"scale={width}:{height}:in_chroma_loc=left"),
}
print("av", av.__version__, "- libswscale", ".".join(map(str, av.library_versions["libswscale"])), "- ffmpeg", imageio_ffmpeg.get_ffmpeg_version())
for name, moved in found.items():
    print(f"{name}: colour moved {moved:+.2f} columns to the right of grey")
assert [round(moved, 1) for moved in found.values()] == [0.5, 0.0, 0.0, 0.5, 0.0], "FFmpeg does something else now"
PY
