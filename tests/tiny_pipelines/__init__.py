"""A tiny random instance of every video pipeline of diffusers whose transformer can run under a pattern, and a call of it.

    pipe, call = make("WanPipeline")
    latents = video(pipe, call)

Two blocks of width 24 to 32 on some 48 tokens, two steps, latents out. Prompts are random embeddings; a codec is `Codec`,
whose latents are a fixed projection of pooled pixels: what a pattern changes lies in the transformer alone.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

from . import cogvideox_hunyuan, cosmos, ltx, others, wan
from .parts import Stub as Stub

PIPELINES = {name: build for family in (wan, cogvideox_hunyuan, ltx, cosmos, others) for name, build in family.PIPELINES.items()}


def make(name: str):
    """(pipeline, arguments of its call)."""
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


@torch.no_grad()
def video(pipe, call, seed=0):
    """The latents that a call makes, as one tensor."""
    with contextlib.redirect_stdout(None):
        out = pipe(**call, generator=torch.Generator().manual_seed(seed), return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack([torch.as_tensor(np.asarray(x)) for x in out]) if isinstance(out, list) else torch.as_tensor(out)


def watch_dense(monkeypatch):
    """A list that grows by the length of each sequence that attends to one of its own length by torch's dense attention."""
    dense, seen = F.scaled_dot_product_attention, []

    def spy(query, key, value, *more, **options):
        if query.shape[-2] == key.shape[-2]:
            seen.append(query.shape[-2])
        return dense(query, key, value, *more, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen
