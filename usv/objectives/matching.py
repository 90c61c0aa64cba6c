"""Distribution matching: the student's own samples, judged by a frozen teacher and a critic that learns what the student makes.

    noise --student at a random subset of its timesteps, cut early--> x0 --noised again--> teacher's and critic's x0 --> loss

The critic is a copy of the teacher, dense, trained by plain flow matching on the student's latest samples. Its lag behind the
student is what makes this unstable; `critic_updates` per student step keep it close. Source: DMD2 (arXiv 2405.14867).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from usv import flow
from usv.objectives import distill
from usv.sampling.sampler import renoise

LOW, HIGH = 0.02, 0.98  # noise levels at which samples are judged: beyond them teacher and critic say nothing, or everything


def random_rollout(student_timesteps: Sequence[float], generator: torch.Generator) -> list[float]:
    """A subset of the ladder that begins with its first timestep, cut at a random place: what a student must be valid for."""
    draw = torch.rand(len(student_timesteps), generator=generator)
    subset = [t for i, t in enumerate(student_timesteps) if i == 0 or draw[i] < 0.7]
    return subset[: 1 + int(torch.randint(len(subset), (1,), generator=generator))]


@torch.no_grad()
def arrive(call: Callable, noise: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
    """What the student meets (B, …) at the last of `timesteps`, having run at those before it."""
    x = noise
    for number, timestep in enumerate(timesteps[:-1]):
        t = torch.full((len(x),), float(timestep), device=x.device)
        x0 = flow.x0_from_velocity(x, call(x, t).float(), t / 1000)
        x = renoise(x0, noise, torch.full_like(t, timesteps[number + 1] / 1000), number + 1)
    return x


def rollout(call: Callable, noise: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
    """x0 (B, …) after the student's calls at `timesteps`; gradient passes through the last call only.

    call: (x, timestep (B,)) -> velocity, the student under its plan.
    """
    x = arrive(call, noise, timesteps)
    t = torch.full((len(x),), float(timesteps[-1]), device=x.device)
    return flow.x0_from_velocity(x, call(x, t).float(), t / 1000)


class Replay:
    """Batches that are dear to make: one draw in `reuse` makes a new one, the others take one of the last `size`.

    It is not saved: a resumed run begins with new batches.
    """

    def __init__(self, reuse: int, size: int = 32):
        self.reuse, self.size, self.kept = reuse, size, []

    def draw(self, make: Callable, generator: torch.Generator):
        if self.reuse == 1:
            return make()
        if len(self.kept) < self.size // 4 or torch.rand(1, generator=generator) * self.reuse < 1:
            self.kept = [*self.kept[1 - self.size :], make()]
            return self.kept[-1]
        return self.kept[int(torch.randint(len(self.kept), (1,), generator=generator))]


@torch.no_grad()
def teacher_residual(
    x0, text, empty, teacher, guidance_scale: float, generator: torch.Generator, levels: int = 4, share: flow.Share = flow.Share()
) -> float:
    """How far the guided teacher would move samples x0 (B, …): mean ‖x0 − teacher's x0‖² over noise levels 0.3 to 0.9.

    A scalar that falls as samples come closer to what the teacher makes; it needs no reference clip. share: of the batch.
    """
    total = 0.0
    for level in range(levels):
        sigma = torch.full((len(x0),), 0.3 + 0.6 * (level + 0.5) / levels, device=x0.device)
        noise = flow.normal(x0.shape, generator, share).to(x0.device)
        x_t = flow.interpolate(x0, noise, sigma)
        velocity = distill.guided_velocity(teacher, x_t, 1000 * sigma, text, empty, guidance_scale)
        total += float((x0 - flow.x0_from_velocity(x_t, velocity.float(), sigma)).square().mean())
    return total / levels


@torch.no_grad()
def jump_damage(
    call: Callable, dense: Callable, judge: Callable, noise: torch.Tensor, edges: Sequence[float], steps: Sequence[bool], bin: int
) -> tuple[float, float]:
    """Rise of `judge(x0)` when the step of `bin` is jumped, and of the rungs themselves; noise and all other steps are shared.

    Both are relative to the samples of the same steps run dense.

    call, dense: the student under its rungs, and without. edges: candidate timesteps, ascending. steps: which of them run, by bin.
    """
    ladders = [[e for i, (e, run) in enumerate(zip(edges, steps)) if (run if i != bin else keep)][::-1] for keep in (True, False)]
    kept, jumped, best = (judge(rollout(*run)) for run in ((call, noise, ladders[0]), (call, noise, ladders[1]), (dense, noise, ladders[0])))
    return (jumped - kept) / max(best, 1e-12), (kept - best) / max(best, 1e-12)


class Critic:
    """The network that learns the distribution of the student's samples, with its own optimiser.

    Args:
        model: (latents, timestep, text) -> (velocity, stats), a trainable copy of the teacher.
        lr: of AdamW. flow_shift: of the noise levels it is trained and asked at.
        share: which samples of a global batch this process has. average: takes parameters, makes their gradients the mean over
            processes; every process then holds the same critic. autocast: context of the forward that `update` makes. A
            `model.active()` is in force wherever the model runs.
    """

    def __init__(
        self, model, lr: float, flow_shift: float, share: flow.Share = flow.Share(), average: Callable = lambda parameters: None,
        autocast: Callable = nullcontext,
    ):  # fmt: skip
        self.model, self.flow_shift, self.share, self.average, self.autocast = model, flow_shift, share, average, autocast
        self.active = getattr(model, "active", nullcontext)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0)

    def sigma(self, count: int, generator: torch.Generator, device) -> torch.Tensor:
        return flow.shift_sigma(flow.stratified_uniform(count, generator, self.share), self.flow_shift).clamp(LOW, HIGH).to(device)

    def update(self, x0: torch.Tensor, text: torch.Tensor, generator: torch.Generator) -> float:
        """One step of flow matching on the student's samples x0 (B, …); returns the loss."""
        sigma = self.sigma(len(x0), generator, x0.device)
        noise = flow.normal(x0.shape, generator, self.share).to(x0.device)
        self.optimizer.zero_grad(set_to_none=True)
        with self.active():
            with self.autocast():
                velocity = self.model(flow.interpolate(x0, noise, sigma), 1000 * sigma, text)[0]
                loss = distill.velocity_loss(velocity, flow.velocity(x0, noise)).mean()
            loss.backward()
        self.average([p for p in self.model.parameters() if p.grad is not None])  # of its gates none has one: it is dense
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def loss(self, x0, text, empty, teacher, guidance_scale: float, generator: torch.Generator) -> torch.Tensor:
        """Distribution matching of the student's samples x0 (B, …), mean over the batch."""
        with torch.no_grad():
            sigma = self.sigma(len(x0), generator, x0.device)
            noise = flow.normal(x0.shape, generator, self.share).to(x0.device)
            x_t = flow.interpolate(x0.detach(), noise, sigma)
            wanted = distill.guided_velocity(teacher, x_t, 1000 * sigma, text, empty, guidance_scale)
            with self.active():
                theirs = self.model(x_t, 1000 * sigma, text)[0]
            teacher_x0, critic_x0 = (flow.x0_from_velocity(x_t, v.float(), sigma) for v in (wanted, theirs))
        return distill.distribution_matching_loss(x0, teacher_x0, critic_x0).mean()

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
