"""Video files of every kind that people bring, made by ffmpeg from synthetic sources, and ffmpeg's own view of them.

`python tests/zoo.py FOLDER` makes them all. A recipe is one or more ffmpeg command lines; {name} is the file itself,
{dir} the folder.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SOURCE = "testsrc2=s={s}:r={r}:d={d}"
H264 = "-c:v libx264 -preset ultrafast -crf 12 -pix_fmt yuv420p"
X264 = "-c:v libx264 -preset veryfast -bf 2 -pix_fmt yuv420p"


def test_source(s="160x120", r=24, d=1.3) -> str:
    """Input options: ffmpeg's moving test picture."""
    return "-f lavfi -i " + SOURCE.format(s=s, r=r, d=d)


def ffmpeg() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def run(arguments: str | list[str], folder: Path) -> None:
    """One ffmpeg command in `folder`; arguments are split at blanks ('~' stands for a blank within one)."""
    if isinstance(arguments, str):
        arguments = [part.replace("~", " ") for part in arguments.split()]
    command = [ffmpeg(), "-v", "error", "-y", "-nostdin", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")


S = test_source()
TURN = "{src} " + H264 + " {name}.a.mp4|{turn} -i {name}.a.mp4 -c copy {name}"
FFV1 = "-c:v ffv1 -pix_fmt"

# shown pictures: each is compared with what ffmpeg shows of it
GEOMETRY: dict[str, str] = {
    "plain.mp4": f"{S} {H264} plain.mp4",
    "odd.mkv": f"{test_source('175x131')} {FFV1} yuv420p odd.mkv",
    "wide.mp4": f"{test_source('400x100')} {H264} wide.mp4",
    "tall.mp4": f"{test_source('90x160')} {H264} tall.mp4",
    "small.webm": f"{test_source('64x48')} -c:v libvpx-vp9 -cpu-used 8 -deadline realtime -crf 10 -b:v 0 small.webm",
    "cropped_by_codec.mp4": f"{test_source('150x110')} {H264} cropped_by_codec.mp4",
    **{f"turned_{a}.mp4": TURN.format(src=S, turn=f"-display_rotation {a}", name=f"turned_{a}.mp4")
       for a in (90, 180, 270)},
    "hflip.mp4": TURN.format(src=S, turn="-display_hflip", name="hflip.mp4"),
    "vflip.mp4": TURN.format(src=S, turn="-display_vflip", name="vflip.mp4"),
    "turned_90_hflip.mp4": TURN.format(src=S, turn="-display_rotation 90 -display_hflip", name="turned_90_hflip.mp4"),
    "turned_270_vflip.mov": TURN.format(src=S, turn="-display_rotation 270 -display_vflip", name="turned_270_vflip.mov"),
    "turned_30.mp4": TURN.format(src=S, turn="-display_rotation 30", name="turned_30.mp4"),
    **{f"sar_{n}_{d}.mp4": f"{test_source(size)} -vf setsar={n}/{d} {H264} sar_{n}_{d}.mp4"
       for n, d, size in ((64, 45, "176x144"), (8, 9, "176x120"), (32, 27, "176x120"), (4, 3, "144x108"), (128, 117, "176x144"))},
    "sar_in_container.mkv": f"{S} {H264} sar_in_container.a.mp4|-i sar_in_container.a.mp4 -c copy -aspect 2:1 sar_in_container.mkv",
    "sar_in_container.mp4": f"{S} {H264} sar_in_container.b.mp4|-i sar_in_container.b.mp4 -c copy -aspect 1:1 sar_in_container.mp4",
    "sar_and_turned.mp4": TURN.format(src=S + " -vf setsar=3/2", turn="-display_rotation 90", name="sar_and_turned.mp4"),
    "sar_mpeg2.mpg": f"{test_source('176x144', 25)} -vf setdar=16/9 -c:v mpeg2video -q:v 2 sar_mpeg2.mpg",
    "prores.mov": f"{S} -c:v prores_ks -profile:v 3 prores.mov",
    "mjpeg.avi": f"{S} -c:v mjpeg -q:v 2 -pix_fmt yuvj420p mjpeg.avi",
    "yuv422.mkv": f"{S} {FFV1} yuv422p yuv422.mkv",
    "yuv444.mkv": f"{S} {FFV1} yuv444p yuv444.mkv",
    "yuv410.mkv": f"{S} {FFV1} yuv410p yuv410.mkv",
    "gray.mkv": f"{S} {FFV1} gray gray.mkv",
    "rgb.mkv": f"{S} {FFV1} bgr0 rgb.mkv",
    "rgb.avi": f"{S} -c:v rawvideo -pix_fmt bgr24 rgb.avi",
    "palette.gif": f"{S} palette.gif",
    "ten_bit.mp4": f"{S} -c:v libx265 -x265-params log-level=error -preset ultrafast -crf 12 -pix_fmt yuv420p10le ten_bit.mp4",
    "av1.mp4": f"{S} -c:v libsvtav1 -preset 12 -crf 20 -svtav1-params fast-decode=1 av1.mp4",
    "theora.ogv": f"{S} -c:v libtheora -q:v 9 theora.ogv",
    "h263.3gp": f"{test_source('176x144')} -c:v h263 -q:v 2 h263.3gp",
    "mpeg2.vob": f"{test_source(r=25)} -c:v mpeg2video -q:v 2 -f vob mpeg2.vob",
    "h264.m2ts": f"{S} {X264} -crf 12 h264.m2ts",
    "h264.mts": f"{S} {X264} -crf 12 -f mpegts h264.mts",
    "mpeg2.mxf": f"{test_source(r=25)} -c:v mpeg2video -q:v 2 mpeg2.mxf",
    "wmv2.wmv": f"{S} -c:v wmv2 -q:v 2 wmv2.wmv",
    "flv1.flv": f"{S} -c:v flv1 -q:v 2 flv1.flv",
    "mpeg4_b.avi": f"{S} -c:v mpeg4 -bf 2 -q:v 2 mpeg4_b.avi",
    "cover.mp4": f"{S} {H264} cover.a.mp4|-f lavfi -i color=red:s=300x300:d=1 -frames:v 1 cover.png"
                 "|-i cover.png -i cover.a.mp4 -map 0 -map 1 -c copy -disposition:v:0 attached_pic cover.mp4",
    "two_films.mkv": f"{test_source('64x48')} -f lavfi -i testsrc=s=160x120:r=24:d=1.3 {H264} -map 0 -map 1 "
                     "-disposition:v:0 0 -disposition:v:1 default two_films.mkv",
}  # fmt: skip


def shown(path: Path, count: int, before: str = "", decoder: str = "") -> np.ndarray:
    """(count, H, W, 3) uint8: the first frames that ffmpeg shows of a file, upright and in square pixels."""
    steps = ([before] if before else []) + ["scale=w='max(1,round(iw*sar))':h=ih", "setsar=1"]
    command = [ffmpeg(), "-v", "error", "-nostdin", *decoder.split(), "-i", str(path), "-vf", ",".join(steps)]
    command += ["-fps_mode", "passthrough", "-frames:v", str(count), "-c:v", "pam", "-pix_fmt", "rgb24"]
    data = subprocess.run([*command, "-f", "image2pipe", "-"], capture_output=True, check=True).stdout
    frames = []
    while data:
        head, _, data = data.partition(b"ENDHDR\n")
        fields = dict(line.split(None, 1) for line in head.decode().splitlines()[1:])
        h, w = int(fields["HEIGHT"]), int(fields["WIDTH"])
        frames.append(np.frombuffer(data[: 3 * h * w], np.uint8).reshape(h, w, 3))
        data = data[3 * h * w :]
    return np.stack(frames)


def make(recipes: dict[str, str], folder: Path, workers: int = 2) -> None:
    """Make all files of a table."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(recipe: str) -> None:
        for command in recipe.split("|"):
            run(command, folder)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, recipes.values()))


if __name__ == "__main__":
    make(GEOMETRY, Path(sys.argv[1]))
