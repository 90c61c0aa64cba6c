"""usv/sampling/sampler.py and usv/objectives/matching.py: the student's own timesteps, the same rollout in training and in the pipeline."""

from dataclasses import replace

import pytest
import tiny
import torch
from test_enable import PLAN, SAMPLING

import usv
from usv import flow
from usv.config import ModelConfig
from usv.models.forward import SparseTransformer
from usv.objectives.matching import Critic, jump_damage, random_rollout, rollout, teacher_residual
from usv.sampling.checkpoint import Student
from usv.sampling.generate import generate, load_pipeline
from usv.sampling.sampler import StudentScheduler, renoise
from usv.sparse.grid import Tile

STEPS = [1000.0, 800.0, 400.0]


def student():
    model = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    return Student(model, PLAN, {**SAMPLING, "num_inference_steps": 3, "student_timesteps": STEPS})


def test_pipeline_and_training_rollout_agree(tiny_wan):
    """The latents of a stock WanPipeline call are the x0 of the rollout that distribution matching trains on."""
    pipe = load_pipeline(str(tiny_wan))
    scheduler, few = pipe.scheduler, student()
    usv.enable(pipe, few)
    text, _ = pipe.encode_prompt("a cat, the camera pans left", "", False, max_sequence_length=tiny.TEXT)
    generator = torch.Generator().manual_seed(3)
    got = pipe(prompt_embeds=text, generator=generator, output_type="latent").frames
    noise = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = rollout(lambda x, t: few.model(x, t, text, few.plan.at(float(t[0])))[0], noise, STEPS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    with pytest.raises(ValueError, match="num_inference_steps: got 4, accepted: 3"):
        pipe(prompt_embeds=text, num_inference_steps=4, output_type="latent")
    usv.disable(pipe)
    assert pipe.scheduler is scheduler


def test_a_student_is_sampled_at_the_shift_it_was_trained_with(tiny_wan):
    """Also where the pipeline's own scheduler has another; its twin, the dense model, at that of the settings."""
    pipe = load_pipeline(str(tiny_wan))
    own, model = pipe.scheduler, SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    usv.enable(pipe, Student(model, PLAN, {**SAMPLING, "flow_shift": 8.0}))
    assert pipe.scheduler.config.flow_shift == 8.0
    pipe.scheduler.set_timesteps(4)
    u = flow.unshift_sigma(pipe.scheduler.timesteps.double() / 1000, 8.0)
    torch.testing.assert_close(u, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64), rtol=0, atol=0.01)  # timesteps are whole
    usv.disable(pipe)
    assert pipe.scheduler is own and own.config.flow_shift == 3.0
    settings = ModelConfig(str(tiny_wan), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE), num_inference_steps=2)
    same, other = (generate(pipe, replace(settings, flow_shift=shift), ["a cat"], [0]).videos for shift in (3.0, 8.0))
    assert not torch.equal(same, other) and pipe.scheduler is own


def test_a_perfect_student_needs_one_step():
    """With velocity = noise − x0 the first step is at x0, and so are all that follow, whatever the noise between."""
    x0, noise = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    scheduler = StudentScheduler(STEPS)
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(0)
    x = noise
    for t in scheduler.timesteps:
        sigma = flow.expand(t.expand(2) / 1000, x)
        x = scheduler.step((x - x0) / sigma, t, x).prev_sample
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-5)


def test_fresh_noise_is_noise_and_not_the_start():
    start, x0 = torch.randn(3, 4, 5, 8, 8), torch.zeros(3, 4, 5, 8, 8)
    one, two = (renoise(x0, start, torch.ones(3), step) for step in (1, 2))
    torch.testing.assert_close(one.flatten(1).sort(1).values, start.flatten(1).sort(1).values)
    pairs = torch.stack([start.flatten(), one.flatten(), two.flatten()])
    off = torch.corrcoef(pairs) - torch.eye(3)
    assert float(off.abs().max()) < 5 / pairs.shape[1] ** 0.5  # five standard errors of an uncorrelated pair
    torch.testing.assert_close(renoise(x0[1:2], start[1:2], torch.ones(1), 1), one[1:2])  # a clip alone is as in a batch


@pytest.mark.parametrize("steps", [[], [900.0], [1000.0, 1000.0], [1000.0, 0.0], [1000.0, 200.0, 500.0]])
def test_ladders_that_cannot_sample_are_refused(steps):
    with pytest.raises(ValueError, match="student_timesteps"):
        StudentScheduler(steps)


def test_rollouts_are_subsets_cut_early():
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(random_rollout(STEPS, generator)) for _ in range(200)}
    assert seen == {(1000.0,), (1000.0, 800.0), (1000.0, 400.0), (1000.0, 800.0, 400.0)}


def test_gradient_passes_through_the_last_call_only():
    weights = [torch.ones((), requires_grad=True) for _ in STEPS]
    calls = iter(weights)
    x0 = rollout(lambda x, t: next(calls) * x, torch.randn(2, 4, 3, 4, 4), STEPS)
    x0.square().sum().backward()
    assert weights[0].grad is None and weights[1].grad is None and float(weights[2].grad.abs()) > 0


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
    text = torch.zeros(2, 1, 1)
    loss = critic.loss(sample, text, torch.zeros(1, 1), teacher, 1.0, torch.Generator().manual_seed(0))
    loss.backward()
    assert float(sample.grad.max()) < 0
    before = critic.model.x0.detach().clone()
    critic.update(torch.zeros(2, *shape[1:]), text, torch.Generator().manual_seed(0))
    assert float((critic.model.x0.detach() - before).min()) > 0  # the critic follows the samples, from −1 up to 0


def test_damage_of_a_jump_is_the_difference_of_two_rollouts():
    """What the other steps do is the same in both; a third rollout, dense, is what both damages are relative to."""
    edges, steps = (300.0, 600.0, 1000.0), (True, False, True)
    asked = []

    def student(name):
        def call(x, t):
            asked.append((name, float(t[0])))
            return torch.zeros_like(x)

        return call

    def judge(x0):
        names, ladder = zip(*asked)
        asked.clear()
        error = {(1000.0, 300.0): 2.0, (1000.0,): 3.0, (1000.0, 600.0, 300.0): 1.0}[ladder]
        return {"sparse": 1.0, "dense": 0.8}[names[0]] * error

    noise = torch.randn(1, 2, 3, 4, 4)
    found = lambda bin: jump_damage(student("sparse"), student("dense"), judge, noise, edges, steps, bin)  # noqa: E731
    assert found(0) == pytest.approx(((3.0 - 2.0) / 1.6, 0.25))
    assert found(1) == pytest.approx(((2.0 - 1.0) / 0.8, 0.25))


def test_residual_is_nothing_on_the_teacher_and_grows_away_from_it():
    clip = torch.randn(1, 2, 3, 4, 4)
    teacher = lambda x_t, t, text: ((x_t - clip) / flow.expand(t / 1000, x_t), {})  # noqa: E731
    judge = lambda x0: teacher_residual(x0, torch.zeros(1, 1, 1), torch.zeros(1, 1), teacher, 1.0, torch.Generator().manual_seed(0))  # noqa: E731
    assert judge(clip) < 1e-8 and judge(clip + 0.1) == pytest.approx(0.01, rel=1e-3)
