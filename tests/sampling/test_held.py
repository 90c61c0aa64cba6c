"""usv/sampling/held.py: a student is a model that diffusers moves, casts, offloads and compiles, before or after `enable`."""

import copy

import accelerate
import lora_files
import pytest
import tiny
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from safetensors.torch import load_file

import usv
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, load_student, save_student
from usv.sampling.generate import load_pipeline
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT}
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tiny_wan):
    return load_pipeline(str(tiny_wan))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("held") / "student"
    save_student(path, Student(model, PLAN, SAMPLING))
    return path


@pytest.fixture
def pipe(loaded):
    """A pipeline of its own transformer; hooks of offloads are taken off the parts that it shares."""
    own = WanPipeline(**{**loaded.components, "transformer": copy.deepcopy(loaded.transformer)})
    own.set_progress_bar_config(disable=True)
    yield own
    usv.disable(own)
    own.remove_all_hooks()


def latents(pipe, **more):
    text = torch.randn(1, tiny.TEXT, 64, generator=torch.Generator().manual_seed(1))
    settings = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": tiny.TEXT}
    settings |= {"num_frames": tiny.FRAMES if hasattr(pipe, "_usv") else tiny.FRAMES - 1, "prompt_embeds": text}
    g = torch.Generator().manual_seed(0)
    return pipe(generator=g, output_type="latent", **{**settings, **more}).frames


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    """What enable_sequential_cpu_offload does, which on a CPU leaves no parameters (it moves them to cpu:0, and back to tensors)."""

    def put_on(device=None):
        pipe._offload_device = CPU
        accelerate.cpu_offload(pipe.transformer, CPU)

    pipe.enable_sequential_cpu_offload = put_on
    put_on()


def group_offload(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)


def leaf_offload(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level")


MOVES = (model_offload, sequential_offload, group_offload, leaf_offload)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_offloads_before_and_after(pipe, folder, move, before):
    """The same video, from the first call on, and after `disable` the dense one; the pipeline is offloaded as it was."""
    dense = latents(pipe)
    wanted = latents(usv.enable(pipe, folder))
    usv.disable(pipe)
    for action in ((lambda: move(pipe)), (lambda: usv.enable(pipe, folder)))[:: 1 if before else -1]:
        action()
    hooked = [m for m in pipe.transformer.modules() if hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook")]
    assert hooked and isinstance(pipe.transformer, WanTransformer3DModel)
    for _ in range(2):  # the hooked norms run apart from RoPE, which rounds elsewhere
        assert (latents(pipe) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    usv.disable(pipe)
    assert torch.equal(latents(pipe), dense)
    if move in MOVES[:2]:
        assert hasattr(pipe.transformer, "_hf_hook")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_take_everything_along(pipe, folder, dtype):
    usv.enable(pipe, folder)
    pipe.transformer.to(dtype)
    assert {p.dtype for p in pipe.transformer.usv_gates.parameters()} == {dtype}
    after = latents(pipe)
    usv.disable(pipe)
    assert pipe.transformer.dtype == dtype  # what it gets back has come along, too
    other = usv.enable(pipe, folder)
    assert after.isfinite().all() and (latents(other) - after).abs().max() <= 0.05 * after.abs().max()


def test_layerwise_casting_before_and_after(pipe, folder):
    videos = []
    for before in (False, True):
        own = WanPipeline(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})
        own.set_progress_bar_config(disable=True)
        if not before:
            usv.enable(own, folder)
        own.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        if before:
            usv.enable(own, folder)
        assert own.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
        videos.append(latents(own))
    assert videos[0].isfinite().all() and torch.equal(*videos)


def test_repeated_blocks_compile(pipe, folder):
    """Each kind of layer is one graph without a break, and a second video compiles nothing."""
    wanted = latents(usv.enable(pipe, folder))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    out = latents(pipe)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames >= 2 and not torch._dynamo.utils.counters["graph_break"]
    assert (out - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    latents(pipe)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


def test_budgets_and_scales_of_a_style_compile_nothing_anew(pipe, folder):
    """A graph for each kind of layer, dense, sparse and merged, whatever the plans and however much of a style: two recompilations in all."""
    usv.enable(pipe, folder)
    pipe.load_lora_weights(lora_files.diffusers(lora_files.style(pipe.transformer)), adapter_name="style")
    rows = (PLAN.rungs, ((Rung(2, 1), Rung(1, 2)), (Rung(2, 0), Rung())), ((Rung(1, 1), Rung(2, 2)), (Rung(2, 1), Rung(1, 0))))
    runs = [(SparsityPlan(PLAN.edges, row), 1.0) for row in rows] + [(PLAN, 0.5), (PLAN, 0.25)]

    def video(plan, scale):
        pipe.transformer._planned.plan = plan
        pipe.set_adapters("style", scale)
        return latents(pipe)

    wanted = [video(*run) for run in runs]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for number, run in enumerate(runs):
        assert (video(*run) - wanted[number]).abs().max() <= 1e-4 * wanted[number].abs().max(), number
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 and not torch._dynamo.utils.counters["graph_break"], number
    assert all(float((a - b).abs().max()) > 1e-3 for i, a in enumerate(wanted) for b in wanted[:i])


def test_a_compiled_transformer_gets_a_student(pipe, folder, caplog):
    wanted = latents(usv.enable(pipe, folder))
    usv.disable(pipe)
    pipe.transformer = compiled = torch.compile(pipe.transformer, backend="eager")
    assert torch.equal(latents(usv.enable(pipe, folder)), wanted) and "runs uncompiled" in caplog.text
    assert usv.disable(pipe).transformer is compiled


def test_copies_and_siblings(pipe, folder):
    """A deep copy is its own; a sibling (from_pipe) runs the plan and refuses guidance; one Student serves two pipelines."""
    dense, wanted = latents(pipe), latents(usv.enable(pipe, folder))
    twin, sibling = copy.deepcopy(pipe), WanPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    usv.disable(pipe)
    assert torch.equal(latents(pipe), dense) and torch.equal(latents(twin), wanted)
    usv.disable(twin)
    assert torch.equal(latents(twin), dense) and torch.equal(latents(sibling), wanted)
    with pytest.raises(CheckpointError, match="guidance: got a second forward"):
        latents(sibling, guidance_scale=5.0, negative_prompt_embeds=torch.zeros(1, tiny.TEXT, 64))
    student, other = load_student(folder, pipe.transformer), copy.deepcopy(pipe)
    usv.enable(pipe, student), usv.enable(other, student)
    usv.disable(pipe)
    assert torch.equal(latents(other), wanted) and torch.equal(latents(pipe), dense)
    usv.disable(other)


def test_a_sibling_of_a_few_step_student_knows_its_timesteps_only(pipe, folder):
    student = load_student(folder, pipe.transformer)
    sibling = WanPipeline.from_pipe(usv.enable(pipe, Student(student.model, student.plan, {**SAMPLING, "student_timesteps": [1000, 400]})))
    sibling.set_progress_bar_config(disable=True)
    wanted = latents(pipe)
    assert torch.equal(latents(sibling), wanted)
    sibling.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(CheckpointError, match=r"scheduler: got the timestep 8.92857, accepted: \[1000, 400\], the few-step student's own"):
        latents(sibling)


def test_an_offloaded_pipelines_sibling(pipe, folder):
    """Its transformer's hooks are the other pipeline's, which alone can take them off."""
    pipe.enable_model_cpu_offload(device="cpu")
    sibling = WanPipeline(**pipe.components)
    with pytest.raises(CheckpointError, match="whose transformer another pipeline offloads, accepted: its own"):
        usv.enable(sibling, folder)
    sibling.enable_model_cpu_offload(device="cpu")
    usv.enable(sibling, folder)
    usv.disable(sibling)


def test_what_is_saved_is_the_base(pipe, folder, tmp_path):
    dense = latents(pipe)
    wanted = latents(usv.enable(pipe, folder))
    pipe.save_pretrained(tmp_path / "saved")
    again = WanPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(again), dense, atol=1e-5) and torch.equal(latents(pipe), wanted)
    with pytest.raises(CheckpointError, match="save_pretrained: got a student .* accepted: python -m usv.export"):
        pipe.transformer.save_pretrained(tmp_path / "transformer")
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "half")
    kinds = [{value.dtype for value in load_file(file).values()} for file in (tmp_path / "half" / "transformer").glob("*.safetensors")]
    assert kinds == [{torch.bfloat16}] and latents(pipe).isfinite().all(), "as a stock pipeline saves what was asked of it"


def test_what_cannot_work_is_refused_by_name(pipe, folder):
    usv.enable(pipe, folder)
    with pytest.raises(CheckpointError, match="enable_cache: got FirstBlockCacheConfig, accepted beside a student: none"):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(CheckpointError, match="enable_parallelism: got a student"):
        pipe.transformer.enable_parallelism(config=None)
    usv.disable(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(CheckpointError, match="whose cache is enabled, accepted: disable_cache"):
        usv.enable(pipe, folder)
    pipe.transformer.disable_cache()


def test_text_of_another_length(pipe, folder):
    """Shorter text gets its zeros, longer text loses zeros, and is refused where it is text."""
    usv.enable(pipe, folder)
    text = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(text, (0, 0, 0, tiny.TEXT - 5))
    wanted = latents(pipe, prompt_embeds=padded)
    for other in (text, torch.nn.functional.pad(text, (0, 0, 0, 221))):
        assert torch.equal(latents(pipe, prompt_embeds=other), wanted)
    with pytest.raises(CheckpointError, match=f"got text of more than {tiny.TEXT} tokens"):
        latents(pipe, prompt_embeds=torch.ones(1, tiny.TEXT + 1, 64))


def test_positional_arguments_and_a_negative_prompt(pipe, folder, caplog):
    usv.enable(pipe, folder)
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    by_name = pipe(prompt="a cat", height=tiny.SIZE, width=tiny.SIZE, generator=g(), output_type="latent").frames
    assert "negative_prompt" not in caplog.text
    assert torch.equal(pipe("a cat", "blurry", tiny.SIZE, tiny.SIZE, generator=g(), output_type="latent").frames, by_name)
    assert "negative_prompt is not used" in caplog.text


def test_video_to_video_keeps_its_arguments(pipe, folder):
    other = WanVideoToVideoPipeline(**{k: pipe.components[k] for k in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")})
    other.set_progress_bar_config(disable=True)
    video = [torch.zeros(tiny.SIZE, tiny.SIZE, 3).byte().numpy()] * tiny.FRAMES
    other.vae_scale_factor_spatial, other.vae_scale_factor_temporal = 4, 1  # which this class reads off Wan's own VAE

    def run():
        g = torch.Generator().manual_seed(0)
        return other(video=video, generator=g, prompt="a cat", strength=0.5, num_inference_steps=4, guidance_scale=1.0, height=tiny.SIZE,
                     width=tiny.SIZE, max_sequence_length=tiny.TEXT, output_type="latent").frames  # fmt: skip

    dense = run()
    sparse = (usv.enable(other, folder), run())[1]
    assert other._usv.record.forwards == 2 and not torch.equal(sparse, dense)
    usv.disable(other)
    assert torch.equal(run(), dense)


def test_the_record_is_bounded(pipe, folder):
    record = usv.enable(pipe, folder)._usv.record
    for _ in range(5000):
        record.add(0.0, [0.5] * 8, [0.0] * 8)
    assert len(record.densities) < 10_000 and record.forwards == 5000 and record.mean_density() == 0.5


def test_a_style_loaded_after_enable_acts_at_its_scale(pipe, folder):
    wanted = latents(usv.enable(pipe, folder))
    g = torch.Generator().manual_seed(3)
    layer = "transformer.blocks.0.attn1.to_q"
    style = {f"{layer}.lora_A.weight": torch.randn(2, 32, generator=g), f"{layer}.lora_B.weight": torch.randn(32, 2, generator=g)}
    pipe.load_lora_weights(style)
    whole, half, none = (latents(pipe, attention_kwargs={"scale": scale}) for scale in (1.0, 0.5, 0.0))
    assert torch.equal(latents(pipe), whole) and torch.allclose(none, wanted, atol=1e-5)
    assert not torch.allclose(whole, wanted, atol=1e-3) and not torch.allclose(half, whole, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.allclose(latents(pipe), wanted, atol=1e-5)
