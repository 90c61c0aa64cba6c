"""A student on every pipeline class that docs/models.md names one for: every block kept is the pipeline's own video, half is not,
`disable` gives it back bit for bit, and the pipeline's own arguments (image, video, control) stay."""

import copy
import inspect

import pytest
import tiny_pipelines
import torch

import usv
from usv.models import forward
from usv.models.__main__ import rows
from usv.models.attend import merged_share
from usv.models.families import family_of
from usv.models.forward import SparseTransformer
from usv.models.tokens import Tokens
from usv.sampling import enable as enabling
from usv.sampling import pipeline_class
from usv.sampling.checkpoint import CheckpointError, Student
from usv.sampling.patterns import transformers_of
from usv.sparse import plan as plans
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import Rung, SparsityPlan

# pipelines whose calls here have tokens beside the grid: key frames, references, a window's past, history
BESIDE = {
    "HunyuanVideoFramepackPipeline", "LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline", "LTX2ConditionPipeline", "LTX2DFRPipeline",
    "LTX2DFRTemporalRefinePipeline", "LTX2HDRPipeline", "LTX2InContextPipeline",
}  # fmt: skip
NAMES = [row.pipeline for row in rows() if row.student != "-"]


def student(transformer, rung, **sampling):
    model = SparseTransformer(copy.deepcopy(transformer), Tile(1, 2, 2)).eval().requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.zeros_(gate.weight)
    return Student(model, SparsityPlan.uniform(rung, (1000.0,), model.num_layers), sampling)


def checkpoints(pipe, rung):
    bases = list(transformers_of(pipe).values())
    if len(bases) == 1:
        return student(bases[0], rung)
    return tuple(student(base, rung, expert=expert, boundary=pipe.config.boundary_ratio) for base, expert in zip(bases, ("high", "low")))


def unguided(pipe, call):
    """The call with one forward a step, as a student runs it; a guider is switched off for good."""
    if hasattr(pipe, "guider"):
        pipe.guider.disable()
    guidance = family_of(next(iter(transformers_of(pipe).values()))).guidance
    off = pipeline_class.unguided(inspect.signature(type(pipe).__call__), guidance)
    return {**call, **off, **{name: value for name, value in guidance.items() if name in call}}


def watch_begun(patch):
    """A list that grows by (tokens of the grid, tokens beside it) for each sequence that blocks are given."""
    begin, seen = Tokens.begin, []

    def spy(x, layout, *rest):
        seen.append((layout.grid.num_tokens, x.shape[1] - layout.grid.num_tokens))
        return begin(x, layout, *rest)

    patch.setattr(Tokens, "begin", spy)
    return seen


# a reference of which a corner is not attended: a mask of the tokens beside the grid
MASKED = {"conditioning_attention_mask": torch.ones(1, 1, 9, 64, 64).index_fill(3, torch.arange(32), 0.0)}


@pytest.mark.parametrize("name, more", [*((name, {}) for name in NAMES), ("LTX2InContextPipeline", MASKED)],
                         ids=lambda value: value if isinstance(value, str) else "+".join(value) or None)  # fmt: skip
def test_student(name, more, monkeypatch):
    pipe, call = tiny_pipelines.make(name)
    call = unguided(pipe, call) | more
    own = tiny_pipelines.video(pipe, call)
    scale = float(own.abs().max())
    with monkeypatch.context() as patch:
        begun, whole = watch_begun(patch), tiny_pipelines.watch_dense(patch)
        patch.setattr(plans, "DENSITY_LADDER", (1.0,) * 6)  # the sparse path with every block
        usv.enable(pipe, checkpoints(pipe, Rung(1, 0)))
        full = tiny_pipelines.video(pipe, call)
        record = pipe._usv.record
        assert record.forwards > 0 and record.mean_density() == 1.0 and record.mean_merged() == 0.0
        assert any(beside for _, beside in begun) == (name in BESIDE)
        assert not [length for length in whole if length >= min(num for num, _ in begun)], "a self-attention over the whole video stayed dense"
    torch.testing.assert_close(full, own, rtol=0, atol=1e-5 * max(scale, 1))
    usv.enable(pipe, checkpoints(pipe, Rung(1, 1)))
    half = tiny_pipelines.video(pipe, call)
    record = pipe._usv.record
    assert torch.isfinite(half).all() and float((half - own).abs().max()) > 1e-4 * scale
    assert 0 < record.mean_density() <= 0.75 and record.mean_merged() > 0
    usv.disable(pipe)
    assert torch.equal(tiny_pipelines.video(pipe, call), own)


DENSE = {"attention": "tile_top_k", "tile": (1, 2, 2), "dense_layers": 0.0, "dense_steps": 0.0, "density": 1.0}


@pytest.mark.parametrize("name", ["HunyuanVideoPipeline", "HunyuanVideo15Pipeline"])
def test_norms_that_autocast_leaves_in_fp32(name, monkeypatch):
    """Their queries and keys are then of another dtype than the values: every block kept is the pipeline's own video all the same."""
    pipe, call = tiny_pipelines.make(name)
    call = unguided(pipe, call)
    monkeypatch.setattr(plans, "DENSITY_LADDER", (1.0,) * 6)
    with torch.autocast("cpu", torch.bfloat16):
        own = tiny_pipelines.video(pipe, call)
        for how in (DENSE, {"checkpoint": checkpoints(pipe, Rung(1, 0))}):
            full = tiny_pipelines.video(usv.enable(pipe, **how), call)
            assert float((full.float() - own.float()).abs().max()) < 0.02 * float(own.abs().max())
            usv.disable(pipe)


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "LTXPipeline"])
def test_processors_set_after_enable(name):
    """diffusers' own cannot read tokens in tiles; CogVideoX's fuse_qkv_projections sets such ones, too."""
    pipe, call = tiny_pipelines.make(name)
    call, processors = unguided(pipe, call), dict(pipe.transformer.attn_processors)
    wanted = tiny_pipelines.video(usv.enable(pipe, checkpoints(pipe, Rung(1, 1))), call)
    held = pipe.transformer
    for change in (held.fuse_qkv_projections, held.unfuse_qkv_projections, lambda: held.set_attn_processor(dict(processors))):
        change()
        torch.testing.assert_close(tiny_pipelines.video(pipe, call), wanted, rtol=0, atol=1e-5)


def test_a_pattern_beside_a_student_of_joint_attention_is_refused_by_enable():
    pipe, call = tiny_pipelines.make("MochiPipeline")
    call, transformer = unguided(pipe, call), pipe.transformer
    own = tiny_pipelines.video(pipe, call)
    with pytest.raises(CheckpointError, match="attention: got 'tile_top_k' beside a student of mochi, .* accepted: the student's own blocks"):
        usv.enable(pipe, checkpoints(pipe, Rung(1, 0)), attention="tile_top_k")
    assert "not enabled" in usv.summary(pipe) and pipe.transformer is transformer and torch.equal(tiny_pipelines.video(pipe, call), own)


def test_the_record_says_what_was_merged(monkeypatch):
    """Partial tiles merge less than the plan's fraction, and VACE's control blocks nothing."""
    pipe, call = tiny_pipelines.make("WanVACEPipeline")
    call, run, executed = unguided(pipe, call) | {"width": call["width"] * 5 // 4}, forward._run_block, {}

    def spy(of, index, tokens, *rest):
        executed[index] = 1 - tokens.states().shape[1] / tokens.layout.grid.num_tokens
        return run(of, index, tokens, *rest)

    monkeypatch.setattr(forward, "_run_block", spy)
    tiny_pipelines.video(usv.enable(pipe, checkpoints(pipe, Rung(1, 1))), call)
    shares = [executed[index] for index in sorted(executed)]
    assert list(pipe._usv.record.merged)[-len(shares) :] == pytest.approx(shares)
    assert sorted({round(share, 6) for share in shares}) == [0.0, 0.2], "of 3 x 4 x 5 tokens, a quarter of all tiles but the narrow ones"


def test_what_partial_tiles_merge():
    whole, partial = (tile_layout(TokenGrid(1, 4, side), Tile(1, 2, 2)) for side in (4, 5))
    assert merged_share(whole, 0.25) == 0.25
    assert merged_share(partial, 0.25) == 4 / 20, "the four tiles of one column have no cell of four"


def test_a_student_of_another_model_is_refused_in_one_message():
    """Another family, and image to video on text to video: what was got, what is accepted; the pipeline stays as it was."""
    pipe, call = tiny_pipelines.make("WanPipeline")
    own = tiny_pipelines.video(pipe, call)
    for name, words in (("CogVideoXPipeline", "a student of the family cogvideox for a WanTransformer3DModel, accepted: one of wan"),
                        ("WanImageToVideoPipeline", "made for another model \\(in_channels: ")):  # fmt: skip
        other, _ = tiny_pipelines.make(name)
        with pytest.raises(CheckpointError, match=words):
            usv.enable(pipe, student(other.transformer, Rung(1, 0)))
    unknown, _ = tiny_pipelines.make("MochiPipeline")
    if "MochiPipeline" not in NAMES:
        with pytest.raises(CheckpointError, match="got a MochiPipeline with a MochiTransformer3DModel, accepted: a diffusers pipeline with"):
            usv.enable(unknown, student(pipe.transformer, Rung(1, 0)))
    assert torch.equal(tiny_pipelines.video(pipe, call), own)


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "MochiPipeline"])
def test_few_steps_of_another_clock_are_refused(name):
    """Their transformers do not predict the flow's velocity at the flow's timestep, which the scheduler of few steps integrates."""
    pipe, call = tiny_pipelines.make(name)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    with pytest.raises(CheckpointError, match="few-step student of .*accepted: a student of the teacher's steps"):
        usv.enable(pipe, student(transformer, Rung(1, 1), student_timesteps=[1000.0, 500.0], num_inference_steps=2))
    assert pipe.transformer is transformer and pipe.scheduler is scheduler


@pytest.mark.parametrize("name", ["LTXConditionPipeline", "LTX2ConditionPipeline", "LTX2HDRPipeline", "LTX2InContextPipeline"])
def test_few_steps_leave_what_is_given_as_it_is(name):
    """Tokens that a pipeline says to be clean are the same in every forward of a video."""
    pipe, call = tiny_pipelines.make(name)
    call = unguided(pipe, call) | ({"image_cond_noise_scale": 0.0} if name == "LTXConditionPipeline" else {})
    usv.enable(pipe, student(pipe.transformer, Rung(1, 1), student_timesteps=[1000.0, 500.0], num_inference_steps=2))
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, call: seen.append((call["hidden_states"], call["timestep"])), with_kwargs=True)
    assert torch.isfinite(tiny_pipelines.video(pipe, call)).all() and len(seen) == 2
    given = [timestep.flatten(1) < 1 for _, timestep in seen]
    assert given[0].any() and torch.equal(*given)
    first, again = (hidden[given[0]] for hidden, _ in seen)
    torch.testing.assert_close(first, again, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(enabling.OWN_LADDERS))
def test_pipelines_with_steps_of_their_own_refuse_few(name):
    pipe, _ = tiny_pipelines.make(name)
    with pytest.raises(CheckpointError, match=f"few-step student for a {name}, which .*, accepted: a student of the teacher's steps"):
        usv.enable(pipe, student(pipe.transformer, Rung(1, 1), student_timesteps=[1000.0, 500.0], num_inference_steps=2))
