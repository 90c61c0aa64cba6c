"""usv/objectives/distribution.py: gradients that can be worked out by hand, two time scales, and modes where regression gives their mean."""

import pytest
import torch
from torch import nn

from usv import flow
from usv.config import ObjectiveConfig
from usv.objectives import make_objective
from usv.objectives.distribution import Critic, Head, distribution_matching_loss
from usv.objectives.protocol import Clips, Point, Prompt


def test_gradient_of_distribution_matching_is_the_scaled_difference():
    x0 = torch.randn(2, 3, 4, requires_grad=True)
    teacher, critic = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    distribution_matching_loss(x0, teacher, critic).sum().backward()
    scale = (x0 - teacher).abs().flatten(1).mean(1).view(2, 1, 1)
    torch.testing.assert_close(x0.grad, ((critic - teacher) / scale / 12).detach())


def test_matching_pulls_samples_to_the_teacher_and_away_from_the_critic():
    """Teacher certain of one clip, critic certain of another: gradient descent moves a sample towards the first."""

    class Certain(torch.nn.Module):
        def __init__(self, x0):
            super().__init__()
            self.x0 = torch.nn.Parameter(x0)

        def forward(self, x_t, timestep, text):
            return (x_t - self.x0) / flow.expand(timestep / 1000, x_t), {}

    shape = (1, 2, 3, 4, 4)
    teacher, critic = Certain(torch.ones(shape)), Critic(Certain(-torch.ones(shape)), 1e-2, 3.0)
    sample = torch.zeros(2, *shape[1:], requires_grad=True)
    text = Prompt(torch.zeros(2, 1, 1))
    loss = critic.loss(sample, text, lambda x, t: teacher(x, t, None)[0], torch.Generator().manual_seed(0))
    loss.backward()
    assert float(sample.grad.max()) < 0
    before = critic.model.x0.detach().clone()
    updated(critic, torch.zeros(2, *shape[1:]), text, torch.Generator().manual_seed(0))
    assert float((critic.model.x0.detach() - before).min()) > 0  # the critic follows the samples, from −1 up to 0


def updated(critic, *inputs):
    """One step of the critic."""
    values = critic.learn(*inputs)
    critic.step()
    return values


MODES, SPREAD = torch.tensor([-1.0, 1.0]), 0.1


class Line(nn.Module):
    """A velocity on the line: (x (B, 1), timestep (B,), text) -> (velocity (B, 1), {})."""

    def __init__(self, width=128):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 1)

    def forward(self, x, timestep, text=None):
        return self.out(self.body(torch.cat([4 * x, timestep[:, None] / 250], dim=1))), {}


class TwoModes:
    """A world whose clips are numbers near -1 or 1; the teacher knows their distribution exactly. A student of one step from noise."""

    edges, device, share = (1000.0,), torch.device("cpu"), flow.Share()

    def __init__(self):
        torch.manual_seed(0)
        self.student = Line()

    def taught(self, text):
        def velocity(x, timestep):
            sigma = timestep[:, None] / 1000
            variance = ((1 - sigma) * SPREAD).square() + sigma.square()
            off = x - (1 - sigma) * MODES
            mass = (-off.square() / (2 * variance)).softmax(1)
            x0 = (mass * (MODES + (1 - sigma) * SPREAD**2 / variance * off)).sum(1, keepdim=True)
            return (x - x0) / sigma

        return velocity

    def sparse(self, text, rungs_at):
        return lambda x, t: self.student(x, t)[0]

    def rungs_at(self, timestep, generator):
        return ()

    def pieces(self, clips):
        yield clips

    def clips(self, count, generator):
        side = torch.randint(2, (count, 1), generator=generator)
        return Clips(MODES[side] + SPREAD * torch.randn(count, 1, generator=generator), Prompt(torch.zeros(count, 1, 1)))

    def train(self, objective, steps, lr=2e-3, count=128):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(self.student.parameters(), lr=lr, betas=(0.5, 0.99))
        for _ in range(objective.warm_up):
            objective.update(self, self.clips(count, generator), generator)
        for _ in range(steps):
            clips, noise = self.clips(count, generator), torch.randn(count, 1, generator=generator)
            sigma = torch.ones(count)
            point = objective.point(self, Point(noise, sigma, clips.prompt, noise, 1.0), generator)
            wanted = objective.target(self, point, None, generator)
            loss, _ = objective.loss(self, clips, point, self.student(point.x, 1000 * point.sigma)[0], wanted, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.update(self, clips, generator)

    def samples(self, count=2000):
        noise = torch.randn(count, 1, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return noise - self.student(noise, torch.full((count,), 1000.0))[0]


def found(x0):
    """The smaller mode's share of the samples, and the share that is nearer to a mode than to their mean, and not as far beyond it."""
    right = float((x0 > 0).double().mean())
    return min(right, 1 - right), float(((x0.abs() - 1).abs() < 0.5).double().mean())


class Follower(nn.Module):
    """A copy of the teacher that learns."""

    def __init__(self, world):
        super().__init__()
        self.taught, self.learned = world.taught(None), Line()
        nn.init.zeros_(self.learned.out.weight), nn.init.zeros_(self.learned.out.bias)

    def forward(self, x, timestep, text):
        return self.taught(x, timestep) + self.learned(x, timestep)[0], {}


def test_matching_finds_both_modes_where_regression_gives_their_mean():
    """One step from noise: the velocity there leads to the mean of all clips, where there is none; matching spreads the samples."""
    world = TwoModes()
    world.train(make_objective(ObjectiveConfig(), 1.0), 60, lr=1e-2)
    assert found(world.samples())[1] == 0
    settings = ObjectiveConfig(
        "distribution", base="velocity", base_weight=0.0, student_timesteps=[1000.0], critic_lr=3e-3, critic_updates=3, critic_warmup=40
    )
    objective = make_objective(settings, 1.0)
    objective.critic = Critic(Follower(world), settings.critic_lr, 1.0)
    moments = []
    for _ in range(6):
        world.train(objective, 25, lr=1e-3)
        moments.append(found(world.samples()))
    # Two players circle: one moment in ten has 0.33 to 0.46 near, other processors at other steps; the mean of five has 0.6 to 0.75.
    smaller, near = torch.tensor(moments[1:]).mean(0)
    assert smaller > 0.3 and near > 0.5  # a student that runs away is near no mode


@pytest.mark.parametrize("adversarial", ["non_saturating", "hinge"])
def test_the_adversarial_term_moves_samples_to_the_clips(adversarial):
    """Clips at 1 and samples at -1: a head that has learnt to tell them apart sends the samples up, and forgets nothing when saved."""
    torch.manual_seed(0)
    model = Line()
    critic = Critic(model, 3e-3, 1.0, head=Head(128), tap=model.out, adversarial=adversarial, weight=1.0)
    sample, text, generator = -torch.ones(64, 1), Prompt(torch.zeros(64, 1, 1)), torch.Generator().manual_seed(0)
    sample.requires_grad_(True)
    critic.adversarial_loss(sample, text, generator).backward()
    assert float(sample.grad.abs().max()) == 0, "it begins without an opinion"
    told = [updated(critic, sample.detach(), text, generator, torch.ones(64, 1))["loss/head"] for _ in range(40)]
    assert told[-1] < 0.75 * told[0]
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    at = lambda x0: critic.adversarial_loss(x0, text, seeded())  # noqa: E731
    assert float(at(torch.ones(64, 1))) < float(at(sample.detach())), "what the student lowers is lower where the clips are"
    sample.grad = None
    at(sample).backward()
    assert all(p.grad is None for p in critic.parameters), "the student's term trains no critic"
    handed, sample.grad, again = sample.grad, None, seeded()
    sigma = critic.sigma(64, again, sample.device)
    critic.sample_loss(critic.logits(critic.noised(sample, sigma, again)[0], sigma, text)[1]).backward()
    torch.testing.assert_close(handed, sample.grad)
    again = Critic(Line(), 3e-3, 1.0, head=Head(128), tap=None, adversarial=adversarial, weight=1.0)
    again.load_state_dict(critic.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters, critic.parameters))


def test_the_critic_has_a_time_scale_of_its_own():
    """So many updates a step of the student, each on samples of its own; before the first step as many batches as critic_warmup."""
    world, seen = TwoModes(), []
    settings = ObjectiveConfig("distribution", base="velocity", student_timesteps=[1000.0], critic_updates=3, critic_warmup=2, critic_lr=0.125)
    objective = make_objective(settings, 1.0)
    objective.critic = Critic(Follower(world), settings.critic_lr, 1.0)
    objective.critic.learn = lambda x0, *rest: seen.append((x0, objective.steps_seen)) or {}
    objective.steps_seen, loss = 0, objective.loss

    def counted(*inputs):
        objective.steps_seen += 1
        return loss(*inputs)

    objective.loss = counted
    world.train(objective, 2)
    assert [steps for _, steps in seen] == [0] * 6 + [1] * 3 + [2] * 3
    assert all(not torch.equal(a, b) for (a, _), (b, _) in zip(seen, seen[1:])) and not any(x0.requires_grad for x0, _ in seen)
    assert objective.critic.optimizer.param_groups[0]["lr"] == 0.125


def test_a_step_of_the_critic_that_is_not_finite_is_skipped():
    """Its weights would be lost for good, and saved so."""
    critic = Critic(Line(), 1e-2, 1.0)
    before = [p.detach().clone() for p in critic.parameters]
    for value, moved in ((float("nan"), False), (float("inf"), False), (1.0, True)):
        for p in critic.parameters:
            p.grad = torch.full_like(p, value)
        critic.step()
        assert all(torch.isfinite(p).all() for p in critic.parameters)
        assert any(not torch.equal(a, b) for a, b in zip(before, critic.parameters)) == moved
        assert all(p.grad is None for p in critic.parameters)
