"""One file under Wan's own names: those ComfyUI expects, read back by diffusers' converter and by ourselves to the same videos."""

import base64
import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save, save_file

from usv.models.forward import SparseTransformer
from usv.sampling import comfyui, wan_file
from usv.sampling.checkpoint import CheckpointError, Student, load_student
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

KEYS = json.loads((Path(__file__).parents[2] / "integrations" / "comfyui" / "wan_keys.json").read_text())
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))
WAN_1_3B = dict(
    patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
    ffn_dim=8960, num_layers=30, cross_attn_norm=True,
)  # fmt: skip


def student():
    model = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE))
    for gate in model.gates:
        torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    sampling = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "flow_shift": 3.0}
    return Student(model.eval().requires_grad_(False), PLAN, sampling)


def expected(letters: dict[str, int], layers: int) -> dict[str, list[int]]:
    """ComfyUI's keys and shapes, by the list's rules."""
    size = lambda s: s if isinstance(s, int) else int(s[:-1] or 1) * letters[s[-1]]  # noqa: E731
    found = {name: [size(s) for s in shape] for name, shape in KEYS["outer"].items()}
    return found | {f"blocks.{i}.{name}": [size(s) for s in shape] for i in range(layers) for name, shape in KEYS["block"].items()}


def test_names_and_shapes_are_those_comfyui_expects():
    with torch.device("meta"):
        model = WanTransformer3DModel(**WAN_1_3B)
    found = {wan_file.wan_name(name): list(value.shape) for name, value in model.state_dict().items()}
    assert found == expected({"d": 1536, "f": 8960, "t": 4096, "q": 256, "c": 16, "o": 16}, 30)
    assert comfyui.check_wan(model) is None


def test_every_name_comes_back():
    """Also image-to-video's and VACE's, which have parts of their own."""
    from diffusers import WanVACETransformer3DModel

    small = {**WAN_1_3B, "num_attention_heads": 1, "ffn_dim": 64, "text_dim": 32, "num_layers": 2}
    with torch.device("meta"):
        models = [WanTransformer3DModel(**small, image_dim=64, added_kv_proj_dim=128), WanVACETransformer3DModel(**small, vace_layers=[0], vace_in_channels=16)]
    for model in models:
        names = list(model.state_dict())
        wans = [wan_file.wan_name(name) for name in names]
        assert len(set(wans)) == len(names) and [wan_file.wan_name(name, back=True) for name in wans] == names


def test_diffusers_reads_the_file(tmp_path):
    """Its own converter of Wan's names, which knows nothing of ours, finds every weight in its place."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    one = student()
    comfyui.write_weights(one, tiny.make_transformer(), tmp_path / "one.safetensors")
    back = convert_wan_transformer_to_diffusers(load_file(tmp_path / "one.safetensors"))
    want = one.model.transformer.state_dict()
    assert back.keys() == want.keys() and all(torch.equal(back[name], want[name]) for name in want)


def test_the_file_is_the_student(tiny_wan, tmp_path):
    """Weights, gates, plan and sampling come back; a student of the file is bit-equal to the one that was written."""
    base, one = WanPipeline.from_pretrained(tiny_wan).transformer, student()
    comfyui.write_weights(one, base, tmp_path / "one.safetensors")
    record = wan_file.read_record(tmp_path / "one.safetensors")
    assert record["sampling"] == one.sampling and record["tile"] == list(tiny.TILE) and record["base"].keys() and record["version"]
    again = load_student(tmp_path / "one.safetensors", base)
    assert again.plan == one.plan and again.sampling == one.sampling
    for name, value in one.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert (tmp_path / "one.safetensors").stat().st_mode & 0o044, "others may read it"


def test_by_the_command(tiny_wan, tmp_path, capsys):
    """What a user types: written once, refused twice, run on a pipeline to the bit of the folder it was written from; rounded, what
    diffusers keeps in fp32 stays so; adapters under the names that diffusers' own reader of Wan's LoRAs knows."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    import usv
    from usv.sampling.checkpoint import save_student
    from usv.sampling.export import main

    one = student()
    one.sampling |= {"max_sequence_length": tiny.TEXT}
    save_student(tmp_path / "student", one)
    typed = ["--ckpt", str(tmp_path / "student"), "--model", str(tiny_wan), "--comfyui", "--out"]
    assert main([*typed, str(tmp_path / "one.safetensors")]) == 0 and "ComfyUI cannot run it" in capsys.readouterr().out
    assert main([*typed, str(tmp_path / "one.safetensors")]) == 1 and "--overwrite" in capsys.readouterr().err
    assert main([*typed, str(tmp_path / "folder")]) == 1 and "ends in .safetensors" in capsys.readouterr().err

    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for path in ("student", "one.safetensors"):
        usv.enable(pipe, str(tmp_path / path))
        latents = pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="latent").frames
        videos.append(latents)
        usv.disable(pipe)
    assert torch.equal(*videos)

    assert main([*typed, str(tmp_path / "half.safetensors"), "--dtype", "bfloat16"]) == 0
    kinds = {name: value.dtype for name, value in load_file(tmp_path / "half.safetensors").items()}
    assert kinds["blocks.0.self_attn.q.weight"] == torch.bfloat16 and kinds["blocks.0.modulation"] == kinds["time_embedding.0.weight"] == torch.float32

    assert main([*typed, str(tmp_path / "lora.safetensors"), "--lora", "--rank", "4"]) == 0
    written = load_file(tmp_path / "lora.safetensors")
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in written
    read = _convert_non_diffusers_wan_lora_to_diffusers(dict(written))
    assert len(read) == len(written) and "transformer.blocks.0.attn1.to_q.lora_A.weight" in read


def test_strangers_and_damage(tiny_wan, tmp_path):
    base = WanPipeline.from_pretrained(tiny_wan).transformer
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "stranger.safetensors")
    with pytest.raises(CheckpointError, match="no student"):
        wan_file.read_record(tmp_path / "stranger.safetensors")
    later = {"usv": json.dumps({"format": "usv-student-9"}), "usv_gates": base64.b64encode(save({})).decode()}
    save_file({}, tmp_path / "later.safetensors", later)
    with pytest.raises(CheckpointError, match="later.safetensors.*usv-student-9"):
        load_student(tmp_path / "later.safetensors", base)
    comfyui.write_weights(student(), base, tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    for name in ("cut", "absent"):
        with pytest.raises(CheckpointError, match=f"{name}.safetensors: not readable"):
            wan_file.read_record(tmp_path / f"{name}.safetensors")
    other = WanTransformer3DModel(**{**dict(base.config), "ffn_dim": 96})
    with pytest.raises(CheckpointError, match="made for another model"):
        load_student(tmp_path / "one.safetensors", other)
    with pytest.raises(CheckpointError, match="accepted: a student of a Wan"):
        comfyui.check_wan(torch.nn.Linear(2, 2))
    assert "ComfyUI cannot run it" in comfyui.check_wan(base), "heads that ComfyUI would count wrongly are said"
