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
ODD = "-f lavfi -i testsrc=s=175x131:r=24:d=1.3"  # testsrc2 makes sizes even

# shown pictures: each is compared with what ffmpeg shows of it
GEOMETRY: dict[str, str] = {
    "plain.mp4": f"{S} {H264} plain.mp4",
    "odd.mkv": f"{ODD} {FFV1} yuv420p odd.mkv",
    "odd.webm": f"{ODD} -c:v libvpx-vp9 -cpu-used 8 -deadline realtime -crf 10 -b:v 0 -pix_fmt yuv420p odd.webm",
    "odd_422.mkv": f"{ODD} {FFV1} yuv422p odd_422.mkv",
    "rgb555.avi": f"{S} -c:v rawvideo -pix_fmt rgb555le rgb555.avi",
    "rgb565.nut": f"{S} -c:v rawvideo -pix_fmt rgb565le rgb565.nut",
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
    "palette.gif": f"{test_source(r=25)} palette.gif",
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


# time stamps
LONG = test_source("96x64", 24, 12)
TIMING: dict[str, str] = {
    "cut.mp4": f"{LONG} {X264} -g 250 long.mp4|-ss 8 -i long.mp4 -t 3 -c copy cut.mp4|"
               "-ss 8 -i long.mp4 -t 0.6 -c copy cut_short.mp4",
    "one.mp4": f"{test_source('96x64', 24, 8)} {X264} -g 250 one.mp4|-i one.mp4 -c copy one.ts",
    "one.mpg": f"{test_source('96x64', 24, 8)} -c:v mpeg2video -g 250 -bf 2 -q:v 3 one.mpg",
    "vfr_b.mp4": f"{test_source('96x64', 30, 6)} -vf select='lt(t,0.5)+between(t,3,3.2)+between(t,5.5,6)' "
                 f"-fps_mode vfr {X264} vfr_b.mp4",
    "mid_gop.ts": f"{test_source('96x64', 24, 6)} {X264} -g 48 mid.mp4|-i mid.mp4 -c copy mid.ts",
    "intra_refresh.ts": f"{test_source('96x64', 24, 6)} -c:v libx264 -preset veryfast -bf 0 -g 24 -pix_fmt yuv420p "
                        "-x264-params intra-refresh=1 refresh.ts",
    "joined.ts": f"{test_source('96x64', 24, 2)} {X264} -output_ts_offset 100 first.ts|{test_source('96x64', 24, 2)} {X264} second.ts",
    "open_gop.mkv": f"{test_source('96x64', 24, 3)} {X264} -x264-params open-gop=1:keyint=12 open_gop.mkv",
    "r23976.mp4": f"{test_source('96x64', '24000/1001', 2)} {X264} r23976.mp4",
    "r5994.mp4": f"{test_source('96x64', '60000/1001', 2)} {X264} r5994.mp4",
    "start_late.mkv": f"{test_source('96x64', 24, 2)} {X264} -output_ts_offset 5 start_late.mkv",
    "h264_b.avi": f"{test_source('96x64', 24, 3)} {X264} -g 48 h264_b.avi",
    "h264_p.avi": f"{test_source('96x64', 24, 3)} {X264} -bf 0 -g 48 h264_p.avi",
    "xvid.avi": f"{test_source('96x64', 24, 3)} -c:v libxvid -bf 2 -q:v 2 xvid.avi",
    "bare.h264": f"{test_source('96x64', 30, 2)} {X264} -g 24 -f h264 bare.h264",
    "bare.hevc": f"{test_source('96x64', 30, 2)} -c:v libx265 -preset ultrafast -bf 2 -x265-params log-level=error -f hevc bare.hevc",
    "bare.m4v": f"{test_source('96x64', 30, 2)} -c:v mpeg4 -q:v 2 -f m4v bare.m4v",
    "five24.mp4": f"{test_source('96x64', 24, 5)} {H264} five24.mp4",
    "five30.mp4": f"{test_source('96x64', 30, 5)} {H264} five30.mp4",
}  # fmt: skip

# colours: a sheet of 6 x 4 patches of 16 pixels
PATCHES = np.array([(r, g, b) for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 255)] + [(64,) * 3, (192,) * 3,
                   (255, 128, 64), (40, 80, 160), (10, 10, 10), (245, 245, 245)])  # fmt: skip
BARS = np.array([(191, 191, 191), (191, 191, 0), (0, 191, 191), (0, 191, 0), (191, 0, 191), (191, 0, 0), (0, 0, 191)])
TAGS = {"bt709": "bt709", "smpte170m": "smpte170m", "bt470bg": "bt470bg", "bt2020nc": "bt2020", "fcc": "fcc",
        "smpte240m": "smpte240m"}  # fmt: skip


def coloured(name: str, matrix: str, levels: str, pixels: str, tag: str = "") -> str:
    convert = f"scale=out_color_matrix={TAGS[matrix]}:out_range={levels}:flags=neighbor+accurate_rnd+full_chroma_int"
    tags = f"setparams=colorspace={tag or matrix}:range={levels}"
    return f"-i patches.ppm -vf {convert},format={pixels},{tags} -c:v ffv1 {name}"


COLOURS = {
    **{f"{matrix}_{levels}_{pixels}.mkv": coloured(f"{matrix}_{levels}_{pixels}.mkv", matrix, levels, pixels)
       for matrix in TAGS for levels, pixels in (("tv", "yuv444p"), ("pc", "yuv420p"), ("tv", "yuv420p10le"))},
    "untagged_hd.mkv": "-i patches.ppm -vf scale=out_color_matrix=bt709:out_range=tv:flags=neighbor+accurate_rnd+full_chroma_int,"
                       "format=yuv444p,setparams=colorspace=unknown,pad=96:720 -c:v ffv1 untagged_hd.mkv",
    "untagged_sd.mkv": "-i patches.ppm -vf scale=out_color_matrix=bt601:out_range=tv:flags=neighbor+accurate_rnd+full_chroma_int,"
                       "format=yuv444p,setparams=colorspace=unknown -c:v ffv1 untagged_sd.mkv",
    "ycgco.mkv": "-i patches.ppm -vf zscale=m=ycgco:r=limited,format=yuv444p -c:v ffv1 ycgco.mkv",
    "rgb48.mkv": "-i patches.ppm -c:v ffv1 -pix_fmt gbrp10le rgb48.mkv",
}  # fmt: skip

HDR = "zscale=tin=bt709:min=bt470bg:pin=bt709:rin=limited:t={t}:m=bt2020nc:p=bt2020:npl=203,format=yuv420p10le"
X265 = "-c:v libx265 -preset ultrafast -crf 2 -x265-params log-level=error"
HOLE = "format=yuva420p,geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)':a='if(lt(X,80),0,255)'"
WOVEN = test_source("704x576", 50, 0.4) + " -vf tinterlace=interleave_top,setfield=tff -c:v mpeg2video -flags +ilme+ildct -q:v 2"
OTHERS: dict[str, str] = {
    "pq.mp4": f"-f lavfi -i smptebars=s=320x192:r=24:d=0.1 -vf {HDR.format(t='smpte2084')} {X265} pq.mp4",
    "hlg.mp4": f"-f lavfi -i smptebars=s=320x192:r=24:d=0.1 -vf {HDR.format(t='arib-std-b67')} {X265} hlg.mp4",
    "alpha.webm": f"{test_source(d=0.3)} -vf {HOLE} -c:v libvpx-vp9 -pix_fmt yuva420p -cpu-used 8 -auto-alt-ref 0 alpha.webm",
    "alpha.mov": f"{test_source(d=0.3)} -vf {HOLE} -c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le alpha.mov",
    "alpha.gif": f"{test_source(d=0.3)} -vf {HOLE},split[a][b];[a]palettegen=reserve_transparent=1[p];[b][p]paletteuse alpha.gif",
    "tff.mpg": f"{WOVEN} tff.mpg",
    "bff.mpg": f"{WOVEN} bff.mpg".replace("interleave_top,setfield=tff", "interleave_bottom,setfield=bff"),
    "twin25.mkv": f"{test_source('704x576', 50, 0.4)} -vf framestep=2 -c:v ffv1 twin25.mkv",
    "dv.dv": test_source("720x576", 50, 0.4) + " -vf tinterlace=interleave_bottom,setfield=bff,setsar=16/15 -c:v dvvideo "
             "-pix_fmt yuv420p -r 25 dv.dv",
    "twin_dv.mkv": f"{test_source('720x576', 50, 0.4)} -vf framestep=2,setsar=16/15 -c:v ffv1 twin_dv.mkv",
    "only_cover.mp3": "-f lavfi -i color=red:s=64x64:d=1 -frames:v 1 art.png|-f lavfi -i sine=d=1 -i art.png -map 0 -map 1 "
                      "-c:v copy -disposition:v attached_pic only_cover.mp3",
    "sound.wav": "-f lavfi -i sine=d=1 sound.wav",
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
    sheet = PATCHES.reshape(4, 6, 3).repeat(16, 0).repeat(16, 1).astype(np.uint8)
    (folder / "patches.ppm").write_bytes(b"P6 96 64 255\n" + sheet.tobytes())

    def one(recipe: str) -> None:
        for command in recipe.split("|"):
            run(command, folder)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, recipes.values()))
    if (folder / "mid.ts").exists():  # cut without regard to pictures, and two recordings in one file
        for whole, cut in (("mid.ts", "mid_gop.ts"), ("refresh.ts", "intra_refresh.ts")):
            data = (folder / whole).read_bytes()
            (folder / cut).write_bytes(data[len(data) // 188 // 4 * 188 :])
        (folder / "joined.ts").write_bytes((folder / "first.ts").read_bytes() + (folder / "second.ts").read_bytes())


if __name__ == "__main__":
    make({**GEOMETRY, **TIMING, **COLOURS, **OTHERS}, Path(sys.argv[1]))
