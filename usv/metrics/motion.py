"""Which way did the camera move? A similarity transform fitted to dense optical flow, added up over the clip.

    flow(x) ≈ t + a·x + b·x⊥,   log-scale = ½ log((1+a)² + b²),   rotation = atan2(b, 1+a)

Labels describe the camera: in "pan left" the content moves right, in "tilt up" it moves down, in "zoom in" it grows, in
"roll left" (counter-clockwise for the viewer) it turns clockwise. Shapes: N = B·(T−1) frame pairs, P grid points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from usv.metrics.appearance import Alignment
from usv.metrics.checks import check_labels, check_videos

MOTIONS = ("pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "roll left", "roll right")
STATIC = -1  # predicted index where nothing measurable moves: never counted as right
STATIC_TRAVEL = 0.01  # share of the frame; real CameraMotion clips travel at least 0.05
FLOW_SIZE = 192  # px: Wan-mini clips upsampled 2×, so that slow motion is not lost in flow's sub-pixel error
GRID_STRIDE = 8
MIN_RESTART = 2.0  # px of a FLOW_SIZE² frame; a smaller shift starts DIS where it starts anyway
FIT_STEPS = 8


class Flow(NamedTuple):
    """Flow of consecutive frames, in px of a FLOW_SIZE² frame, and the structure tensor of the first frame of each.

    forward, backward (B, T−1, S, S, 2) fp32, x before y; structure (B, T−1, S, S, 3) fp32: Jxx, Jxy, Jyy.
    """

    forward: np.ndarray
    backward: np.ndarray
    structure: np.ndarray


def _gray(video: np.ndarray) -> list[np.ndarray]:
    """(T, H, W, 3) fp32 in [0, 1] → T contrast-normalised uint8 frames of FLOW_SIZE²."""
    clahe = cv2.createCLAHE(clipLimit=3.0, tileGridSize=(4, 4))
    frames = []
    for frame in video:
        gray = cv2.resize(
            cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (FLOW_SIZE, FLOW_SIZE), interpolation=cv2.INTER_CUBIC
        )
        # Stretching by the frame's own extremes first gives CLAHE its 256 levels even on nearly black pictures.
        low, high = np.percentile(gray, (1, 99))
        gray = np.clip((gray - low) / max(high - low, 0.02), 0, 1)
        # The blur takes away what upsampling and CLAHE made of noise, and the finest, most repetitive texture.
        frames.append(cv2.GaussianBlur(clahe.apply((gray * 255).astype(np.uint8)), (0, 0), 2.0))
    return frames


def _structure(gray: np.ndarray) -> np.ndarray:
    image = cv2.GaussianBlur(gray, (0, 0), 1.5).astype(np.float32)
    dx, dy = cv2.Sobel(image, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(image, cv2.CV_32F, 0, 1, scale=1 / 8)
    return cv2.GaussianBlur(np.stack([dx * dx, dx * dy, dy * dy], -1), (0, 0), 4.0)


def _dis(pairs: list[tuple[np.ndarray, np.ndarray]], shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DIS flow there and back of N frame pairs, started from one constant `shift` (N, 2) px each: two (N, S, S, 2)."""
    # FAST names the camera's motion as often as MEDIUM on blurred, noisy and blotched clips, in a quarter of the time.
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    start = np.empty((FLOW_SIZE, FLOW_SIZE, 2), np.float32)
    forward, backward = np.empty((2, len(pairs), FLOW_SIZE, FLOW_SIZE, 2), np.float32)
    for i, ((first, second), shift) in enumerate(zip(pairs, shifts, strict=True)):
        start[...] = shift
        forward[i] = dis.calc(first, second, start.copy())
        start[...] = -shift
        backward[i] = dis.calc(second, first, start.copy())
    return forward, backward


def _mismatch(pairs: list[tuple[np.ndarray, np.ndarray]], fit_N4: torch.Tensor) -> torch.Tensor:
    """Mean grey-level difference (N) between each first frame and the second, brought back by the fitted similarity."""
    first, second = (torch.from_numpy(np.stack(frames)).float()[:, None] for frames in zip(*pairs, strict=True))
    tx, ty, a, b = fit_N4.float().unbind(1)
    # Centred, in half frame sides as affine_grid counts them: x' = x + flow(x).
    theta = torch.stack([1 + a, -b, 2 * tx, b, 1 + a, 2 * ty], 1).view(-1, 2, 3)
    target = F.affine_grid(theta, list(first.shape), align_corners=False)
    inside = (target.abs() <= 1).all(-1)[:, None]
    difference = (F.grid_sample(second, target, align_corners=False) - first).abs()
    return ((difference * inside).sum((1, 2, 3)) + 1) / (inside.sum((1, 2, 3)) + 1e-3)


def optical_flow(videos: torch.Tensor) -> Flow:
    """DIS flow (Kroeger et al. 2016, OpenCV) both ways between consecutive frames of (B, T, 3, H, W) in [0, 1].

    DIS starts from rest and locks on the wrong period of a brick wall that moves half a brick a frame. So where phase
    correlation sees a shift, DIS also starts from that shift, and of the two the flow is kept whose fitted
    similarity brings the frames closer together. Raises ValueError for wrong videos or fewer than two frames.
    """
    videos = check_videos(videos, min_frames=2).permute(0, 1, 3, 4, 2).contiguous().numpy()
    gray = [_gray(video) for video in videos]
    pairs = [pair for frames in gray for pair in zip(frames[:-1], frames[1:], strict=True)]
    structure = np.stack([_structure(first) for first, _ in pairs])
    forward, backward = _dis(pairs, np.zeros((len(pairs), 2)))

    # At half size, which is a quarter of the time; a constant shift needs no more.
    half = [[np.float32(cv2.resize(x, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)) for x in g] for g in gray]
    window = cv2.createHanningWindow((FLOW_SIZE // 2, FLOW_SIZE // 2), cv2.CV_32F)
    shifts = [cv2.phaseCorrelate(a, b, window)[0] for g in half for a, b in zip(g[:-1], g[1:], strict=True)]
    shifts = 2 * np.array(shifts)
    again = np.flatnonzero(np.hypot(*shifts.T) > MIN_RESTART)
    if len(again):
        retried = [pairs[i] for i in again]
        other = _dis(retried, shifts[again])
        flows = (
            Flow(forward[None, again], backward[None, again], structure[None, again]),
            Flow(other[0][None], other[1][None], structure[None, again]),
        )
        resting, shifted = (_mismatch(retried, fit_similarity(flow)) for flow in flows)
        better = (shifted < resting).numpy()
        forward[again[better]], backward[again[better]] = other[0][better], other[1][better]
    shape = (len(videos), len(gray[0]) - 1)
    return Flow(*(field.reshape(*shape, *field.shape[1:]) for field in (forward, backward, structure)))


def _return_error(flow: Flow) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward–backward gap (N, S, S) in px, and whether the forward flow stays in the frame (N, S, S) bool."""
    forward = torch.from_numpy(flow.forward).flatten(0, 1)
    backward = torch.from_numpy(flow.backward).flatten(0, 1).permute(0, 3, 1, 2)
    target = _grid(FLOW_SIZE) + forward
    inside = ((target >= 0) & (target <= FLOW_SIZE - 1)).all(-1)
    back = F.grid_sample(backward, (2 * target + 1) / FLOW_SIZE - 1, padding_mode="border", align_corners=False)
    return (forward + back.permute(0, 2, 3, 1)).norm(dim=-1), inside


def _grid(size: int) -> torch.Tensor:
    """Pixel indices (size, size, 2), x before y."""
    line = torch.arange(size, dtype=torch.float32)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)


def fit_similarity(flow: Flow) -> torch.Tensor:
    """Robust (t_x, t_y, a, b) of each frame pair: (N, 4) fp64, lengths in frame sides, a and b per unit length.

    Iteratively reweighted least squares with Cauchy weights on the residual d seen through the structure tensor J,
    dᵀJd: an edge constrains the flow only across itself (aperture problem) and flat regions say nothing. Points whose
    flow does not return or leaves the frame count little or not at all.
    """
    step = slice(GRID_STRIDE // 2, None, GRID_STRIDE)
    gap, inside = (x[:, step, step].flatten(1).double() for x in _return_error(flow))
    f_NP2 = torch.from_numpy(flow.forward[:, :, step, step]).flatten(0, 1).flatten(1, 2).double() / FLOW_SIZE
    j_NP3 = torch.from_numpy(flow.structure[:, :, step, step]).flatten(0, 1).flatten(1, 2).double()
    # Divided by its own strength plus a noise floor (grey levels² of the CLAHE image), so texture votes by presence.
    j_NP3 = j_NP3 / (j_NP3[..., 0::2].sum(-1, keepdim=True) + 4.0)
    jxx, jxy, jyy = j_NP3.unbind(-1)
    j_NP22 = torch.stack([jxx, jxy, jxy, jyy], -1).unflatten(-1, (2, 2))
    x, y = ((_grid(FLOW_SIZE)[step, step].flatten(0, 1).double() + 0.5) / FLOW_SIZE - 0.5).unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    m_P24 = torch.stack([torch.stack([one, zero, x, -y], -1), torch.stack([zero, one, y, x], -1)], 1)
    mj_NP42 = m_P24.transpose(1, 2) @ j_NP22
    normal_NP44, right_NP4 = mj_NP42 @ m_P24, (mj_NP42 @ f_NP2[..., None])[..., 0]
    trust = inside / (1 + gap.square())
    weight = trust
    ridge = 1e-6 * torch.eye(4, dtype=torch.float64)  # a flat frame has no information: it gets zero motion
    for _ in range(FIT_STEPS):
        p_N4 = torch.linalg.solve(
            torch.einsum("np,npij->nij", weight, normal_NP44) + ridge, torch.einsum("np,npi->ni", weight, right_NP4)
        )
        d_NP2 = f_NP2 - torch.einsum("pij,nj->npi", m_P24, p_N4)
        squared = torch.einsum("npi,npij,npj->np", d_NP2, j_NP22, d_NP2).clamp(min=0)
        # Scale from the median residual; not below a tenth of a pixel, or exact synthetic flow would divide by zero.
        scale = squared.median(1, keepdim=True).values.mul(2.2).clamp(min=(0.1 / FLOW_SIZE) ** 2)
        weight = trust / (1 + squared / scale)
    return p_N4


def camera_motion(videos: torch.Tensor | None = None, flow: Flow | None = None) -> torch.Tensor:
    """Motion of the *content* over the whole clip: (B, T, 3, H, W) in [0, 1] → (B, 4) fp32.

    Columns: shift right and shift down in frame sides, log of the growth, clockwise rotation in radians
    (exact for square frames; others are fitted on a square copy). Give `flow` (of `optical_flow`) where it is known.
    Raises ValueError for wrong videos or fewer than two frames.
    """
    flow = optical_flow(videos) if flow is None else flow
    tx, ty, a, b = fit_similarity(flow).unbind(1)
    pairs = torch.stack([tx, ty, ((1 + a).square() + b.square()).log() / 2, torch.atan2(b, 1 + a)], 1)
    return pairs.view(*flow.forward.shape[:2], 4).sum(1).float()


def classify_motion(content: torch.Tensor) -> list[int]:
    """Indices into MOTIONS, or STATIC, of (B, 4) content motion: the component that moves the average pixel most."""
    # Root-mean-square radius of the unit square turns log-scale and radians into the same unit, frame sides.
    travel = content * content.new_tensor([1, 1, 6**-0.5, 6**-0.5])
    size, kind = travel.abs().max(1)
    positive = travel.gather(1, kind[:, None])[:, 0] > 0
    # Content to the right or down, growing or turning clockwise: the first of each pair of labels.
    index = kind * 2 + (~positive).long()
    return torch.where(size < STATIC_TRAVEL, STATIC, index).tolist()


def check_motions(motion_labels: Sequence, count: int) -> list[int]:
    """Labels as indices into MOTIONS; names are accepted. ValueError for others or a wrong count."""
    labels = check_labels(motion_labels, count, "motion_labels")
    wrong = [x for x in labels if x not in MOTIONS and x not in range(len(MOTIONS))]
    if wrong:
        raise ValueError(f"motion_labels: got {wrong[0]!r}, expected an index 0–{len(MOTIONS) - 1} or one of {MOTIONS}")
    return [MOTIONS.index(x) if isinstance(x, str) else int(x) for x in labels]


def motion_accuracy(videos: torch.Tensor, motion_labels: Sequence, flow: Flow | None = None) -> Alignment:
    """Share of videos whose camera moves as asked, and the predicted indices into MOTIONS (−1: nothing moves).

    videos (B, T, 3, H, W) in [0, 1]; B labels, indices or names; `flow` of `optical_flow` where it is known. Chance is
    1/8. Raises ValueError for wrong videos or labels.
    """
    labels = check_motions(motion_labels, len(check_videos(videos, min_frames=2)))
    predicted = classify_motion(camera_motion(videos, flow))
    return Alignment(sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels), predicted)


def flow_warp_error(videos: torch.Tensor, flow: Flow | None = None) -> torch.Tensor:
    """What motion does not explain: (B, T, 3, H, W) in [0, 1] → (B) fp32 root-mean-square error in brightness [0, 1].

    Each next frame is warped back along the flow and compared, where the flow returns within 1.5 px and stays
    inside (after Lai et al. 2018, arXiv 1808.00449). A clip where under 5% of the pixels qualify has no trusted
    flow and is compared everywhere. Low is good; a frozen clip scores 0, so read it beside motion accuracy.
    Raises ValueError for wrong videos or fewer than two frames.
    """
    videos = check_videos(videos, min_frames=2)
    flow = optical_flow(videos) if flow is None else flow
    size = videos.shape[3:]
    gap, inside = _return_error(flow)
    valid = F.interpolate((inside & (gap < 1.5)).float()[:, None], size, mode="nearest")
    field = F.interpolate(
        torch.from_numpy(flow.forward).flatten(0, 1).permute(0, 3, 1, 2), size, mode="bilinear", antialias=True
    )
    base = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *size], align_corners=False)
    target = base + field.permute(0, 2, 3, 1) * (2 / FLOW_SIZE)
    warped = F.grid_sample(
        videos[:, 1:].flatten(0, 1), target, mode="bicubic", padding_mode="border", align_corners=False
    )
    error = (warped - videos[:, :-1].flatten(0, 1)).square().mean(1, keepdim=True)
    error, valid = (x.view(len(videos), -1) for x in (error, valid))
    valid = torch.where(valid.mean(1, keepdim=True) < 0.05, torch.ones_like(valid), valid)
    return ((error * valid).sum(1) / valid.sum(1)).sqrt()
