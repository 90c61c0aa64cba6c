"""LoRAs beside a student, in every format, before `enable` and after: with every block kept, what they do to the dense pipeline."""

import copy

import lora_files
import pytest
import tiny
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

import usv
from usv.models import lora
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, load_student, save_student
from usv.sampling.export import export_lora
from usv.sampling.generate import load_pipeline
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT}
WHOLE = SparsityPlan(timestep_bins(2, 3.0), ((Rung(), Rung()),) * 2)  # every block kept: the dense pipeline
STYLE, OTHER = (lora_files.style(tiny.make_transformer(), seed, rank) for seed, rank in ((3, 2), (4, 3)))
SPARSE = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))


@pytest.fixture(scope="module")
def loaded(tiny_wan):
    return load_pipeline(str(tiny_wan))


def saved(path, transformer, plan, **more):
    model = SparseTransformer(transformer, Tile(*tiny.TILE)).eval().requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    save_student(path, Student(model, plan, {**SAMPLING, **more}))
    return path


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """The teacher's weights with every block kept."""
    return saved(tmp_path_factory.mktemp("whole") / "student", copy.deepcopy(loaded.transformer), WHOLE)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("sparse") / "student", tiny.make_transformer(seed=5), SPARSE)


@pytest.fixture(scope="module")
def adapted(loaded, tmp_path_factory):
    """A student of adapters named `default`, as train.py saves it, and itself with all weights."""
    own = lora.adapt(copy.deepcopy(loaded.transformer), Tile(*tiny.TILE), 4, 8.0, ["to_q", "to_v"])
    g = torch.Generator().manual_seed(7)
    for name, p in own.named_parameters():
        if ".lora_B." in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
    state, folder = own.state_dict(), tmp_path_factory.mktemp("adapted")
    model = SparseTransformer(tiny.make_transformer(), Tile(*tiny.TILE)).eval().requires_grad_(False)
    model.load_state_dict(lora.merged(state, 2.0))
    adapters = {n: v for n, v in state.items() if lora.is_adapter(n)}
    save_student(folder / "student", Student(model, SPARSE, SAMPLING, {}, {}, {"rank": 4, "alpha": 8.0, "targets": ["to_q", "to_v"]}, adapters))
    save_student(folder / "all", Student(model, SPARSE, SAMPLING))
    return folder / "student", folder / "all"


def pipeline(loaded):
    pipe = WanPipeline(**{**loaded.components, "transformer": copy.deepcopy(loaded.transformer)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded):
    return pipeline(loaded)


def latents(pipe, **more):
    text = torch.randn(1, tiny.TEXT, 64, generator=torch.Generator().manual_seed(1))
    settings = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": tiny.TEXT}
    settings |= {"num_frames": tiny.FRAMES if hasattr(pipe, "_usv") else tiny.FRAMES - 1, "prompt_embeds": text}
    return pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **{**settings, **more}).frames


def close(a, b, tolerance=1e-5):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def scaled(pipe):
    pipe.set_adapters("style", 0.5)


def fused(pipe):
    pipe.fuse_lora(lora_scale=0.7)


def unfused(pipe):
    pipe.fuse_lora()
    pipe.unfuse_lora()


def disabled(pipe):
    pipe.disable_lora()


def unloaded(pipe):
    pipe.unload_lora_weights()


def two(pipe):
    pipe.load_lora_weights(lora_files.wan(OTHER), adapter_name="other")
    pipe.set_adapters(["style", "other"], [0.3, 0.9])


ACTIONS = (scaled, fused, unfused, disabled, unloaded, two)


@pytest.mark.parametrize("kind", lora_files.FORMATS)
def test_every_format_before_and_after(loaded, whole, kind, tmp_path):
    """As a file: on the student with every block kept what it is on the dense pipeline, and nothing once it is unloaded."""
    save_file(lora_files.FORMATS[kind](STYLE), tmp_path / "style.safetensors")
    load = lambda pipe: pipe.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")  # noqa: E731
    pipe = pipeline(loaded)
    plain = latents(pipe)
    load(pipe)
    wanted = latents(pipe)
    assert not close(wanted, plain, 0.05)
    usv.enable(pipe, whole)
    assert close(latents(pipe), wanted) and pipe._usv.record.forwards == 2
    pipe.unload_lora_weights()
    assert close(latents(pipe), plain)
    load(pipe)
    assert close(latents(pipe), wanted)
    usv.disable(pipe)
    assert torch.equal(latents(pipe), wanted), "the adapters that were there before enable"


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_what_is_done_to_them_before_and_after(pipe, whole, action):
    update = lora_files.diffusers(STYLE)
    other = copy.deepcopy(pipe)
    pipe.load_lora_weights(update, adapter_name="style")
    action(pipe)
    wanted = latents(pipe)
    usv.enable(pipe, whole)
    assert close(latents(pipe), wanted)
    usv.enable(other, whole)
    other.load_lora_weights(update, adapter_name="style")
    action(other)
    assert close(latents(other), wanted)
    usv.disable(pipe)
    assert torch.equal(latents(pipe), wanted)


def test_fused_and_unloaded_stays_with_a_student(pipe, whole):
    """After enable as on a stock pipeline; before, the weights hold a style that a student's own are without: refused."""
    other = copy.deepcopy(pipe)
    plain = latents(pipe)
    pipe.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="style")
    wanted = latents(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(CheckpointError, match=r"into which the LoRA\(s\) \['style'\] were fused and then unloaded, accepted: "):
        usv.enable(pipe, whole)
    usv.enable(other, whole)
    other.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="style")
    other.fuse_lora()
    other.unload_lora_weights()
    assert close(latents(other), wanted)
    with pytest.raises(CheckpointError, match="were fused and then unloaded"):  # a second student would lose it
        usv.enable(other, whole)
    assert close(latents(other), wanted)
    usv.disable(other)
    assert torch.equal(latents(other), plain) and not other.fused_loras


def test_what_was_fused_before_is_fused_in_the_student(pipe, whole):
    """Unloading leaves it there and unfusing takes it out, as on a stock pipeline."""
    plain = latents(pipe)
    pipe.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="style")
    pipe.fuse_lora(lora_scale=0.7)
    wanted, other = latents(pipe), copy.deepcopy(pipe)
    for one in (pipe, other):
        usv.enable(one, whole)
        assert one.fused_loras == {"style"}
    pipe.unload_lora_weights()
    assert close(latents(pipe), wanted)
    other.unfuse_lora()
    other.unload_lora_weights()
    assert close(latents(other), plain) and not other.fused_loras


def test_a_student_of_adapters_keeps_a_style_apart(pipe, loaded, adapted):
    """Loaded, scaled or fused first: the student's update is its own, whatever the style's scale, rank and name."""
    only, all_weights = adapted
    for action in (lambda pipe: None, lambda pipe: pipe.set_adapters("default", 0.5), fused, disabled):
        one, two = pipeline(loaded), pipeline(loaded)
        for pipe, first in ((one, True), (two, False)):
            if not first:
                usv.enable(pipe, all_weights)
            pipe.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="default")
            action(pipe)
            if first:
                usv.enable(pipe, only)
        assert close(latents(one), latents(two))
    one.enable_lora()
    one.unload_lora_weights()
    assert close(latents(one), latents(usv.enable(pipeline(loaded), all_weights)))
    pipe = pipeline(loaded)  # a style that was fused and unloaded is the base of a student of adapters
    pipe.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="default")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    two.unload_lora_weights(), usv.disable(two), usv.enable(two, all_weights)
    two.load_lora_weights(lora_files.diffusers(STYLE))
    assert close(latents(usv.enable(pipe, only)), latents(two))


def test_an_exported_lora_then_a_style(pipe, loaded, adapted, tiny_wan, tmp_path):
    """The recipe that usv.export prints, with a style loaded before or after its last line."""
    export_lora(adapted[0], str(tiny_wan), tmp_path / "out")
    pipe.load_lora_weights(tmp_path / "out")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="style")
    usv.enable(pipe, tmp_path / "out")
    other = usv.enable(pipeline(loaded), adapted[1])
    other.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="style")
    assert close(latents(pipe), latents(other))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_few_step_student_wears_it(pipe, loaded, sparse, tmp_path, before):
    few = saved(tmp_path / "few", tiny.make_transformer(seed=5), SPARSE, student_timesteps=[1000, 400], num_inference_steps=2)
    steps = (lambda: pipe.load_lora_weights(lora_files.kohya(STYLE), adapter_name="style")), (lambda: usv.enable(pipe, few))
    for step in steps if before else steps[::-1]:
        step()
    model = load_student(few, loaded.transformer).model  # its update, merged by hand
    for name, (a, b) in STYLE.items():
        model.transformer.get_submodule(name).weight.data += b @ a
    by_hand = usv.enable(pipeline(loaded), Student(model, SPARSE, {**SAMPLING, "student_timesteps": [1000, 400]}))
    assert close(latents(pipe), latents(by_hand)) and not close(latents(pipe), latents(usv.enable(pipeline(loaded), few)), 0.05)


def test_a_quantised_base(pipe, whole, adapted):
    """A student with weights of its own is refused, also where somebody else than diffusers quantised."""
    kind = type("Int8Tensor", (torch.nn.Parameter,), {})
    for layer in (block.attn1.to_q for block in pipe.transformer.blocks):
        layer.weight = kind(layer.weight.data)
    for student in (whole, adapted[0]):
        with pytest.raises(CheckpointError, match="for a base quantised by Int8Tensor, accepted: one of a router .*; or a base in full precision"):
            usv.enable(pipe, student)


def test_fusing_leaves_a_shared_base_alone(pipe, loaded, tmp_path):
    """A router's student on a quantised base has the base's very tensors."""
    model = SparseTransformer(copy.deepcopy(loaded.transformer), Tile(*tiny.TILE)).eval().requires_grad_(False)
    save_student(tmp_path / "router", Student(model, WHOLE, {**SAMPLING, "guidance_scale": 1.0}, router=True))
    dense = latents(pipe)
    pipe.transformer.hf_quantizer = object()
    usv.enable(pipe, tmp_path / "router")
    pipe.load_lora_weights(lora_files.diffusers(STYLE))
    pipe.fuse_lora()
    assert not close(latents(pipe), dense, 0.05)
    usv.disable(pipe)
    assert torch.equal(latents(pipe), dense)


def test_hot_swap_compiles_nothing(pipe, loaded, tmp_path):
    """A style of another rank in the place of one that was loaded before enable."""
    sparse = saved(tmp_path / "even", tiny.make_transformer(seed=5), SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0),) * 2,) * 2))  # one graph
    wanted = []
    for update in (STYLE, OTHER):
        other = usv.enable(copy.deepcopy(pipe), sparse)
        other.load_lora_weights(lora_files.diffusers(update))
        wanted.append(latents(other))
    pipe.enable_lora_hotswap(target_rank=3)
    pipe.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="style")
    usv.enable(pipe, sparse)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert close(latents(pipe), wanted[0], 1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    pipe.load_lora_weights(lora_files.wan(OTHER), adapter_name="style", hotswap=True)
    assert close(latents(pipe), wanted[1], 1e-4)
    assert graphs and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_pipelines_of_one_student_wear_their_own(loaded, sparse):
    """Loading or fusing in one changes nothing in the other, nor in the Student itself."""
    student, one, two = load_student(sparse, loaded.transformer), pipeline(loaded), pipeline(loaded)
    plain = latents(usv.enable(one, student))
    usv.enable(two, student)
    two.load_lora_weights(lora_files.diffusers(STYLE))
    styled = latents(two)
    two.fuse_lora()
    two.unload_lora_weights()
    assert close(latents(two), styled) and not close(styled, plain, 0.05)
    assert torch.equal(latents(one), plain)
    usv.disable(one), usv.disable(two)
    assert torch.equal(latents(usv.enable(one, student)), plain)
    usv.disable(one)
    one.load_lora_weights(lora_files.diffusers(STYLE))
    one.fuse_lora()
    assert close(latents(usv.enable(one, student)), styled)
    assert torch.equal(latents(usv.enable(two, student)), plain)


def test_adapters_in_training_are_no_style(loaded, pipe, whole):
    """Validation shows a student of adapters on the pipeline whose transformer has them, and a critic's."""
    plain = latents(pipe)
    student = lora.adapt(pipe.transformer, Tile(*tiny.TILE), 2, 2.0, ["to_q"])
    lora.Branch(student, 2, 2.0)
    for name, p in pipe.transformer.named_parameters():
        if ".lora_B." in name:
            p.data = torch.ones_like(p)
    with lora.base_only(pipe.transformer):
        usv.enable(pipe, whole)
        assert close(latents(pipe), plain)
        usv.disable(pipe)
        assert torch.equal(latents(pipe), plain)
    assert lora.adapters_of(pipe.transformer) == (lora.NAME, lora.CRITIC) and not close(latents(pipe), plain)


def test_another_student_takes_them_over(pipe, whole, sparse):
    usv.enable(pipe, whole)
    pipe.load_lora_weights(lora_files.diffusers(STYLE), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    fresh = usv.enable(copy.deepcopy(pipe), sparse)
    assert fresh.get_active_adapters() == ["style"]
    unstyled = latents(pipe)
    usv.enable(pipe, sparse)
    assert torch.equal(latents(pipe), latents(fresh)) and not close(latents(pipe), unstyled, 0.05)
    pipe.fuse_lora()
    usv.enable(pipe, whole)
    assert pipe.fused_loras == {"style"} and close(latents(pipe), unstyled)
    usv.disable(pipe)
    assert not pipe.fused_loras


def test_what_diffusers_leaves_out_is_said(pipe, sparse, caplog):
    usv.enable(pipe, sparse)
    pipe.load_lora_weights(lora_files.lightx2v(STYLE), adapter_name="zeros")
    assert "leaves out" not in caplog.text, "zeros say nothing"
    file = lora_files.lightx2v(STYLE, norms=0.5) | {"diffusion_model.head.modulation.diff": torch.ones(1, 2, 32)}
    pipe.load_lora_weights(file, adapter_name="more")
    assert f"diffusers leaves out 3 of {len(file)} tensors" in caplog.text and "diffusion_model.blocks.0.self_attn.norm_q.diff" in caplog.text


@pytest.mark.parametrize(("prefix", "said"), [("", "whose names diffusers does not know"), ("base_model.model.", "base_model.model.blocks.0"), ("lora_unet_", "converter misses 'blocks_0")])
def test_a_file_that_would_change_nothing_is_refused(pipe, sparse, prefix, said):
    usv.enable(pipe, sparse)
    plain = latents(pipe)
    update = {f"{prefix}{n}.lora_{x}.weight": t for n, pair in STYLE.items() for x, t in zip("AB", pair)}
    if prefix == "lora_unet_":
        update = {n: t for n, t in lora_files.kohya(STYLE).items() if "alpha" not in n}
    with pytest.raises(CheckpointError, match=said):
        pipe.load_lora_weights(update)
    assert torch.equal(latents(pipe), plain)
