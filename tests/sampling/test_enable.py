"""usv/sampling/enable.py: one reversible line on a stock WanPipeline, and the same forward that was trained."""

import copy

import pytest
import tiny
import torch
from diffusers import WanPipeline

import usv
from usv.config import ModelConfig
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, save_student
from usv.sampling.enable import Record
from usv.sampling.generate import generate, load_pipeline
from usv.sampling.held import hold
from usv.sampling.pipeline_class import frames_argument, frames_result
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 3, "max_sequence_length": tiny.TEXT}
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))
PROMPT = "a cat, the camera pans left"


@pytest.fixture(scope="module")
def pipe(tiny_wan):
    return load_pipeline(str(tiny_wan))


@pytest.fixture
def student():
    model = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    return Student(model, PLAN, SAMPLING)


@pytest.fixture(autouse=True)
def clean(pipe):
    yield
    usv.disable(pipe)


def latents(pipe, **changes):
    frames = tiny.FRAMES if hasattr(pipe, "_usv") else frames_argument(pipe, tiny.FRAMES)
    settings = dict(height=tiny.SIZE, width=tiny.SIZE, num_frames=frames, num_inference_steps=3, guidance_scale=1.0,
                    max_sequence_length=tiny.TEXT)  # fmt: skip
    g = torch.Generator().manual_seed(0)
    return pipe(PROMPT, generator=g, output_type="latent", **{**settings, **changes}).frames


def test_enable_and_disable_are_reversible(pipe, student):
    before, state = latents(pipe), dict(vars(pipe))
    transformer, kind = pipe.transformer, type(pipe)
    assert usv.enable(pipe, student) is pipe
    assert isinstance(pipe, WanPipeline) and pipe.transformer is not transformer
    sparse = latents(pipe)
    assert not torch.equal(sparse, before)
    assert usv.disable(pipe) is pipe
    assert pipe.transformer is transformer and type(pipe) is kind and vars(pipe).keys() == state.keys()
    assert torch.equal(latents(pipe), before)
    assert "forward" not in vars(student.model.transformer)
    usv.disable(pipe)  # once more does no harm


def test_enabling_twice_replaces(pipe, student):
    before = latents(pipe)
    usv.enable(pipe, student)
    first = latents(pipe)
    other = Student(copy.deepcopy(student.model), SparsityPlan.uniform(Rung(3, 3), PLAN.edges, 2), SAMPLING)
    usv.enable(pipe, other)
    assert not torch.equal(latents(pipe), first)
    usv.enable(pipe, student)
    assert torch.equal(latents(pipe), first)
    usv.disable(pipe)
    assert torch.equal(latents(pipe), before)


def test_a_refused_checkpoint_leaves_the_pipeline_as_it_was(pipe, student, tmp_path):
    usv.enable(pipe, student)
    first = latents(pipe)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        usv.enable(pipe, tmp_path / "none")
    assert torch.equal(latents(pipe), first)


def test_pipeline_runs_the_training_forward(pipe, student):
    """Each call of the transformer in a pipeline equals the model called as train.py calls it, under the plan's row."""
    calls = []
    usv.enable(pipe, student)
    inner = pipe.transformer.forward

    def spy(hidden_states, timestep, encoder_hidden_states, **kwargs):
        out = inner(hidden_states, timestep, encoder_hidden_states, **kwargs)
        calls.append((hidden_states, timestep, encoder_hidden_states, out[0] if isinstance(out, tuple) else out.sample))
        return out

    pipe.transformer.forward = spy
    latents(pipe)
    assert len(calls) == 3
    rows = set()
    for x, t, text, out in calls:
        rungs = PLAN.at(float(t[0]))
        rows.add(rungs)
        with torch.enable_grad():
            trained, _ = student.model.train()(x, t, text, rungs)
        assert torch.equal(trained.detach(), out)
    assert len(rows) == 2  # both bins were visited


def test_defaults_are_the_students(pipe, student):
    """pipe(prompt) alone: its size, frames, steps, text length, no guidance."""
    usv.enable(pipe, student)
    out = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    assert out.shape == (1, 16, tiny.FRAMES, 8, 8)
    assert pipe._usv.record.forwards == 3
    pipe._usv.record.reset()
    assert torch.equal(latents(pipe), out)


@pytest.mark.parametrize("scale", [3.0, 0.0, 1.5])
def test_guidance_is_refused(pipe, student, scale):
    usv.enable(pipe, student)
    with pytest.raises(CheckpointError, match=r"guidance_scale: got .*accepted: 1\.0; guidance is folded"):
        latents(pipe, guidance_scale=scale)
    assert pipe._usv.record.forwards == 0


def test_record_and_summary(pipe, student):
    assert "not enabled" in usv.summary(pipe)
    usv.enable(pipe, student)
    latents(pipe)
    record = pipe._usv.record
    timesteps = pipe.scheduler.timesteps.tolist()
    rows = [PLAN.at(t) for t in timesteps]
    kept = {Rung(): 1.0, Rung(1, 0): 0.5, Rung(2, 2): 0.25, Rung(1, 1): 0.5}  # of 8 blocks
    merged = {Rung(): 0.0, Rung(1, 0): 0.0, Rung(2, 2): 0.5, Rung(1, 1): 0.25}
    assert record.forwards == 3 and record.seconds > 0
    assert record.mean_density() == pytest.approx(sum(kept[r] for row in rows for r in row) / 6)
    assert record.mean_merged() == pytest.approx(sum(merged[r] for row in rows for r in row) / 6)
    text = usv.summary(pipe)
    assert "3 forwards" in text and f"{record.mean_density():.3f}" in text and "1/4·0.50m" in text and "≤  1000" in text
    record.reset()
    assert (record.forwards, record.seconds, record.mean_density(), record.mean_merged()) == (0, 0.0, 1.0, 0.0)


def test_per_token_timesteps_choose_the_row_of_the_noisy_tokens(student):
    """TI2V gives its first frame timestep 0; the plan's row is that of the tokens being denoised."""
    record = Record()
    transformer = hold(student, record)
    timestep = torch.full((1, 80), 900.0)
    timestep[:, :16] = 0.0
    with torch.no_grad():
        transformer(torch.randn(1, 16, 5, 8, 8), timestep, torch.randn(1, 4, 64), return_dict=False)
    assert list(record.densities) == [1.0, 0.5]  # row of the upper bin


def test_stock_dense_plan_is_the_pipeline(pipe):
    """A student with the base's weights and a dense plan generates what the pipeline itself does, to rounding."""
    before = latents(pipe)
    own = SparseTransformer(copy.deepcopy(pipe.transformer), Tile(*tiny.TILE)).eval()
    usv.enable(pipe, Student(own, SparsityPlan.uniform(Rung(), PLAN.edges, 2), SAMPLING))
    assert (latents(pipe) - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize("thing", ["a pipeline", None, 3])
def test_other_pipelines_are_refused(thing, student):
    with pytest.raises(CheckpointError, match="accepted: a diffusers pipeline with a transformer of a family"):
        usv.enable(thing, student)


def test_experts_run_their_own_student_or_are_refused(pipe, student):
    """Above the boundary the first, below the second, each under its own plan; then the pipeline is what it was."""
    second = tiny.make_transformer(seed=9)
    twin = WanPipeline(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.8)
    twin.set_progress_bar_config(disable=True)
    before = latents(twin)
    low = Student(SparseTransformer(copy.deepcopy(second), Tile(*tiny.TILE)).eval(), SparsityPlan.uniform(Rung(), (800.0,), 2), SAMPLING)
    high = Student(student.model, student.plan, {**SAMPLING, "expert": "high", "boundary": 0.8})
    low.sampling = {**SAMPLING, "expert": "low", "boundary": 0.8}
    for given, words in ((student, "two, \\(HIGH, LOW\\)"), ((low, high), "student of the expert low for the expert high"), ((high, student), "expert None")):
        with pytest.raises(CheckpointError, match=words):
            usv.enable(twin, given)
    with pytest.raises(CheckpointError, match=r"boundaries \[0.8, 0.8, 0.9\]"):
        usv.enable(twin, (high, Student(low.model, low.plan, {**low.sampling, "boundary": 0.9})))
    with pytest.raises(CheckpointError, match="one, for a pipeline of one transformer"):
        usv.enable(pipe, (high, low))
    with pytest.raises(CheckpointError, match="student of the expert high"):
        usv.enable(pipe, high)
    usv.enable(twin, (high, low))
    sparse, record = latents(twin), twin._usv.record
    steps = [float(t) for t in twin.scheduler.timesteps]
    assert record.forwards == len(steps) and steps[0] >= 800 > steps[-1]
    dense = [t < 800 for t in steps for _ in range(2)]
    assert [d == 1.0 for d, expected in zip(record.densities, dense) if expected] == [True] * sum(dense) and min(record.densities) < 1
    assert "≤   800" in usv.summary(twin) and not torch.equal(sparse, before)
    with pytest.raises(CheckpointError, match="guidance_scale_2: got 3.0"):
        latents(twin, guidance_scale_2=3.0)
    usv.disable(twin)
    assert twin.transformer is pipe.transformer and twin.transformer_2 is second
    torch.testing.assert_close(latents(twin), before, rtol=0, atol=0)


@pytest.mark.parametrize("factor, asked, made", [(1, 4, 5), (4, 81, 81), (4, 80, 81), (4, 83, 81)])
def test_frames_as_diffusers_counts_them(factor, asked, made):
    class Fake:
        vae_scale_factor_temporal = factor

    assert frames_result(Fake, asked) == made
    assert frames_result(Fake, frames_argument(Fake, made)) == made


def test_generation_depends_on_the_seed_alone(pipe, student, tmp_path):
    """Not on batching; dense and enabled, through a checkpoint on disk."""
    model = ModelConfig(height=tiny.SIZE, width=tiny.SIZE, num_frames=tiny.FRAMES, num_inference_steps=2, max_sequence_length=tiny.TEXT)
    prompts, seeds = [PROMPT, "a dog", PROMPT], [4, 5, 6]
    save_student(tmp_path / "student", student)
    for enabled in (False, True):
        if enabled:
            usv.enable(pipe, tmp_path / "student")
        together = generate(pipe, model, prompts, seeds, batch_size=3)
        apart = generate(pipe, model, prompts[2:], seeds[2:], batch_size=1)
        assert together.videos.shape == (3, tiny.FRAMES, 3, tiny.SIZE, tiny.SIZE)
        assert together.forwards == (2 if enabled else 4)  # guidance doubles a dense forward
        assert (together.videos[2] - apart.videos[0]).abs().max() <= 1e-3
        assert set(together.seconds) == {"text", "denoise", "decode"} and all(s > 0 for s in together.seconds.values())
