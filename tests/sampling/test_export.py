"""usv.export: what WanPipeline.from_pretrained + usv.enable, or load_lora_weights + usv.enable, makes is what the student makes."""

import pytest
import tiny
import torch
from diffusers import WanPipeline

import usv
from usv.config import SettingError
from usv.files import FileError
from usv.models import lora
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, load_student, read_config, save_student
from usv.sampling.export import cut, export, export_lora, main
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

SAMPLING = {
    "height": tiny.SIZE,
    "width": tiny.SIZE,
    "num_frames": tiny.FRAMES,
    "num_inference_steps": 2,
    "max_sequence_length": tiny.TEXT,
}
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def noisy_gates(model):
    for gate in model.gates:
        torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


@pytest.fixture
def whole(tmp_path):
    """A fully trained student."""
    policy = {"name": "gumbel", "density": [[[1.0]]], "merge": [[[1.0]]]}
    save_student(
        tmp_path / "student",
        Student(noisy_gates(SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE))), PLAN, SAMPLING, {}, policy),
    )
    return tmp_path / "student"


@pytest.fixture
def adapted(tmp_path, tiny_wan):
    """A student of adapters, as train.py saves it: the model has them merged in."""
    torch.manual_seed(1)
    trained = lora.adapt(WanPipeline.from_pretrained(tiny_wan).transformer, Tile(*tiny.TILE), 4, 8.0, TARGETS)
    for name, p in trained.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    noisy_gates(trained)
    state = trained.state_dict()
    model = SparseTransformer(tiny.make_transformer(), Tile(*tiny.TILE)).eval().requires_grad_(False)
    model.load_state_dict(lora.merged(state, 2.0))
    adapters = {n: v for n, v in state.items() if lora.is_adapter(n)}
    setting = {"rank": 4, "alpha": 8.0, "targets": TARGETS}
    save_student(tmp_path / "student", Student(model, PLAN, SAMPLING, {}, {}, setting, adapters))
    return tmp_path / "student", trained


def sample(pipe, source):
    usv.enable(pipe, source)
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(
            "a cat, the camera pans left", generator=torch.Generator().manual_seed(0), output_type="latent"
        ).frames
    finally:
        usv.disable(pipe)


def test_a_pipeline_folder_runs_the_student_anywhere(whole, tiny_wan, tmp_path):
    wanted = sample(WanPipeline.from_pretrained(tiny_wan), whole)
    out = export(whole, str(tiny_wan), tmp_path / "exported")
    (whole / "student.safetensors").unlink()  # the export needs nothing of it
    pipe = WanPipeline.from_pretrained(out)
    assert torch.equal(sample(pipe, out), wanted)
    record = read_config(out)
    assert SparsityPlan.from_dict(record["plan"]) == PLAN and record["policy"]["name"] == "gumbel"
    with pytest.raises(CheckpointError, match=r"exported with.*WanPipeline\.from_pretrained\(.*exported"):
        usv.enable(WanPipeline.from_pretrained(tiny_wan), out)


def test_adapters_are_merged_when_loaded(adapted, tiny_wan):
    """Merged weights give what the adapters give, and the folder holds no weights of the base."""
    from safetensors.torch import load_file

    folder, trained = adapted
    base = WanPipeline.from_pretrained(tiny_wan).transformer
    back = load_student(folder, base)
    x, text = torch.randn(1, 16, 5, 8, 8), torch.randn(1, 4, 64)
    with torch.no_grad():
        ours, theirs = (m(x, torch.tensor([400.0]), text, PLAN.rungs[0])[0] for m in (back.model, trained))
        dense = lora.Teacher(trained)(x, torch.tensor([400.0]), text)[0]
        teacher = SparseTransformer(base, Tile(*tiny.TILE))(x, torch.tensor([400.0]), text)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(dense, teacher), "the base behind the adapters is the teacher"
    assert (ours - teacher).abs().max() > 0.01
    names = load_file(folder / "student.safetensors")
    assert all(lora.is_adapter(n) or n.startswith("gates.") for n in names)


def test_adapters_are_a_diffusers_lora(adapted, tiny_wan, tmp_path):
    wanted = sample(WanPipeline.from_pretrained(tiny_wan), adapted[0])
    out = tmp_path / "lora"
    assert export_lora(adapted[0], str(tiny_wan), out) == 1.0
    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe, out), wanted, rtol=1e-3, atol=1e-4)


def test_a_lora_cut_from_a_full_update_says_what_it_holds(whole, tiny_wan, tmp_path):
    with pytest.raises(SettingError, match="--rank 64"):
        export_lora(whole, str(tiny_wan), tmp_path / "lora")
    assert 0.1 < export_lora(whole, str(tiny_wan), tmp_path / "lora", rank=4) < 0.9
    base = tiny.make_transformer().state_dict()
    trained, name = {n: v.clone() for n, v in base.items()}, "blocks.0.attn1.to_q.weight"
    update = torch.randn(32, 2) @ torch.randn(2, 32)
    trained[name] += update
    tensors, held = cut(base, trained, lora.layers_of(tiny.make_transformer(), TARGETS), 2)
    assert held == pytest.approx(1.0, abs=1e-5)
    layer = "transformer.blocks.0.attn1.to_q"
    torch.testing.assert_close(
        tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"], update, rtol=1e-3, atol=1e-4
    )


def test_command_line_answers_in_one_line(tmp_path, capsys):
    assert main(["--ckpt", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("CheckpointError") and "no such checkpoint" in said and "\n" not in said


@pytest.mark.parametrize("command", ["whole", "lora"])
def test_what_stands_in_out_is_never_lost(whole, tiny_wan, tmp_path, command):
    """A folder with anything of the user's in it, a file, a link: refused, as it was. An export: only with overwrite."""
    make = lambda out, **more: export(whole, str(tiny_wan), out, **more) if command == "whole" else export_lora(whole, str(tiny_wan), out, rank=2, **more)  # noqa: E731
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(mine)
    for wrong in (mine, tmp_path / "file", tmp_path / "link", tiny_wan, whole, "", "."):
        for overwrite in (False, True):
            with pytest.raises(FileError, match="--out: got"):
                make(wrong, overwrite=overwrite)
    assert (mine / "thesis.txt").read_text() == "years" and (tmp_path / "file").read_text() == "a file" and (tiny_wan / "model_index.json").is_file()
    out = tmp_path / "out"
    out.mkdir()
    make(out)  # an empty folder is as good as none
    written = (out / "usv" / "config.json").stat().st_mtime_ns
    with pytest.raises(FileError, match="--overwrite replaces it"):
        make(out)
    assert (out / "usv" / "config.json").stat().st_mtime_ns == written
    make(out, overwrite=True)
    assert (out / "usv" / "config.json").stat().st_mtime_ns > written
    (out / "notes.md").write_text("mine")
    with pytest.raises(FileError, match=r"no export of this program \(notes.md\)"):
        make(out, overwrite=True)
    assert (out / "notes.md").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    modes = {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file() and p.name != "notes.md"}
    assert modes == {(out / "notes.md").stat().st_mode & 0o777}, "some files only their owner can read"


@pytest.mark.parametrize("words, said", [(["--rank", "4"], "without --lora"), (["--lora", "--rank", "-3"], "--rank: got -3"), (["--lora", "--rank", "0"], "--rank: got 0"), (["--lora", "--rank", "33"], "--rank: got 33, accepted: 1 to 32")])
def test_ranks_that_cannot_be_are_refused(whole, tiny_wan, tmp_path, capsys, words, said):
    assert main(["--ckpt", str(whole), "--model", str(tiny_wan), "--out", str(tmp_path / "out"), *words]) == 1
    assert said in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "out").exists()
