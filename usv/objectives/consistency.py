"""Consistency distillation: the student says at every noise level where the teacher's flow ends.

    L = mean ‖ student(x_t, t) − (x_t − x0) / sigma ‖²,     x0 = sg student's x0 at x_t − (sigma − sigma′) · v_T

One solver step of the teacher, then the student's own opinion; so any subset of timesteps samples with it.
"""

from __future__ import annotations

import math

import torch

from usv import flow
from usv.objectives.protocol import Forwards, Networks, Point, Velocity
from usv.objectives.regression import Regression
from usv.objectives.trajectory import flow_end, solver_step


@torch.no_grad()
def consistency_velocity(student, wanted, x_t, sigma, following) -> torch.Tensor:
    """The velocity that leads from x_t straight to where the student, asked one solver step later, says the flow ends.

    Args:
        student: its velocity, under the plan it trains with.
        wanted: the teacher's guided velocity at (x_t, sigma); the student's is used only behind the step it takes.
        sigma, following: (B,), following < sigma; where it is 0 the step's own end is the target.
    """
    x = solver_step(x_t, wanted, sigma, following)
    at_end = flow.expand(following <= 0, x)
    x0 = torch.where(at_end, x, flow.x0_from_velocity(x, student(x, 1000 * following).float(), following))
    return flow.velocity_to(x_t, x0, sigma)


class ConsistencyObjective(Regression):
    learns_steps = True  # valid at every noise level, so the policy may decide which of them run
    reads = ("solver_steps", "student_timesteps")

    def target(self, networks: Networks, point: Point, decisions, generator: torch.Generator) -> torch.Tensor:
        steps, shift = self.settings.solver_steps, self.flow_shift
        wanted = networks.taught(point.prompt)(point.x, 1000 * point.sigma)
        following = flow.shift_sigma((flow.unshift_sigma(point.sigma, shift) - 1 / steps).clamp_min(0), shift)
        reach = math.ceil(len(networks.edges) / steps)  # so many bins below, which are equal in the solver's time, its step may lead
        below = range(max(0, decisions.bin - reach), decisions.bin)
        rows = {decisions.bin: decisions.rungs} | {bin: networks.rungs_at(networks.edges[bin], generator) for bin in below}
        return consistency_velocity(networks.sparse_by_bin(point.prompt, rows), wanted, point.x, point.sigma, following)

    def reference(self, teacher: Velocity, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return flow.velocity_to(x, flow_end(teacher, x, sigma, self.flow_shift, self.settings.solver_steps), sigma)

    def forwards(self) -> Forwards:
        return Forwards(teacher=1, student=1)
