"""Videos of every kind that people bring, against what ffmpeg shows of them (an ffmpeg of its own, not PyAV's)."""

import gc
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("imageio_ffmpeg")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "data"), str(Path(__file__).parent)]

import decoding  # noqa: E402
import display  # noqa: E402
import looking  # noqa: E402
import scanning  # noqa: E402
import videos  # noqa: E402
import zoo  # noqa: E402

FPS, FRAMES, SIZE = 8, 5, (96, 128)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """All files of the zoo, made once."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo.make({**zoo.GEOMETRY, **zoo.TIMING, **zoo.COLOURS, **zoo.OTHERS}, folder)
    return folder


def read(path, fps=FPS, frames=FRAMES, size=SIZE):
    """(Scan, [clip or reason, …]) of a whole file."""
    seen = scanning.scan(path)
    count = videos.count_clips(seen.end - seen.start, fps, frames)
    clips = videos.read_clips(path, seen.start, fps, frames, 0, count, size, sequential=seen.sequential)
    return seen, [clip for _, clip in clips]


def decibels(a, b) -> float:
    return 10 * np.log10(255**2 / max(((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean(), 1e-6))


def fitted(shown: np.ndarray, size=SIZE) -> np.ndarray:
    """ffmpeg's displayed frames (T, H, W, 3), scaled to cover `size` and cropped in the middle, in float."""
    top, left, h, w = display.cover(shown.shape[1:3], size)
    part = torch.from_numpy(shown[:, top : top + h, left : left + w].copy()).permute(0, 3, 1, 2).float()
    return F.interpolate(part, size=size, mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()


def is_still(clip) -> bool:
    return bool((clip[1:] == clip[:-1]).all())


@pytest.mark.parametrize("name", zoo.GEOMETRY)
def test_pictures_are_those_that_ffmpeg_shows(files, name):
    """As they are and scaled. Two roundings of R'G'B' and ffmpeg's own coarser ones leave 46 dB; 35 is asked for."""
    path = files / name
    seen = scanning.scan(path)
    shown = zoo.shown(path, 3)
    for size in (shown.shape[1:3], SIZE):
        [(_, clip)] = videos.read_clips(path, seen.start, seen.rate, 3, 0, 1, size)
        assert not isinstance(clip, str), clip
        assert decibels(clip.permute(0, 2, 3, 1), fitted(shown, size)) > 40
    assert seen.end - seen.start == pytest.approx(len(seen.times) / seen.rate, abs=0.03)


@pytest.mark.parametrize("name", zoo.COLOURS)
def test_colours_are_those_that_were_put_in(files, name):
    """Every tagged matrix, range and depth within 4 levels of the source, and of ffmpeg's view."""
    path = files / name
    frame = scanning.scan(path).frame
    picture = display.Display((frame.height, frame.width)).picture(frame, 1.0)[:, :64, :96]
    got = picture[:, 8::16, 8::16].reshape(3, -1).T.int().tolist()
    assert np.abs(np.array(got) - zoo.PATCHES).max() <= 4, (name, got)
    if "ycgco" not in name and "untagged" not in name:  # ffmpeg's scaler has no YCgCo, and guesses BT.601
        theirs = zoo.shown(path, 1)[0][8:64:16, 8:96:16].reshape(-1, 3)
        assert np.abs(np.array(got) - theirs.astype(int)).max() <= 4, name


@pytest.mark.parametrize("name", ["pq.mp4", "hlg.mp4"])
def test_hdr_is_what_zimg_makes_of_it(files, name):
    path = files / name
    frame = scanning.scan(path).frame
    picture = display.Display((frame.height, frame.width)).picture(frame, 1.0).permute(1, 2, 0).numpy().astype(int)
    steps = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=clip,zscale=t=bt709:m=gbr:r=pc,format=gbrp"
    theirs = zoo.shown(path, 1, before=steps)[0].astype(int)
    points = [(40, (2 * i + 1) * 160 // 7) for i in range(7)] + [(164, 80)]
    ours, theirs = (np.array([image[p] for p in points]) for image in (picture, theirs))
    assert np.abs(ours - theirs).max() <= 4, (ours, theirs)
    assert (ours[-1] >= 251).all(), "reference white"
    assert np.abs(ours[:-1] - zoo.BARS).max() <= 16  # ten bits of PQ are coarse in the dark: zimg's own error is 15


def test_transparent_pictures_are_shown_on_white(files):
    for name in ("alpha.webm", "alpha.mov", "alpha.gif"):
        frame = scanning.scan(files / name).frame
        picture = display.Display((120, 160)).picture(frame, 1.0)
        assert (picture[:, :, :70] == 255).all(), name
        assert (picture[:, :, 90:].float().std((1, 2)) > 20).all(), name


def test_interlaced_pictures_have_no_combs(files):
    """Against the progressive twin, which combs are 30 dB from."""
    for name, twin in (("tff.mpg", "twin25.mkv"), ("bff.mpg", "twin25.mkv"), ("dv.dv", "twin_dv.mkv")):
        seen, [clip, *_] = read(files / name, fps=25, size=(144, 176))
        _, [progressive, *_] = read(files / twin, fps=25, size=(144, 176))
        assert seen.frame.interlaced_frame
        stored = [moment for moment, _ in zip(decoding.moments(files / name, seen.start), range(FRAMES))]
        combed = torch.stack([display.Display((144, 176)).picture(m.frame, m.sar) for m in stored])
        assert decibels(clip, progressive) > max(32, decibels(combed, progressive) + 4), name


TIMES = {  # file: (seconds shown, clips of 5 frames at 8 a second, which of them are rightly still)
    "cut.mp4": (3.2, 5, 0), "cut_short.mp4": (0.8, 1, 0), "one.mp4": (8.0, 13, 0), "one.ts": (8.0, 13, 0),
    "one.mpg": (8.0, 13, 0), "vfr_b.mp4": (6.0, 9, 5), "mid_gop.ts": (None, None, 0), "intra_refresh.ts": (None, None, 0),
    "joined.ts": (4.0, 6, 0), "open_gop.mkv": (3.0, 5, 0), "r23976.mp4": (2.002, 3, 0), "r5994.mp4": (2.002, 3, 0),
    "start_late.mkv": (2.0, 3, 0), "h264_b.avi": (3.0, 5, 0), "h264_p.avi": (3.0, 5, 0), "xvid.avi": (2.917, 4, 0), "bare.h264": (2.0, 3, 0),
    "bare.hevc": (2.0, 3, 0), "bare.m4v": (2.0, 3, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMES)
def test_times_are_those_of_the_film(files, name):
    """Length, count, no still of a moving film, and the same clips wherever reading begins."""
    seconds, count, stills = TIMES[name]
    seen, clips = read(files / name)
    if seconds is None:  # what can be shown begins somewhere: ffmpeg's own count of frames says how much
        theirs = len(zoo.shown(files / name, 10_000))
        assert len(seen.times) == pytest.approx(theirs, abs=3)
    else:
        assert seen.end - seen.start == pytest.approx(seconds, abs=0.05) and len(clips) == count
    assert clips and not [clip for clip in clips if isinstance(clip, str)]
    assert sum(is_still(clip) for clip in clips) == stills
    for number in {1, len(clips) - 1} & set(range(len(clips))):
        [(_, alone)] = videos.read_clips(files / name, seen.start, FPS, FRAMES, number, number + 1, SIZE, 0.0, seen.sequential)
        assert torch.equal(alone, clips[number]), "the result must not depend on where reading begins"


def test_frames_are_on_screen_when_ffmpeg_shows_them(files):
    for name in ("cut.mp4", "vfr_b.mp4", "one.ts", "one.mpg", "h264_b.avi", "h264_p.avi", "xvid.avi", "bare.h264", "bare.hevc", "bare.m4v"):
        _, clips = read(files / name)
        shown = zoo.shown(files / name, len(clips) * FRAMES, before=f"setpts=PTS-STARTPTS,fps={FPS}:round=up")
        ours = torch.cat(clips).permute(0, 2, 3, 1)[: len(shown)]
        per_frame = [decibels(a, b) for a, b in zip(ours, fitted(shown))]
        assert np.mean(np.array(per_frame) > 35) > 0.95, (name, per_frame)


def damaged(path: Path, seed: int) -> Path:
    """A copy with a dozen flipped bits, or half a dozen lost packets of a transport stream."""
    draw, data = random.Random(seed), bytearray(path.read_bytes())
    if path.suffix == ".ts":
        packets = [data[i : i + 188] for i in range(0, len(data), 188)]
        for _ in range(6):
            packets.pop(draw.randrange(20, len(packets)))
        data = b"".join(packets)
    else:
        begin = data.find(b"mdat") + 200
        for _ in range(12):
            data[draw.randrange(begin, len(data) - 9000)] ^= 1 << draw.randrange(8)
    copy = path.with_name(f"damaged{seed}{path.suffix}")
    copy.write_bytes(bytes(data))
    return copy


@pytest.mark.parametrize("name", ["one.mp4", "one.ts"])
def test_damaged_pictures_are_left_out(files, name):
    _, whole = read(files / name)
    for seed in range(2):
        _, clips = read(damaged(files / name, seed))
        kept = [(clip, good) for clip, good in zip(clips, whole) if not isinstance(clip, str)]
        assert len(kept) < len(clips)
        assert all((clip.float() - good.float()).abs().max() <= 2 for clip, good in kept)
        assert all(clip.startswith("corrupt: ") for clip in clips if isinstance(clip, str))


def test_five_seconds_are_eighty_one_frames_at_sixteen(files):
    for name in ("five24.mp4", "five30.mp4"):
        seen = scanning.scan(files / name)
        assert videos.count_clips(seen.end - seen.start, 16, 81) == 1
        [(_, clip)] = videos.read_clips(files / name, seen.start, 16, 81, 0, 1, (16, 16))
        assert clip.shape == (81, 3, 16, 16)


def test_strange_names(files, tmp_path):
    plain = (files / "plain.mp4").read_bytes()
    for name in ("a:b.mp4", "100%.mp4", "ü 'quoted' \"x\".mp4", "-i.mp4", "line\nbreak.mp4", b"\xff\xfe.mp4"):
        path = tmp_path / (name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"))
        path.write_bytes(plain)
        assert scanning.scan(path).end == pytest.approx(1.333, abs=0.01)


def test_what_is_no_film_is_said(files, tmp_path, monkeypatch):
    for name, reason in (("only_cover.mp3", "only cover art"), ("sound.wav", "no video stream")):
        with pytest.raises(decoding.Unusable, match=reason):
            scanning.scan(files / name)
    (tmp_path / "x.mp4").write_bytes(b"\0" * 3000)
    with pytest.raises(decoding.Unusable, match="corrupt: "):
        scanning.scan(tmp_path / "x.mp4")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000)  # a picture of 32k x 32k is never decoded
    with pytest.raises(decoding.Unusable, match="too large: 160 x 120"):
        scanning.scan(files / "plain.mp4")


def test_a_look_says_why_a_file_cannot_be_opened_and_nothing_else(files, tmp_path, caplog):
    """Several at once: FFmpeg's log is one for all threads, and its words on one file are nothing to be shown beside another."""
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut_off.mp4").write_bytes((files / "long.mp4").read_bytes()[:20_000])
    (tmp_path / "notes.mp4").write_text("not a film")
    found = [SimpleNamespace(file=name) for name in ("empty.mp4", "cut_off.mp4", "notes.mp4", *(str(path) for path in sorted(files.iterdir())))]
    looks = looking.look_at(found, SimpleNamespace(videos=tmp_path, scenes=False), progress=False)
    assert looks["empty.mp4"].reason == "corrupt: it is empty, 0 bytes; copy it again"
    assert "no index (moov)" in looks["cut_off.mp4"].reason
    assert looks["notes.mp4"].reason == "corrupt: InvalidDataError: Invalid data found when processing input"
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("libav")]


def test_frames_do_not_pile_up(files):
    """A clip keeps its pictures, not its frames, which are 12 MB each at 4K: PyAV's side data holds what it is asked for."""
    path, shown = files / "turned_90.mp4", display.Display((32, 32))
    gc.collect()
    gc.disable()
    try:
        count = len([shown.picture(moment.frame, moment.sar) for moment in decoding.moments(path, 0.0)])
        with warnings.catch_warnings(action="ignore"):
            alive = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert count > 20 and alive < 6


def test_the_first_picture_alone_says_what_all_pictures_say(files):
    """A look that decodes one picture and lets FFmpeg decode none beside it, against one that reads on until a picture is due."""

    def told(video, quickly):
        try:
            found = scanning._scan(video, quickly)
        except decoding.BROKEN as error:
            return decoding.reason_of(error)
        if found is None:
            return None
        look = display.look(found.frame, found.sar, crop=found.crop)
        return found.start, found.end, found.times.tolist(), found.rate, found.sequential, found.codec, look, found.frame.interlaced_frame, found.frame.pts

    quick = 0
    for path in sorted(files.iterdir()):
        try:
            with decoding.Video(path) as video:
                whole = told(video, False)
            with decoding.Video(path, for_a_look=True) as video:
                alone = told(video, True)
        except (decoding.Unusable, *decoding.BROKEN):
            continue
        assert alone is None or alone == whole, path.name
        quick += alone is not None
    assert quick > 60


def test_our_own_videos_say_how_they_are_coloured(tmp_path):
    """infer.py's mp4: tagged BT.709, so that a player of any size shows the colours that were generated."""
    from usv.video import write_mp4

    colours = torch.tensor(zoo.PATCHES[:8] / 255).float()
    video = colours.repeat_interleave(16, 0).repeat_interleave(2, 0).T[None, :, None, :].expand(6, 3, 64, -1)
    write_mp4(tmp_path / "v.mp4", video)
    frame = scanning.scan(tmp_path / "v.mp4").frame
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    shown = zoo.shown(tmp_path / "v.mp4", 1)[0][32, 16::32]
    assert np.abs(shown.astype(int) - zoo.PATCHES[:8]).max() <= 6  # crf 16
