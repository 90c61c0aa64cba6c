"""Trajectory distillation: the student says where a guide's flow ends, at the inputs that its own sampling meets.

    L = mean ‖ student(x, t) − (x − x0) / sigma ‖²,     x0 = end of the guide's flow from x, itself from the student's rollout

Errors of its earlier steps are in x, and there is no detour through its own opinion. The guide is the teacher or a student; one of few
steps says in one forward where its flow ends, so that a student of few steps takes another plan in a hundred cheap steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from usv import flow
from usv.objectives.protocol import Forwards, Needs, Networks, Point, Velocity
from usv.objectives.regression import Regression
from usv.objectives.rollout import arrive, random_rollout


def solver_step(x_t: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """One Euler step of the flow from sigma to `following`, both (B,)."""
    return x_t - flow.expand(sigma - following, x_t) * velocity


@torch.no_grad()
def flow_end(velocity: Velocity, x: torch.Tensor, sigma: torch.Tensor, flow_shift: float, steps: int) -> torch.Tensor:
    """Where the flow of `velocity` that passes x (B, …) at sigma (B,) ends: second order in the step (Adams–Bashforth).

    steps: for the whole way from sigma 1; a shorter way takes its share, at least one.
    """
    u = flow.unshift_sigma(sigma, flow_shift)
    count, before, size_before, now = max(1, round(float(u.mean()) * steps)), None, None, sigma
    for left in range(count - 1, -1, -1):
        following = flow.shift_sigma(u * left / count, flow_shift)
        here, size = velocity(x, 1000 * now).float(), now - following
        slope = here if before is None else here + flow.expand(size / (2 * size_before), x) * (here - before)
        x, now, before, size_before = solver_step(x, slope, now, following), following, here, size
    return x


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


class TrajectoryObjective(Regression):
    """Trajectories cost many forwards: each is trained on `reuse` times on average."""

    reads = ("solver_steps", "student_timesteps", "reuse", "guide")
    needs_timesteps = True

    def __init__(self, settings, flow_shift: float):
        super().__init__(settings, flow_shift)
        self.needs = Needs(guide=settings.guide != "teacher" and bool(settings.guide or settings.init))
        self.replay = Replay(settings.reuse)

    def point(self, networks: Networks, start: Point, generator: torch.Generator) -> Point:
        return self.replay.draw(lambda: self.make(networks, start, generator), generator)

    def make(self, networks: Networks, start: Point, generator: torch.Generator) -> Point:
        """What the student's own rollout from the batch's noise meets, and the velocity to the end of the guide's flow from there."""
        ladder = random_rollout(self.settings.student_timesteps, generator)
        sigma = torch.full((len(start.noise),), ladder[-1] / 1000, device=networks.device)
        x = arrive(networks.sparse(start.prompt, lambda t: networks.rungs_at(t, generator)), start.noise, ladder)
        x0 = flow_end(networks.guided(start.prompt), x, sigma, self.flow_shift, self.settings.solver_steps)
        return Point(x, sigma, start.prompt, start.noise, float(sigma[0]), flow.velocity_to(x, x0, sigma))

    def target(self, networks: Networks, point: Point, decisions, generator: torch.Generator) -> torch.Tensor:
        return point.wanted

    def reference(self, teacher: Velocity, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return flow.velocity_to(x, flow_end(teacher, x, sigma, self.flow_shift, self.settings.solver_steps), sigma)

    def forwards(self) -> Forwards:
        """Rollouts of half the ladder and of the solver on average."""
        s = self.settings
        return Forwards(guide=(s.solver_steps + 1) / 2 / s.reuse, student=(len(s.student_timesteps) - 1) / 2 / s.reuse)
