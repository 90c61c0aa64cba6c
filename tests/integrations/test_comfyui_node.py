"""integrations/comfyui on a stub of ComfyUI: its model patcher's methods, its Wan's blocks and its attention override, as published at commit
a125cd84 and written anew around diffusers' layers. What ComfyUI itself does with them is not run here."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

from usv.models.forward import SparseTransformer
from usv.sampling import comfyui
from usv.sampling.checkpoint import CheckpointError, Student
from usv.sampling.fingerprint import fingerprint
from usv.sampling.wan_file import wan_name
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
# dense, sparse, merging twice by one match, merging otherwise
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2), Rung(1, 2), Rung()), (Rung(), Rung(1, 1), Rung(0, 2), Rung(2, 0))))
SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 4, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def node():
    spec = importlib.util.spec_from_file_location("usv_comfyui", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["usv_comfyui"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("usv_comfyui")]:
        del sys.modules[name]


# ---- the stub ------------------------------------------------------------------------------------------------------------------------------


def dense(q, k, v, heads, transformer_options=None, **kwargs):
    """ComfyUI's optimized_attention: an override is given the function and all arguments, once."""
    if "inside" not in kwargs and (transformer_options or {}).get("optimized_attention_override"):
        return transformer_options["optimized_attention_override"](dense, q, k, v, heads=heads, transformer_options=transformer_options, inside=True)
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """q, k, v, o of a diffusers attention by Wan's names."""

    def __init__(self, attn):
        super().__init__()
        self.num_heads, self.dim = attn.heads, attn.to_q.in_features
        self.q, self.k, self.v, self.o, self.norm_q, self.norm_k = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], attn.norm_q, attn.norm_k

    def forward(self, x, context, freqs, transformer_options):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context))
        if freqs is not None:
            q, k = (self.rotated(y, freqs) for y in (q, k))
        return self.o(dense(q, k, self.v(context), heads=self.num_heads, transformer_options=transformer_options))

    def rotated(self, x, freqs):
        pairs = x.unflatten(2, (self.num_heads, -1, 2))[..., None, :].float()
        return (freqs * pairs).sum(-1).flatten(2).to(x)


class Block(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.modulation, self.norm1, self.norm2, self.norm3, self.ffn = block.scale_shift_table, block.norm1, block.norm3, block.norm2, block.ffn
        self.self_attn, self.cross_attn = Attention(block.attn1), Attention(block.attn2)

    def forward(self, x, e, freqs, context, context_img_len=None, transformer_options=None):
        e = (self.modulation.unsqueeze(0) + e).unbind(2)
        y = torch.addcmul(e[0], self.norm1(x), 1 + e[1])
        x = torch.addcmul(x, self.self_attn(y, y, freqs, transformer_options), e[2])
        x = x + self.cross_attn(self.norm3(x), context, None, transformer_options)
        return torch.addcmul(x, self.ffn(torch.addcmul(e[3], self.norm2(x), 1 + e[4])), e[5])


class Model(nn.Module):
    """ComfyUI's WanModel: blocks, which patches may replace, between embeddings and head."""

    def __init__(self, transformer):
        super().__init__()
        self.whole, self.blocks = [transformer], nn.ModuleList(map(Block, transformer.blocks))
        self.weights = {wan_name(name): value for name, value in transformer.state_dict().items()}

    def state_dict(self):
        return self.weights

    def forward(self, x, timestep, context, transformer_options):
        t = self.whole[0]
        cos, sin = (table[0, :, 0, 0::2] for table in t.rope(x))
        pe = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)[None, :, None]
        img = t.patch_embedding(x).flatten(2).transpose(1, 2)
        temb, vec, context, _ = t.condition_embedder(timestep, context, None)
        vec = vec.unflatten(1, (6, -1))[:, None]
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.blocks):
            def original(a, block=block):
                return {"img": block(a["img"], context=a["txt"], e=a["vec"], freqs=a["pe"], transformer_options=a["transformer_options"])}
            arguments = {"img": img, "txt": context, "vec": vec, "pe": pe, "transformer_options": transformer_options}
            img = replaced[("double_block", i)](arguments, {"original_block": original})["img"] if ("double_block", i) in replaced else original(arguments)["img"]
        shift, scale = (t.scale_shift_table + temb[:, None]).chunk(2, dim=1)
        img = t.proj_out(t.norm_out(img.float()) * (1 + scale) + shift)
        frames, height, width = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        return img.view(len(x), frames, height, width, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape)


class Patcher:
    def __init__(self, network, options=None):
        self.network, self.model_options = network, options or {"transformer_options": {}}

    def clone(self):
        inner = self.model_options["transformer_options"]
        inner = {**inner, "patches_replace": {name: dict(found) for name, found in inner.get("patches_replace", {}).items()}}
        return Patcher(self.network, {**self.model_options, "transformer_options": inner})

    def get_model_object(self, name):
        return {"diffusion_model": self.network}[name]

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    def set_model_patch_replace(self, patch, name, block_name, number):
        self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault(name, {})[(block_name, number)] = patch

    def __call__(self, x, sigma, text, uncond=False, **options):
        """What ComfyUI's sampling does for a step: model_sampling makes the timestep of sigma."""
        inner = {**self.model_options["transformer_options"], **options}
        apply_model = lambda x, t, context, transformer_options: self.network(x, 1000 * t, context, transformer_options)  # noqa: E731
        c = {"context": text, "transformer_options": inner}
        wrapper = self.model_options.get("model_function_wrapper")
        if wrapper is None:
            return apply_model(x, sigma, **c)
        return wrapper(apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0, 1] if uncond else [0]})


# ---- the tests -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    model = SparseTransformer(tiny.make_transformer(layers=4, seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    for gate in model.gates:
        nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(gate.bias, std=0.2, generator=torch.Generator().manual_seed(1))
    return Student(model, PLAN, SAMPLING)


@pytest.fixture(scope="module")
def file(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("comfyui") / "student.safetensors"
    comfyui.write_weights(student, tiny.make_transformer(layers=4), path)
    return path


@pytest.fixture
def loaded(node, student, file, monkeypatch):
    """(model, sigmas, width, height, length) of the node, the file found as ComfyUI finds it."""
    stub = SimpleNamespace(get_filename_list=lambda folder: ["student.safetensors", "x.sft"], get_full_path=lambda folder, name: str(file) if folder == "diffusion_models" else None)
    monkeypatch.setitem(sys.modules, "folder_paths", stub)
    kind = node.NODE_CLASS_MAPPINGS["USVStudent"]
    assert kind.INPUT_TYPES()["required"]["student"] == (["student.safetensors"],)
    return getattr(kind(), kind.FUNCTION)(Patcher(Model(student.model.transformer)), "student.safetensors")


def inputs(size=8, frames=5):
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 16, frames, size, size, generator=g), torch.randn(2, tiny.TEXT, 64, generator=g)


def away(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_the_stub_is_wan(student):
    x, text = inputs()
    with torch.no_grad():
        wanted = student.model.transformer(x, torch.full((2,), 900.0), text).sample
        assert away(Patcher(Model(student.model.transformer))(x, torch.full((2,), 0.9), text), wanted) <= 1e-5


@pytest.mark.parametrize("sigma", [0.95, 0.2], ids=["noisy", "clean"])
@pytest.mark.parametrize(("size", "frames"), [(8, 5), (10, 4)])
def test_it_is_the_student(student, loaded, sigma, size, frames):
    """Every kind of rung, other grids, twice: what `usv` computes from the same file."""
    x, text = inputs(size, frames)
    with torch.no_grad():
        wanted = student.model(x, torch.full((2,), 1000 * sigma), text, PLAN.at(1000 * sigma))[0]
        plain = Patcher(loaded[0].network)(x, torch.full((2,), sigma), text)
        for _ in range(2):
            assert away(loaded[0](x, torch.full((2,), sigma), text), wanted) <= 1e-5
    assert away(plain, wanted) > 1e-3


def test_the_model_it_was_given_stays_dense_and_other_overrides_act(student, loaded, node):
    x, text = inputs()
    seen = []

    def other(func, *args, **kwargs):
        seen.append(args[1].shape[1])
        return func(*args, **kwargs)

    with torch.no_grad():
        out = loaded[0](x, torch.full((2,), 0.95), text)
        assert torch.equal(loaded[0](x, torch.full((2,), 0.95), text, optimized_attention_override=other), out)
    dense_layers = sum(rung == Rung() for rung in PLAN.at(950.0))
    assert seen.count(tiny.TEXT) == 4 and seen.count(80) == dense_layers, "cross-attention and dense layers"


def test_steps_and_sizes(node, loaded):
    _, sigmas, *sizes = loaded
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(4)
    assert torch.allclose(sigmas, scheduler.sigmas.float(), atol=1e-6) and sizes == [tiny.SIZE, tiny.SIZE, tiny.FRAMES]
    assert torch.equal(node.sigmas_of({"student_timesteps": [1000, 400]}), torch.tensor([1.0, 0.4, 0.0]))


def test_adapters_need_their_base(node, student, tmp_path):
    """A file of adapters goes with the base, into which ComfyUI's loader puts them as it runs."""
    base, path = tiny.make_transformer(layers=4, seed=1), tmp_path / "lora.safetensors"
    tensors = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 32), "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(32, 2)}
    comfyui.write_lora(student, fingerprint(base), tensors, student.model.transformer, path)
    node.apply(Patcher(Model(base)), *node.read(str(path)), str(path))
    with pytest.raises(CheckpointError, match="accepted: the base, with this file as its LoRA"):
        node.apply(Patcher(Model(student.model.transformer)), *node.read(str(path)), str(path))


def test_what_cannot_run_is_refused(node, loaded, student, file, tmp_path):
    x, text = inputs()
    with pytest.raises(ValueError, match="cfg above 1.*, accepted: cfg=1.0"):
        loaded[0](x, torch.full((2,), 0.95), text, uncond=True)
    with pytest.raises(CheckpointError, match="got a model with other weights .*, accepted: this file, by Load Diffusion Model"):
        node.apply(Patcher(Model(tiny.make_transformer(layers=4))), *node.read(str(file)), str(file))
    with pytest.raises(CheckpointError, match="got a model of 2 layers, accepted: 4"):
        node.apply(Patcher(Model(tiny.make_transformer(layers=2, seed=5))), {**node.read(str(file))[0], "base": {}}, {}, str(file))
    with pytest.raises(CheckpointError, match="block 0 another node replaces, accepted: USV Student first"):
        node.apply(loaded[0], *node.read(str(file)), str(file))
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not readable as a student"):
        node.read(str(tmp_path / "other.safetensors"))
