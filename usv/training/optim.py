"""Muon for the matrices inside the blocks, AdamW for everything else, behind one optimiser's interface.

Muon steps along the orthogonalised momentum of a matrix (Newton–Schulz; arXiv 2502.16982 scales it to AdamW's step size, so one
learning rate serves both). On Wan-mini it learned motion where AdamW did not (docs/log.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from usv_kernels import multiplies_bf16


class Muon(torch.optim.Muon):
    """torch's Muon; on a CPU that does not multiply bf16, its Newton–Schulz iteration runs in the matrices' own dtype.

    torch iterates in bf16 whatever it is given, which such a CPU emulates: there it took 38% of a training step of Wan-mini. State is
    torch's own (`momentum_buffer`), so either goes on from the other's.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step, as torch's."""
        if multiplies_bf16() or any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group)
        return loss

    def _step_one(self, p: torch.nn.Parameter, group: dict) -> None:
        state = self.state[p]
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(p.grad, memory_format=torch.preserve_format))
        momentum.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        p.mul_(1 - group["lr"] * group["weight_decay"])
        size = 0.2 * max(p.shape) ** 0.5  # match_rms_adamw
        p.add_(orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"]), alpha=-group["lr"] * size)


def muon(matrices: Iterable[torch.nn.Parameter], lr: float, weight_decay: float) -> Muon:
    """Muon at AdamW's step size."""
    return Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def orthogonalised(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """(m, n) with the same singular vectors and singular values near 1, in its own dtype: odd quintics of the matrix (Newton–Schulz)."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


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
            self.parts.append(muon(matrices, lr, weight_decay))
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
