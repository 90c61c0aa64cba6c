"""Muon for the matrices inside the blocks, AdamW for everything else, behind one optimiser's interface.

Muon steps along the orthogonalised momentum of a matrix (Newton–Schulz; arXiv 2502.16982 scales it to AdamW's step size, so one
learning rate serves both). On Wan-mini it learned motion where AdamW did not (docs/log.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch


class MuonAdamW(torch.optim.Optimizer):
    """Args: named parameters; lr, betas (of AdamW), weight_decay as in AdamW. State is kept by parameter, as in any optimiser."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], lr: float, betas: tuple[float, float], weight_decay: float):
        named = list(named)
        matrices = [p for name, p in named if p.ndim == 2 and ".blocks." in f".{name}"]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        super().__init__([p for _, p in named], dict(lr=lr, betas=betas, weight_decay=weight_decay))
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay))
        self.state = defaultdict(dict)
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One step of both at the learning rate of `param_groups[0]`."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            part.step()
