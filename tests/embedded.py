"""The embedded model with real clips of its world, for tests of what holds on trained weights only."""

import tiny
import torch

from usv.models.forward import SparseTransformer
from usv.sampling.generate import load_pipeline
from usv.sparse.grid import Tile

WAN_MINI = tiny.ROOT / "data" / "wan-mini"


def wan_mini():
    """The pipeline, and its transformer as the teacher of sparse forwards."""
    pipe = load_pipeline(str(WAN_MINI))
    return pipe, SparseTransformer(pipe.transformer, Tile(3, 4, 4)).eval().requires_grad_(False)


@torch.no_grad()
def clips(pipe, count):
    """Latents (count, 16, T, h, w) of CameraMotion clips, normalised, the embeddings of their captions, and that of the empty one."""
    import camera_motion

    found = [camera_motion.sample_clip(i * 37, 11) for i in range(count)]
    video = torch.stack([c.frames for c in found]).transpose(1, 2).float() / 127.5 - 1
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    x0 = pipe.vae.encode(video).latent_dist.mode() / std
    text, empty = pipe.encode_prompt([c.caption for c in found], "", True, max_sequence_length=16)
    return x0, text, empty[0]
