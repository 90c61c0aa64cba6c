"""Two pipelines with one student, a student that replaces what was there, two experts: what runs is what was asked for, or is refused."""

import copy

import diffusers
import pytest
import tiny
import tiny_pipelines
import together
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline
from together import distance, video

import usv
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, load_student, save_student
from usv.sampling.export import export
from usv.sampling.fingerprint import fingerprint
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return together.Bench(tmp_path_factory.mktemp("bench"))


def folded(transformer) -> Student:
    """Of any family, with guidance folded in."""
    model = SparseTransformer(copy.deepcopy(transformer), Tile(1, 2, 2)).eval().requires_grad_(False)
    return Student(model, SparsityPlan.uniform(Rung(1, 1), (1000.0,), model.num_layers), {"guidance_folded_in": 6.0})


@pytest.fixture(scope="module")
def other(bench, tmp_path_factory):
    """A student whose weights are not the base's."""
    path = tmp_path_factory.mktemp("other") / "student"
    model = SparseTransformer(tiny.make_transformer(seed=7), Tile(*tiny.TILE)).eval().requires_grad_(False)
    save_student(path, Student(model, together.SPARSE, together.SAMPLING))
    return path


def sibling(pipe, kind=WanPipeline):
    made = kind.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


# ---- guidance that is folded in ------------------------------------------------------------------------------------------------------------


def test_a_guider_is_off_where_guidance_is_folded_in():
    """HunyuanVideo-1.5 has its scale in a component of the pipeline, not in an argument of its call."""
    pipe, call = tiny_pipelines.make("HunyuanVideo15Pipeline")
    usv.enable(pipe, folded(pipe.transformer))
    tiny_pipelines.video(pipe, call)
    assert pipe._usv.record.forwards == call["num_inference_steps"] == 2
    assert pipe.guider._enabled and pipe.guider.guidance_scale == 7.5, "it is the user's again"


@pytest.mark.parametrize("name", ["LTXPipeline", "CogVideoXPipeline", "MochiPipeline"])
def test_a_sibling_that_guides_in_one_batch_is_refused(name):
    pipe, call = tiny_pipelines.make(name)
    usv.enable(pipe, folded(pipe.transformer))
    call = {key: value for key, value in call.items() if not key.startswith("guidance")}
    tiny_pipelines.video(pipe, call)
    with pytest.raises(CheckpointError, match="guidance: got two texts for the same latents"):
        tiny_pipelines.video(sibling(pipe, getattr(diffusers, name)), call)


def test_a_sibling_of_video_to_video_is_refused_guidance_only(bench):
    pipe = bench.enable(bench.pipe(), "student", "sparse")
    own = video(pipe)
    made = sibling(pipe, WanVideoToVideoPipeline)
    made.vae_scale_factor_spatial, made.vae_scale_factor_temporal = 4, 1  # which this class reads off Wan's own VAE
    frames = [torch.zeros(tiny.SIZE, tiny.SIZE, 3).byte().numpy()] * tiny.FRAMES
    text = {"prompt_embeds": torch.randn(1, tiny.TEXT, 64), "negative_prompt_embeds": torch.zeros(1, tiny.TEXT, 64)}
    call = dict(video=frames, height=tiny.SIZE, width=tiny.SIZE, num_inference_steps=4, strength=0.5, max_sequence_length=tiny.TEXT, output_type="latent", **text)
    assert torch.isfinite(made(**call, guidance_scale=1.0).frames).all()
    with pytest.raises(CheckpointError, match="guidance: got two texts for the same latents"):
        made(**call, guidance_scale=5.0)
    assert torch.equal(video(sibling(pipe)), own) and torch.equal(video(pipe), own)


def test_a_loop_of_ones_own_may_give_one_noise_to_two_prompts(bench):
    transformer = bench.enable(bench.pipe(), "student", "sparse").transformer
    x, text = torch.randn(1, 16, tiny.FRAMES, 8, 8), torch.randn(2, tiny.TEXT, 64)
    with torch.no_grad():
        apart = [transformer(x, torch.tensor([500.0]), one[None], return_dict=False)[0] for one in text]
        at_once = transformer(torch.cat((x, x)), torch.tensor([500.0, 500.0]), text, return_dict=False)[0]
    torch.testing.assert_close(at_once, torch.cat(apart), rtol=0, atol=1e-4)


# ---- whose student it is -------------------------------------------------------------------------------------------------------------------


def test_a_sibling_is_no_dense_pipeline(bench, other):
    pipe = usv.enable(bench.pipe(), other)
    own, made = video(pipe), sibling(pipe)
    assert "runs its student" in usv.summary(made)
    for change in (usv.disable, lambda p: usv.enable(p, other), lambda p: bench.enable(p, "router's student", "sparse"), lambda p: bench.enable(p, "pattern", "sparse")):
        with pytest.raises(CheckpointError, match="was made .from_pipe. of an enabled pipeline and runs its student"):
            change(made)
    assert torch.equal(video(made), own) and torch.equal(video(pipe), own)
    usv.disable(pipe)
    assert torch.equal(video(bench.enable(sibling(pipe), "student", "sparse")), bench.plain("student"))


def test_one_student_in_two_pipelines_is_cast_apart(bench):
    first, second = bench.pipe(), bench.pipe()
    student = load_student(bench.folder / "student" / "sparse", first.transformer)
    for pipe in (first, second):
        usv.enable(pipe, student)
    own = video(second)
    first.transformer.to(torch.bfloat16)
    assert {p.dtype for p in second.transformer.parameters()} == {torch.float32} and torch.equal(video(second), own)
    usv.enable(first, student)
    first.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.equal(video(second), own)


# ---- what was there before -----------------------------------------------------------------------------------------------------------------


def on_disk(pipe, folder):
    pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(folder))
    return pipe


def test_a_student_has_its_own_weights_on_the_disk(bench, other, tmp_path):
    """diffusers names the files by module and writes none that is there: the base's would be read."""
    wanted = video(usv.enable(bench.pipe(), other))
    pipe = usv.enable(on_disk(bench.pipe(), tmp_path / "before"), other)
    assert distance(video(pipe), wanted) < 1e-5
    assert distance(video(usv.disable(pipe)), video(bench.pipe())) < 1e-5


def test_a_base_on_the_disk_is_known_by_its_weights(bench, tmp_path):
    pipe = bench.pipe()
    student = load_student(bench.folder / "router's student" / "sparse", pipe.transformer)
    student.base = fingerprint(pipe.transformer)
    save_student(tmp_path / "student", student)
    wanted = video(usv.enable(pipe, tmp_path / "student"))
    assert distance(video(usv.enable(on_disk(bench.pipe(), tmp_path / "disk"), tmp_path / "student")), wanted) < 1e-5


class Packed(torch.nn.Parameter):
    """Stands for a quantised weight: another class of parameter, which is left as it is."""


def quantised(pipe):
    for module in pipe.transformer.modules():
        for name, value in list(module._parameters.items()):
            if value is not None and value.ndim == 2 and value.shape[0] == 32:
                module._parameters[name] = Packed(value.data, requires_grad=False)
    return pipe


@pytest.mark.parametrize("plan", ["whole", "sparse"])
def test_a_router_replaces_a_pattern_on_a_quantised_base(bench, plan):
    wanted = video(bench.enable(quantised(bench.pipe()), "router's student", plan))
    pipe = bench.enable(quantised(bench.pipe()), "pattern", "sparse")
    assert torch.equal(video(bench.enable(pipe, "router's student", plan)), wanted)


def test_an_exported_router_is_still_one(bench, tmp_path):
    export(bench.folder / "router's student" / "sparse", str(bench.folder / "wan"), tmp_path / "exported")
    pipe = quantised(WanPipeline.from_pretrained(tmp_path / "exported"))
    pipe.set_progress_bar_config(disable=True)
    assert distance(video(usv.enable(pipe, tmp_path / "exported")), bench.plain("router's student")) < 1e-5


# ---- two experts ---------------------------------------------------------------------------------------------------------------------------


def experts(bench):
    parts = {name: part for name, part in bench.pipe().components.items() if name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    pipe = WanPipeline(**parts, transformer_2=tiny.make_transformer(seed=9), boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pair(pipe, high: dict, low: dict):
    """Students of both, with these settings beside the usual."""
    made = []
    for transformer, expert, end, more in ((pipe.transformer, "high", 1000.0, high), (pipe.transformer_2, "low", 900.0, low)):
        model = SparseTransformer(copy.deepcopy(transformer), Tile(*tiny.TILE)).eval().requires_grad_(False)
        sampling = {**together.SAMPLING, "boundary": 0.9, "expert": expert, **more}
        made.append(Student(model, SparsityPlan.uniform(Rung(), (end,), model.num_layers), sampling, router="guidance_scale" in more))
    return tuple(made)


def test_each_expert_has_its_own_guidance(bench):
    pipe = experts(bench)
    usv.enable(pipe, pair(pipe, {"guidance_scale": 4.0}, {"guidance_scale": 3.0}))
    text = {"prompt_embeds": torch.randn(1, tiny.TEXT, 64), "negative_prompt_embeds": torch.zeros(1, tiny.TEXT, 64)}

    def run(**scales):
        return pipe(num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="latent", **text, **scales).frames

    assert torch.equal(run(), run(guidance_scale=4.0, guidance_scale_2=3.0)) and not torch.equal(run(), run(guidance_scale=4.0, guidance_scale_2=4.0))


@pytest.mark.parametrize(
    "high, low, said",
    [
        ({"guidance_folded_in": 4.0}, {"guidance_scale": 3.0}, "guidance folded in and one of a router"),
        ({"guidance_scale": 4.0}, {"guidance_folded_in": 3.0}, "guidance folded in and one of a router"),
        ({"student_timesteps": [1000.0, 400.0]}, {}, "students of the student_timesteps"),
        ({}, {"flow_shift": 5.0}, "students of the flow_shift"),
    ],
)
def test_experts_of_two_kinds_are_refused(bench, high, low, said):
    pipe = experts(bench)
    with pytest.raises(CheckpointError, match=said):
        usv.enable(pipe, pair(pipe, high, low))
    assert not hasattr(pipe, "_usv")
