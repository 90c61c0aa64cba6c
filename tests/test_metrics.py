"""Metrics: known answers where mathematics gives them, order where it does not, and real CameraMotion clips."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from data.camera_motion import MOTIONS as CAPTION_MOTIONS
from data.camera_motion import SUBJECTS, make_clip, sample_clip
from usv import metrics
from usv.metrics.appearance import classify_subjects, frame_features, pool_features
from usv.metrics.motion import STATIC, classify_motion, optical_flow

NUM_CAPTIONS = len(SUBJECTS) * len(CAPTION_MOTIONS)


def real(indices, seed):
    clips = [sample_clip(i, seed) for i in indices]
    videos = torch.stack([clip.frames for clip in clips]).float() / 255
    return videos, [clip.subject for clip in clips], [clip.motion for clip in clips]


def blur(videos, sigma):
    radius = math.ceil(3 * sigma)
    line = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = (line / line.sum()).expand(3, 1, 1, -1)
    frames = F.pad(videos.flatten(0, 1), [radius] * 4, mode="replicate")
    frames = F.conv2d(F.conv2d(frames, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return frames.view_as(videos).clamp(0, 1)


def noise(videos, std, seed=0):
    return (videos + std * torch.randn(videos.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def texture_under(thetas, size=96):
    """Random smooth texture sampled through (T, 2, 3) affine maps: motion known without data/camera_motion.py."""
    texture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    texture = F.interpolate(texture, (256, 256), mode="bicubic").clamp(0, 1)
    grid = F.affine_grid(thetas, [len(thetas), 3, size, size], align_corners=False)
    return F.grid_sample(texture.expand(len(thetas), -1, -1, -1), grid, align_corners=False)[None]


@pytest.fixture(scope="module")
def held_out():
    return real(range(NUM_CAPTIONS), seed=5)


@pytest.fixture(scope="module")
def held_out_frames(held_out):
    return frame_features(held_out[0])


@pytest.fixture(scope="module")
def prototypes():
    videos, subjects, _ = real(range(0, NUM_CAPTIONS, 2), seed=99)
    return metrics.build_prototypes(videos[:, ::4], subjects)


# --- alignment ----------------------------------------------------------------------------------------------------


def test_every_real_subject_is_recognised(held_out, held_out_frames, prototypes):
    videos, subjects, _ = held_out
    assert classify_subjects(held_out_frames, prototypes) == subjects
    result = metrics.subject_accuracy(videos[:8, ::4], subjects[:8], prototypes)
    assert result.accuracy == 1.0 and result.predicted == subjects[:8]
    wrong = [(s + 1) % len(SUBJECTS) for s in subjects[:8]]
    assert metrics.subject_accuracy(videos[:8, ::4], wrong, prototypes).accuracy == 0.0


def test_every_real_motion_is_recognised(held_out):
    """Of every third caption, which are all motions and all subjects; `usv.evaluate --calibrate` takes all."""
    videos, _, motions = (x[::3] for x in held_out)
    assert len(set(motions)) == len(CAPTION_MOTIONS)
    result = metrics.motion_accuracy(videos, motions)
    wrong = [(i, CAPTION_MOTIONS[m]) for i, m in enumerate(motions) if result.predicted[i] != m]
    assert result.accuracy == 1.0, wrong


def test_motion_words_match_the_captions():
    assert [m.replace("s ", " ", 1) for m in CAPTION_MOTIONS] == list(metrics.MOTIONS)
    videos, _, motions = real(range(8), seed=3)
    names = [metrics.MOTIONS[m] for m in motions]
    assert metrics.motion_accuracy(videos, names).accuracy == 1.0


def test_reversed_clips_move_the_opposite_way_and_frozen_ones_not_at_all(held_out):
    videos, _, motions = (x[8:24] for x in held_out)
    assert metrics.motion_accuracy(videos.flip(1), motions).predicted == [m ^ 1 for m in motions]
    frozen = metrics.motion_accuracy(videos[:, :1].expand_as(videos), motions)
    assert frozen.accuracy == 0.0 and set(frozen.predicted) == {STATIC}
    assert metrics.motion_accuracy(torch.full_like(videos, 0.5), motions).predicted == [STATIC] * len(motions)


@pytest.mark.parametrize("degrade", [lambda v: blur(v, 2.5), lambda v: (v * 25).round() / 255, lambda v: noise(v, 0.1)])
def test_motion_survives_blur_darkness_and_noise(degrade):
    generator = torch.Generator().manual_seed(11)
    hard = ["green grass", "a brick wall", "old coins", "distant galaxies", "a horse silhouette"]
    clips = [
        make_clip(SUBJECTS.index(s), m, "slowly", generator) for s in hard for m in (i % 8 for i in range(0, 16, 5))
    ]
    videos = degrade(torch.stack([clip.frames for clip in clips]).float() / 255)
    assert metrics.motion_accuracy(videos, [clip.motion for clip in clips]).accuracy >= 0.95


def test_motion_has_the_right_sign_and_size():
    u = torch.linspace(-0.5, 0.5, 9)
    one, zero = torch.ones(9), torch.zeros(9)

    def thetas(scale, angle, x, y):
        cos, sin = torch.cos(angle) * scale * 0.4, torch.sin(angle) * scale * 0.4
        return torch.stack([cos, -sin, x * 0.4, sin, cos, y * 0.4], 1).view(9, 2, 3)

    # The view moves left by a quarter of itself (0.5 in [-1, 1]): the content moves right.
    cases = [
        ("pan left", thetas(one, zero, -0.5 * u, zero), 0, 0.25),
        ("tilt up", thetas(one, zero, zero, -0.5 * u), 1, 0.25),
        ("zoom in", thetas((-0.4 * u).exp(), zero, zero, zero), 2, 0.4),
        ("roll left", thetas(one, -0.5 * u, zero, zero), 3, 0.5),  # the view turns counter-clockwise
    ]
    for name, theta, column, size in cases:
        content = metrics.camera_motion(texture_under(theta))
        assert metrics.MOTIONS[classify_motion(content)[0]] == name
        expected = torch.zeros(4)
        expected[column] = size
        assert torch.allclose(content[0], expected, atol=0.05 * size), (name, content)


def test_fast_pans_over_a_brick_wall_keep_their_direction():
    """Half a brick a frame: flow started from rest locked on the wrong period in every one of these clips."""
    brick, generator = SUBJECTS.index("a brick wall"), torch.Generator().manual_seed(7)
    clips = [make_clip(brick, motion, "quickly", generator) for motion in (0, 1, 0, 1, 4, 5)]
    videos = torch.stack([clip.frames for clip in clips]).float() / 255
    assert metrics.motion_accuracy(videos, [clip.motion for clip in clips]).accuracy == 1.0


def test_motion_fit_ignores_a_still_logo():
    videos, _, motions = real(range(32, 40), seed=4)
    logo = (torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    videos[..., 5:35, 60:90] = logo
    assert metrics.motion_accuracy(videos, motions).accuracy == 1.0


# --- Fréchet distance and intervals -------------------------------------------------------------------------------


def test_frechet_known_answers():
    from sklearn.covariance import ledoit_wolf

    x = torch.randn(100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(8.0, dtype=torch.float64)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()))
    # tr(C + 9C − 2·3C) = 4 tr C for centred sets
    x = x - x.mean(0)
    assert metrics.frechet_distance(x, 3 * x) == pytest.approx(4 * ledoit_wolf(x.numpy())[0].trace())
    collapsed = metrics.frechet_distance(x, torch.zeros(50, 8))
    assert collapsed == pytest.approx(ledoit_wolf(x.numpy())[0].trace())


def test_frechet_orders_real_blurred_and_shuffled(held_out, held_out_frames):
    videos, frames = held_out[0], held_out_frames
    # Left-hand motions against right-hand motions of the same subjects: real against real.
    reference, candidate = pool_features(frames[0::2]), pool_features(frames[1::2])
    floor = metrics.frechet_distance(reference, candidate)
    assert metrics.frechet_distance(candidate, reference) == pytest.approx(floor)
    assert metrics.frechet_distance(reference, reference) < 1e-6 * floor
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(frames.shape[1], generator=generator) for _ in candidate])
    shuffled = frames[1::2].gather(1, order[..., None].expand_as(frames[1::2]))
    light = metrics.frechet_distance(reference, metrics.features(blur(videos[1::2], 0.8)))
    mixed = metrics.frechet_distance(reference, pool_features(shuffled))
    assert 2 * floor < light < mixed, (floor, light, mixed)
    low, high = metrics.frechet_ci(reference, candidate, held_out[1][1::2])
    assert 0 <= low < floor < high < light


def test_frechet_ci_is_as_wide_as_the_scatter_of_new_samples():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 8, generator=generator)
    sets = [torch.randn(64, 8, generator=generator) + 0.5 for _ in range(40)]
    scatter = torch.tensor([metrics.frechet_distance(reference, x) for x in sets]).std()
    widths = [high - low for low, high in (metrics.frechet_ci(reference, x, num_resamples=60) for x in sets[:5])]
    assert 0.6 < sum(widths) / 5 / (2 * 1.96 * scatter) < 1.6


def test_bootstrap_ci_of_a_mean():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    low, high = metrics.bootstrap_ci(torch.mean, x, num_resamples=1000)
    assert (low + high) / 2 == pytest.approx(float(x.mean()), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.15)

    def gap(a, b):
        return (a - b).mean() if len(a) == len(b) else a.mean() - b.mean()

    assert metrics.bootstrap_ci(gap, x, x, paired=True) == (0.0, 0.0)
    low, high = metrics.bootstrap_ci(gap, x, x, paired=False)
    assert low < 0 < high


# --- fidelity and steadiness --------------------------------------------------------------------------------------


def test_psnr_ssim_lpips_like():
    videos = real(range(0, 16, 8), seed=6)[0][:, :3] * 0.8
    assert torch.allclose(metrics.psnr(videos + 0.1, videos), torch.full((2,), 20.0), atol=1e-3)
    assert torch.allclose(metrics.ssim(videos, videos), torch.ones(2))
    assert torch.equal(metrics.lpips_like(videos, videos), torch.zeros(2))
    for metric, better in ((metrics.ssim, torch.gt), (metrics.lpips_like, torch.lt), (metrics.psnr, torch.gt)):
        assert better(metric(blur(videos, 0.7), videos), metric(blur(videos, 2.0), videos)).all()
    # Each video meets its own twin only.
    mixed = metrics.lpips_like(torch.cat([videos[:1], videos[1:].flip(4)]), videos)
    assert mixed[0] == 0 < mixed[1]


def test_vmaf_ranks_and_keeps_clips_apart():
    videos = real(range(0, 16, 8), seed=6)[0]
    soft = blur(videos, 1.0)
    together = metrics.vmaf(torch.cat([videos, soft]), torch.cat([videos, videos]))
    assert (together[:2] > 90).all() and (together[2:] < together[:2] - 5).all(), together
    alone = torch.cat([metrics.vmaf(soft[i : i + 1], videos[i : i + 1]) for i in range(2)])
    assert torch.allclose(together[2:], alone, atol=3.0), (together, alone)


def test_vmaf_without_libvmaf_says_so(tmp_path, monkeypatch):
    from usv.metrics.fidelity import find_ffmpeg

    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho ' .. scale V->V'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    find_ffmpeg.cache_clear()
    with pytest.raises(RuntimeError, match="without libvmaf"):
        metrics.vmaf(torch.zeros(1, 3, 3, 96, 96), torch.zeros(1, 3, 3, 96, 96))
    find_ffmpeg.cache_clear()


def test_flicker_ignores_fades_and_measures_jumps():
    base = torch.full((1, 9, 3, 48, 48), 0.5)
    fade = base + torch.linspace(-0.2, 0.2, 9).view(1, 9, 1, 1, 1)
    jump = base + 0.05 * torch.tensor([1.0, -1.0] * 4 + [1.0]).view(1, 9, 1, 1, 1)
    assert metrics.flicker(fade)[0] < 1e-6
    assert metrics.flicker(jump)[0] == pytest.approx(0.1, abs=1e-6)


def test_flow_warp_error_sees_what_motion_does_not_explain():
    videos = real([0, 9, 18], seed=8)[0]
    flow = optical_flow(videos)
    clean = metrics.flow_warp_error(videos, flow)
    assert (metrics.flow_warp_error(videos[:, :1].expand_as(videos)) < 1e-5).all()
    still = (videos[:, 1:] - videos[:, :-1]).square().mean((1, 2, 3, 4)).sqrt()
    assert (clean < 0.5 * still).all(), (clean, still)  # most of the change is camera motion
    # Independent noise of std s adds between s and s·√2 (interpolation averages one of the two frames).
    noisy = metrics.flow_warp_error(noise(videos * 0.6 + 0.2, 0.05), flow)
    added = (noisy.square() - (0.6 * clean).square()).sqrt()
    assert ((added > 0.05) & (added < 0.05 * 2**0.5 * 1.05)).all(), added


def test_subject_consistency_falls_where_the_subject_changes():
    videos = real([8, 16], seed=8)[0]
    frozen = metrics.subject_consistency(videos[:, :1].expand_as(videos))
    assert torch.allclose(frozen, torch.ones(2), atol=1e-5)
    spliced = torch.cat([videos[:1, :4], videos[1:, 4:]], 1)
    assert metrics.subject_consistency(spliced)[0] < metrics.subject_consistency(videos).min() - 0.1


# --- all in one call, and errors ----------------------------------------------------------------------------------


def test_evaluate_videos_agrees_with_the_single_metrics(prototypes):
    videos, subjects, motions = real(range(0, NUM_CAPTIONS, 3), seed=12)
    videos, reference = videos[:, ::4], torch.rand(40, 2560, generator=torch.Generator().manual_seed(0))
    twins = noise(videos, 0.02)
    result = metrics.evaluate_videos(videos, subjects, motions, reference, twins, prototypes=prototypes, intervals=True)
    assert result["subject_accuracy"] == metrics.subject_accuracy(videos, subjects, prototypes).accuracy
    assert result["motion_accuracy"] == metrics.motion_accuracy(videos, motions).accuracy
    assert result["frechet_distance"] == pytest.approx(
        metrics.frechet_distance(reference, metrics.features(videos)), rel=1e-4
    )
    for metric in (metrics.flicker, metrics.flow_warp_error, metrics.subject_consistency):
        assert result[metric.__name__] == pytest.approx(float(metric(videos).mean()), rel=1e-4)
    for metric in (metrics.psnr, metrics.ssim, metrics.vmaf, metrics.lpips_like):
        assert result[metric.__name__] == pytest.approx(float(metric(videos, twins).mean()), rel=1e-4)
    names = [name for name in result if not name.endswith(("_low", "_high"))]
    assert len(names) == 11 and len(result) == 31
    of_the_set = {"coverage"}  # a number without an interval
    assert all(result[f"{name}_low"] <= result[name] <= result[f"{name}_high"] for name in {*names} - of_the_set)
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.values())


VIDEOS = torch.full((2, 3, 3, 32, 32), 0.5)
KINDS = metrics.Prototypes((0, 1), torch.eye(2, 1280), torch.zeros(1280))
BAD = [
    ("videos.*uint8", lambda: metrics.features((VIDEOS * 255).byte())),
    ("videos.*shape", lambda: metrics.features(VIDEOS[0])),
    ("videos.*shape", lambda: metrics.features(VIDEOS[:0])),
    ("videos.*values", lambda: metrics.features(VIDEOS * 255)),
    ("videos.*values", lambda: metrics.features(VIDEOS * float("nan"))),
    ("videos.*1 frames", lambda: metrics.features(VIDEOS[:, :1])),
    ("videos.*2 frames", lambda: metrics.flicker(VIDEOS[:, :2])),
    ("twins.*shape", lambda: metrics.psnr(VIDEOS, VIDEOS[:, :2])),
    ("motion_labels.*got 1 labels", lambda: metrics.motion_accuracy(VIDEOS, [0])),
    ("motion_labels.*got 8", lambda: metrics.motion_accuracy(VIDEOS, [0, 8])),
    ("motion_labels.*dolly", lambda: metrics.motion_accuracy(VIDEOS, ["pan left", "dolly"])),
    ("subject_labels.*'a dog'", lambda: metrics.subject_accuracy(VIDEOS, [0, "a dog"], KINDS)),
    ("labels.*single", lambda: metrics.build_prototypes(VIDEOS, [3, 3])),
    ("features_b.*n ≥ 16", lambda: metrics.frechet_distance(torch.zeros(20, 4), torch.zeros(15, 4))),
    ("features_b.*dimensions", lambda: metrics.frechet_distance(torch.zeros(20, 4), torch.zeros(20, 5))),
    ("features_a.*NaN", lambda: metrics.frechet_distance(torch.full((20, 4), float("nan")), torch.zeros(20, 4))),
    ("n ≥ 32", lambda: metrics.frechet_ci(torch.zeros(40, 4), torch.zeros(31, 4))),
    ("samples", lambda: metrics.bootstrap_ci(torch.mean, torch.zeros(1))),
    ("paired", lambda: metrics.bootstrap_ci(torch.mean, torch.zeros(4), torch.zeros(5), paired=True)),
    ("prototypes", lambda: metrics.evaluate_videos(VIDEOS, [0, 1])),
    ("videos.*n ≥ 16", lambda: metrics.evaluate_videos(VIDEOS, reference_features=torch.zeros(20, 2560))),
    ("dense_twins.*shape", lambda: metrics.evaluate_videos(VIDEOS, dense_twins=VIDEOS[:, :2])),
]


@pytest.mark.parametrize("message, call", BAD, ids=range(len(BAD)))
def test_bad_input_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()
