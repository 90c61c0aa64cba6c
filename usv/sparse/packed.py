"""Packed sequences, as LTX's pipelines make them: tokens (B, S + E, C), the grid's row-major in one run, E conditions beside it.

    num_frames, height, width of the call, or, where it gives coordinates instead, the grid that these tell  ->  TokenGrid
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from usv.sparse.grid import TokenGrid


def packed_grid(call: Mapping) -> TokenGrid:
    """The grid of a call (arguments by name), whose pipeline tells it or else the place of each token. ValueError where it does neither."""
    sides, coords = tuple(call.get(name) for name in ("num_frames", "height", "width")), call.get("video_coords")
    if None not in sides and not windowed(call):
        return TokenGrid(*sides)
    if coords is None:
        raise ValueError(f"num_frames, height, width: got {sides}, expected the sides of the packed latents, or video_coords")
    return grid_of_coords(coords, conditions_before(call))


def windowed(call: Mapping) -> bool:
    """LTXI2VLongMultiPromptPipeline says (1, 1, 1) beside its coordinates; it puts what conditions a window at its end."""
    sides = (call.get(name) or 0 for name in ("num_frames", "height", "width"))
    return call.get("video_coords") is not None and math.prod(sides) == 1


def conditions_before(call: Mapping) -> bool:
    """Whether the tokens of a call (arguments by name) that are not of the grid stand before the video: LTX-2, which has
    audio, and windows have them after it."""
    return not (windowed(call) or "audio_hidden_states" in call)


def grid_of_coords(coords: Tensor, video_last: bool) -> TokenGrid:
    """The grid of row-major video tokens from their coordinates (B, 3, S) along (t, y, x), or (B, 3, S, 2) as intervals.

    Condition tokens stand before the video (video_last) or after it. A frame is a run of equal t. The video's frames are the
    whole ones at equal distances, the first distance apart: causal codecs make their first latent frame of one frame only.
    """
    if coords.dim() == 4:
        coords = coords[..., 0]
    t, _, x = coords[0].detach().float().cpu()
    if video_last:
        t, x = t.flip(0), x.flip(0)
    per_frame = int((t != t[0]).long().argmax()) or t.numel()
    whole = t[: t.numel() // per_frame * per_frame].view(-1, per_frame)
    alike = (whole == whole[:, :1]).all(1)
    steps = (whole[1:, 0] - whole[:-1, 0]) * (-1 if video_last else 1)
    frames, usual = 1, None
    for step, frame_is_one in zip(steps.tolist(), alike[1:].tolist()):
        if step <= 0 or not frame_is_one:
            break
        equal = usual is None or math.isclose(step, usual, rel_tol=1e-3)
        if not equal and not (video_last and step < usual) and not (not video_last and frames == 2):
            break
        frames += 1
        if not equal and video_last:  # the first frame, last here
            break
        usual = step
    width = int(torch.unique(x[:per_frame]).numel())
    return TokenGrid(frames, per_frame // width, width)
