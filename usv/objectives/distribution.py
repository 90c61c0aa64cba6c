"""Distribution matching: the student's own samples, judged by a frozen teacher and a critic that learns what the student makes.

    noise --student at a random subset of its timesteps, cut early--> x0 --noised again--> teacher's and critic's x0 --> loss
    L = ½ mean ‖ x0 − sg(x0 − g) ‖²,     g = (critic's x0 − teacher's x0) / mean |x0 − teacher's x0|

Two time scales: the critic, a dense copy of the teacher, is trained by plain flow matching, `critic_updates` times for each step
of the student, at a learning rate of its own, each time on samples made afresh; and `critic_warmup` batches long before the
student's first step, since a critic that is the teacher still says nothing but guidance. With `adversarial_weight` a small head on
the critic's last features tells samples from clips, and the student is moved to where it cannot. Beside all this a regression
(`base`) goes on with `base_weight`. Sources: DMD (arXiv 2311.18828), DMD2 (arXiv 2405.14867); there the critic is the fake score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from usv import flow
from usv.objectives.protocol import Clips, Forwards, Needs, Networks, Point, Prompt, Velocity
from usv.objectives.regression import Regression, velocity_loss
from usv.objectives.rollout import random_rollout, rollout
from usv.objectives.trajectory import flow_end

LOW, HIGH = 0.02, 0.98  # noise levels at which samples are judged: beyond them teacher and critic say nothing, or everything


def distribution_matching_loss(x0: torch.Tensor, teacher_x0: torch.Tensor, critic_x0: torch.Tensor) -> torch.Tensor:
    """(B,) ½ ‖x0 − sg(x0 − g)‖², g = (critic_x0 − teacher_x0) / mean|x0 − teacher_x0|: its gradient in x0 is g / N.

    x0: (B, …), the student's samples, with gradient. teacher_x0, critic_x0: what guided teacher and critic make of the samples
    noised again; no gradient passes through them. Source: DMD2 (arXiv 2405.14867).
    """
    with torch.no_grad():
        scale = (x0 - teacher_x0).abs().flatten(1).mean(1).clamp_min(1e-6)
        target = x0 - (critic_x0 - teacher_x0) / flow.expand(scale, x0)
    return 0.5 * (x0.float() - target.float()).square().flatten(1).mean(1)


# loss -> (of the head on logits of clips and of samples, of the student on logits of its samples)
ADVERSARIAL = {
    "non_saturating": (lambda real, fake: (F.softplus(-real) + F.softplus(fake)).mean(), lambda fake: F.softplus(-fake).mean()),
    "hinge": (lambda real, fake: (F.relu(1 - real) + F.relu(1 + fake)).mean(), lambda fake: -fake.mean()),
}


class Head(nn.Module):
    """Features (B, …, C) of noised clips -> a logit for each token (B, …): positive for clips of the data, negative for samples."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.layers[-1].weight)  # it begins without an opinion

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features.float())[..., 0]


class Critic:
    """The network that learns the distribution of the student's samples, with its own optimiser.

    Args:
        model: (latents, timestep, text, **conditions) -> (velocity, stats), a trainable copy of the teacher.
        lr: of AdamW. flow_shift: of the noise levels it is trained and asked at.
        average: takes parameters, makes their gradients the mean over
            processes; every process then holds the same critic. autocast: context of the forwards that `learn` makes. A
            `model.active()` is in force wherever the model runs.
        head: tells clips from samples; None without the adversarial term. tap: the module of `model` whose input are the features.
        adversarial: a name in ADVERSARIAL. weight: of that term beside flow matching.
    """

    def __init__(
        self, model, lr: float, flow_shift: float, average: Callable = lambda parameters: None,
        autocast: Callable = nullcontext, head: Head | None = None, tap: nn.Module | None = None,
        adversarial: str = "non_saturating", weight: float = 0.0,
    ):  # fmt: skip
        self.model, self.flow_shift, self.average, self.autocast = model, flow_shift, average, autocast
        self.head, self.tap, self.weight = head, tap, weight
        self.head_loss, self.sample_loss = ADVERSARIAL[adversarial]
        self.active = getattr(model, "active", nullcontext)
        self.parameters = [*model.parameters(), *(head.parameters() if head is not None else ())]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.0, 0.99), weight_decay=0.0)

    def sigma(self, count: int, generator: torch.Generator, device, share: flow.Share = flow.Share()) -> torch.Tensor:
        return flow.shift_sigma(flow.stratified_uniform(count, generator, share), self.flow_shift).clamp(LOW, HIGH).to(device)

    def noised(self, x0: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator, share: flow.Share = flow.Share()) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t (B, …) of clips or samples, and the noise in it."""
        noise = flow.normal(x0.shape, generator, share).to(x0.device)
        return flow.interpolate(x0, noise, sigma), noise

    @contextmanager
    def features(self) -> Iterator[list[torch.Tensor]]:
        """What the tap is given by the forwards inside, in turn."""
        seen: list[torch.Tensor] = []
        hook = self.tap.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def logits(self, x_t: torch.Tensor, sigma: torch.Tensor, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """The critic's velocity and the head's logits, of one forward."""
        with self.features() as seen:
            velocity = self.model(x_t, 1000 * sigma, prompt.text, **prompt.conditions)[0]
        return velocity, self.head(seen[0])

    def learn(
        self, x0: torch.Tensor, prompt: Prompt, generator: torch.Generator, real: torch.Tensor | None = None, share: flow.Share = flow.Share(), parts: int = 1
    ) -> dict[str, float]:  # fmt: skip
        """Add the gradient of flow matching on the student's samples x0 (B, …), and of the head on them and on clips real (B, …) of the same prompt.

        They are one of `parts` equal parts of a batch; share: which of the global batch.
        """
        sigma = self.sigma(len(x0), generator, x0.device, share)
        x_t, noise = self.noised(x0, sigma, generator, share)
        values = {}
        with self.active():
            with self.autocast():
                if self.head is None:
                    velocity = self.model(x_t, 1000 * sigma, prompt.text, **prompt.conditions)[0]
                    loss = 0.0
                else:
                    velocity, fake = self.logits(x_t, sigma, prompt)
                    told = self.head_loss(self.logits(self.noised(real, sigma, generator, share)[0], sigma, prompt)[1], fake)
                    loss, values["loss/head"] = self.weight * told, told.item()
                matching = velocity_loss(velocity, flow.velocity(x0, noise)).mean()
            ((matching + loss) / parts).backward()
        return {"loss/critic": matching.item(), **values}

    def step(self) -> None:
        """One step along the gradients that were added, clipped, the mean over processes."""
        self.average([p for p in self.parameters if p.grad is not None])  # of its gates none has one: it is dense
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)):  # as the student's: one that is not is skipped on all
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, x0: torch.Tensor, prompt: Prompt, taught: Velocity, generator: torch.Generator, share: flow.Share = flow.Share()) -> torch.Tensor:
        """Distribution matching of the student's samples x0 (B, …), mean over the batch; taught: the teacher's guided velocity; share: of the global batch."""
        with torch.no_grad():
            sigma = self.sigma(len(x0), generator, x0.device, share)
            x_t, _ = self.noised(x0.detach(), sigma, generator, share)
            wanted = taught(x_t, 1000 * sigma)
            with self.active():
                theirs = self.model(x_t, 1000 * sigma, prompt.text, **prompt.conditions)[0]
            teacher_x0, critic_x0 = (flow.x0_from_velocity(x_t, v.float(), sigma) for v in (wanted, theirs))
        return distribution_matching_loss(x0, teacher_x0, critic_x0).mean()

    def adversarial_loss(self, x0: torch.Tensor, prompt: Prompt, generator: torch.Generator, share: flow.Share = flow.Share()) -> torch.Tensor:
        """The head's opinion of the student's samples x0 (B, …), to be lowered by the student.

        The gradient in x0 is taken here, while the critic's weights are in force, and handed on; its graph is gone after that.
        """
        sigma = self.sigma(len(x0), generator, x0.device, share)
        sample = x0.detach().requires_grad_(True)
        with self.active(), torch.enable_grad():
            value = self.sample_loss(self.logits(self.noised(sample, sigma, generator, share)[0], sigma, prompt)[1])
            (slope,) = torch.autograd.grad(value, sample)
        return value.detach() + ((x0 - x0.detach()) * slope).sum()

    def state_dict(self) -> dict:
        head = {} if self.head is None else {"head": self.head.state_dict()}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **head}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


class DistributionObjective:
    """Distribution matching beside a regression. `critic` is set by who builds the run's networks.

    Args:
        settings: `ObjectiveConfig`. flow_shift: of the noise levels. base: the regression that goes on with `base_weight`.
    """

    few_steps = True
    needs_timesteps = True
    reads = (
        "base", "base_weight", "matching_weight", "critic_lr", "critic_updates", "critic_warmup",
        "adversarial", "adversarial_weight", "student_timesteps", "solver_steps",
    )  # fmt: skip
    critic: Critic

    def __init__(self, settings, flow_shift: float, base: Regression):
        self.settings, self.flow_shift, self.base = settings, flow_shift, base
        self.needs = Needs(guide=base.needs.guide, critic=True)
        self.warm_up = settings.critic_warmup

    def point(self, networks: Networks, start: Point, generator: torch.Generator) -> Point:
        return self.base.point(networks, start, generator)

    def target(self, networks: Networks, point: Point, decisions, generator: torch.Generator) -> torch.Tensor:
        return self.base.target(networks, point, decisions, generator)

    def samples(self, networks: Networks, clips: Clips, generator: torch.Generator) -> torch.Tensor:
        """x0 (B, …) that the student makes of fresh noise in a random part of its timesteps."""
        noise = flow.normal(clips.latents.shape, generator, networks.share).to(networks.device)
        student = networks.sparse(clips.prompt, lambda t: networks.rungs_at(t, generator))
        return rollout(student, noise, random_rollout(self.settings.student_timesteps, generator))

    def loss(self, networks: Networks, clips: Clips, point: Point, velocity, wanted, generator) -> tuple[torch.Tensor, dict[str, float]]:
        s = self.settings
        regressed, values = self.base.loss(networks, clips, point, velocity, wanted, generator)
        x0 = self.samples(networks, clips, generator)
        total = s.base_weight * regressed
        values["loss/regression"] = regressed.item()
        if s.matching_weight:
            judged = self.critic.loss(x0, clips.prompt, networks.taught(clips.prompt), generator, networks.share)
            total = total + s.matching_weight * judged
            values["loss/distribution"] = judged.item()
        if s.adversarial_weight:
            told = self.critic.adversarial_loss(x0, clips.prompt, generator, networks.share)
            total = total + s.adversarial_weight * told
            values["loss/adversarial"] = told.item()
        return total, values

    def update(self, networks: Networks, clips: Clips, generator: torch.Generator) -> dict[str, float]:
        """The critic's steps, each on samples of its own; what is drawn for a step is drawn again for each of its parts."""
        values: dict[str, float] = {}
        for _ in range(self.settings.critic_updates):
            drawn, seen = generator.get_state(), []
            whole = networks.share.world
            for part in networks.pieces(clips):
                generator.set_state(drawn)
                with torch.no_grad(), self.critic.autocast():
                    x0 = self.samples(networks, part, generator)
                seen.append(self.critic.learn(x0, part.prompt, generator, part.latents, networks.share, networks.share.world // whole))
            self.critic.step()
            values = {name: sum(part[name] for part in seen) / len(seen) for name in seen[0]}
        return values

    def reference(self, teacher: Velocity, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return flow.velocity_to(x, flow_end(teacher, x, sigma, self.flow_shift, self.settings.solver_steps), sigma)

    def forwards(self) -> Forwards:
        """A rollout of half the ladder on average, whose last call has a gradient, is judged; the critic's own samples have none."""
        s, base = self.settings, self.base.forwards()
        rollout_calls = (1 + len(s.student_timesteps)) / 2
        trained = 2 if s.adversarial_weight else 1  # forwards of an update: samples, and clips beside them
        judged = 2 if s.adversarial_weight else 1
        return Forwards(
            teacher=base.teacher + 1, guide=base.guide, rollouts=1,
            student=base.student + rollout_calls - 1 + s.critic_updates * rollout_calls,
            critic=(judged + s.critic_updates * trained, s.critic_updates * trained + (1 if s.adversarial_weight else 0)),
        )  # fmt: skip

    def state_dict(self) -> dict:
        return {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.critic.load_state_dict(state["critic"])
