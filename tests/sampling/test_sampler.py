"""usv/sampling/sampler.py: the student's own timesteps, the same rollout in training and in the pipeline."""

from dataclasses import replace

import pytest
import tiny
import torch
from test_enable import PLAN, SAMPLING

import usv
from usv import flow
from usv.config import ModelConfig
from usv.models.forward import SparseTransformer
from usv.objectives.rollout import rollout
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


@pytest.mark.parametrize("negative", [False, True])
def test_given_tokens_stay_what_they_are(negative):
    """Of a perfect student, tokens that are given are clean at every step, others of no level but their own, and noise is made of noise alone.
    negative: levels told by per_token_timesteps (LTXConditionPipeline) instead of by what the student was asked with."""
    x0, noise, share = torch.randn(2, 40, 8), torch.randn(2, 40, 8), torch.ones(2, 40, 1)
    share[:, 30:], share[:, 38:] = 0.0, 0.05
    x0[:, 30:38] = 1e4  # would be seen in anybody's noise
    scheduler = StudentScheduler(STEPS)
    scheduler.set_timesteps(3)
    x = (1 - share) * x0 + share * noise
    for t, following in zip(scheduler.timesteps, [0.8, 0.4, 0.0]):
        levels = t * share[..., 0]
        if negative:
            given = {"per_token_timesteps": levels}
            velocity = (x0 - x) / (share * t / 1000).clamp(min=1e-6)
        else:  # as pipelines that blend in x0, at the step's own level
            given, velocity = {}, (x - x0) / (t / 1000)
            scheduler.asked(levels[..., None])
        x = scheduler.step(velocity, t, x, **given).prev_sample
        assert torch.equal(x[:, 30:38], x0[:, 30:38])
        fresh = (x - (1 - share * following) * x0)[:, [*range(30), 38, 39]]
        assert float(fresh.abs().max()) <= following * float(noise.abs().max()) + 1e-4
        assert not following or float((fresh[:, :30] / following).std()) == pytest.approx(1, abs=0.2)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-5)


def test_one_level_is_no_level():
    """Levels that are all the step's change nothing, also negated."""
    x, v = torch.randn(2, 40, 8), torch.randn(2, 40, 8)
    outs = []
    for told in (False, True):
        scheduler = StudentScheduler(STEPS)
        scheduler.set_timesteps(3)
        given = {"per_token_timesteps": torch.full((2, 40), 1000.0)} if told else {}
        outs.append(scheduler.step(-v if told else v, scheduler.timesteps[0], x, **given).prev_sample)
    assert torch.equal(*outs)
