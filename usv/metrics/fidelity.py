"""Frame fidelity: PSNR, SSIM and VMAF of a video against its twin (same prompt and seed), and flicker of one alone."""

from __future__ import annotations

import json
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from usv.metrics.checks import check_twins, check_videos


def psnr(videos: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each video against its twin: two (B, T, 3, H, W) in [0, 1] → (B) fp32, dB.

    Over all pixels of the clip (torchmetrics); infinite for equal clips. Raises ValueError for differing shapes.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    videos, twins = check_twins(videos, twins)
    return peak_signal_noise_ratio(videos, twins, data_range=1.0, reduction="none", dim=(1, 2, 3, 4))


def ssim(videos: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Structural similarity, mean over frames: two (B, T, 3, H, W) in [0, 1] → (B) fp32, 1 for equal clips.

    Gaussian window of Wang et al. 2004 (torchmetrics). Raises ValueError for differing shapes.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    videos, twins = check_twins(videos, twins)
    value = structural_similarity_index_measure(
        videos.flatten(0, 1), twins.flatten(0, 1), data_range=1.0, reduction="none"
    )
    return value.view(videos.shape[:2]).mean(1)


def flicker(videos: torch.Tensor) -> torch.Tensor:
    """Brightness that jumps and returns: (B, T, 3, H, W) in [0, 1] → (B) fp32 in brightness [0, 1], low is good.

    Mean |L_t − (L_{t−1} + L_{t+1})/2| of luminance in a 12×12 grid: steady motion and fades cancel to first order,
    which the plain frame difference (VBench) counts as flicker. Raises ValueError for fewer than three frames.
    """
    videos = check_videos(videos, min_frames=3)
    luminance = torch.einsum("btchw,c->bthw", videos, videos.new_tensor([0.299, 0.587, 0.114]))
    coarse = F.adaptive_avg_pool2d(luminance, 12)
    return (coarse[:, 1:-1] - (coarse[:, :-2] + coarse[:, 2:]) / 2).abs().mean((1, 2, 3))


def border_ratio(videos: torch.Tensor, patch: int) -> torch.Tensor:
    """The codec's grid: (B, T, 3, H, W) in [0, 1] → (B) fp32, mean |step| between pixels across borders of `patch` px ÷ that inside patches.

    1 for a picture that does not know the patches. Still clips of one colour count as 1. Raises ValueError for a patch that leaves no
    inside or no border.
    """
    videos = check_videos(videos)
    if not 2 <= patch < min(videos.shape[3:]):
        raise ValueError(f"patch: got {patch}, expected 2 px to {min(videos.shape[3:]) - 1}: a border and an inside")
    across, inside = [], []
    for axis in (3, 4):
        step = videos.diff(dim=axis).abs().transpose(axis, -1).flatten(1, -2)  # (B, lines, pixels − 1)
        border = torch.arange(step.shape[-1]) % patch == patch - 1
        across.append(step[..., border].mean((1, 2)))
        inside.append(step[..., ~border].mean((1, 2)))
    across, inside = torch.stack(across).mean(0), torch.stack(inside).mean(0)
    return torch.where(inside + across > 0, across / inside.clamp_min(1e-6), torch.ones_like(across))


@lru_cache(maxsize=1)
def find_ffmpeg() -> str:
    """The ffmpeg of imageio-ffmpeg. RuntimeError where it is missing or was built without libvmaf."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise RuntimeError("vmaf needs the package imageio-ffmpeg: pip install imageio-ffmpeg") from error
    executable = imageio_ffmpeg.get_ffmpeg_exe()
    listing = subprocess.run([executable, "-hide_banner", "-filters"], capture_output=True, text=True, check=True)
    if " libvmaf " not in listing.stdout:
        raise RuntimeError(
            f"vmaf: {executable} was built without libvmaf; point IMAGEIO_FFMPEG_EXE at an ffmpeg that lists it under "
            "'ffmpeg -filters', or leave VMAF out"
        )
    return executable


def vmaf(videos: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Netflix's VMAF (model v0.6.1, libvmaf) of each video against its twin: two (B, T, 3, H, W) → (B) fp32, 0–100.

    All clips go through one ffmpeg process as one stream, so VMAF's motion term sees each clip's neighbour at the seam;
    it takes the smaller of the two neighbouring motions, which keeps the seam out. Sides are cropped to even numbers.
    The model was trained at 1080p: at 96 px read it as a ranking only.
    Raises ValueError for differing shapes, RuntimeError where no ffmpeg with libvmaf is found or it fails.
    """
    videos, twins = check_twins(videos, twins)
    executable = find_ffmpeg()
    height, width = (side // 2 * 2 for side in videos.shape[3:])
    with tempfile.TemporaryDirectory() as folder:
        inputs = []
        for name, clips in (("video", videos), ("twin", twins)):
            frames = clips[..., :height, :width].flatten(0, 1).permute(0, 2, 3, 1)
            Path(folder, name).write_bytes((frames * 255).round().byte().contiguous().numpy().tobytes())
            inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "16", "-i", name]
        graph = "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:log_path=log:n_threads=1"
        command = [executable, "-hide_banner", "-loglevel", "error", *inputs, "-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"vmaf: ffmpeg failed with code {done.returncode}: {done.stderr.strip()[-500:]}")
        scores = [frame["metrics"]["vmaf"] for frame in json.loads(Path(folder, "log").read_text())["frames"]]
    if len(scores) != videos.shape[0] * videos.shape[1]:
        raise RuntimeError(f"vmaf: ffmpeg scored {len(scores)} frames, expected {videos.shape[0] * videos.shape[1]}")
    return torch.tensor(scores).view(videos.shape[:2]).mean(1)
