"""What a forward knows of its input before its first layer has run, as a few numbers: pooled text and pooled latents."""

from __future__ import annotations

from functools import lru_cache

import torch

TEXT = 6  # projections of the pooled text
CONTENT = TEXT + 3


@lru_cache(maxsize=4)
def _projection(width: int) -> torch.Tensor:
    return torch.randn(width, TEXT, generator=torch.Generator().manual_seed(width)) / width**0.5


@torch.no_grad()
def content_of(latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(B, CONTENT) fp32 on the host, each of order 1.

    latents: (B, C, T, H, W), as the forward gets them. text: (B, L, D). Of the text a fixed random projection of its normalised mean; of
    the latents the log of their size, and the sizes of their differences along time and space over that.
    """
    pooled = text.float().mean(1).cpu()
    pooled = torch.nn.functional.layer_norm(pooled, pooled.shape[-1:]) @ _projection(pooled.shape[-1])
    x = latents.float()
    root_mean_square = lambda y: torch.linalg.vector_norm(y.flatten(1), dim=1) / y[0].numel() ** 0.5  # noqa: E731
    size = root_mean_square(x).clamp_min(1e-6)
    along = [root_mean_square(x.diff(dim=d)) / size if x.shape[d] > 1 else torch.zeros_like(size) for d in (2, 4)]
    return torch.cat([pooled, torch.stack([size.log(), *along], -1).cpu()], -1)
