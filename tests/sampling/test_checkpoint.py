"""usv/sampling/checkpoint.py: exact round trips, clear refusals, and never a half-written or lost folder."""

import json
import os
import random
import shutil

import pytest
import tiny
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from strange import altered

import usv
from usv.models.forward import SparseTransformer
from usv.sampling import checkpoint
from usv.sampling.checkpoint import CheckpointError, Student, load_student, read_config, save_student
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT}
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))


@pytest.fixture(scope="module")
def pipe(tiny_wan):
    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def student():
    """Weights unlike the base's, gates unlike zero."""
    model = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.normal_(gate.weight, std=0.2)
    return Student(model, PLAN, SAMPLING, {"steps": 3, "policy": "static"})


@pytest.fixture
def folder(tmp_path, student):
    save_student(tmp_path / "student", student)
    return tmp_path / "student"


def forward(model, rungs=PLAN.rungs[0]):
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 5, 8, 8, generator=g), torch.randn(2, 4, 64, generator=g)
    with torch.no_grad():
        return model(x, torch.tensor([400.0, 400.0]), text, rungs)[0]


def test_round_trip_is_exact(folder, student, pipe):
    back = load_student(folder, pipe.transformer)
    assert (back.plan, back.sampling, back.training, back.model.tile) == (PLAN, SAMPLING, student.training, Tile(*tiny.TILE))
    ours, theirs = student.model.state_dict(), back.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(forward(back.model), forward(student.model))
    assert not any(p.requires_grad for p in back.model.parameters()) and not back.model.training


def test_round_trip_through_enable_is_exact(folder, student, pipe):
    """A pipeline that loads the folder generates the bits that the student in memory does."""
    text = torch.randn(1, tiny.TEXT, 64, generator=torch.Generator().manual_seed(1))

    def video(source):
        usv.enable(pipe, source)
        try:
            return pipe(prompt_embeds=text, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
        finally:
            usv.disable(pipe)

    assert torch.equal(video(folder), video(student))


def test_saving_what_was_loaded_gives_the_same_files(folder, pipe, tmp_path):
    save_student(tmp_path / "again", load_student(folder, pipe.transformer))
    for name in ("config.json", "student.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "student.safetensors"]


def test_a_bf16_model_keeps_what_diffusers_keeps_in_fp32(folder, tiny_wan):
    """RoPE tables, norms and modulation in bf16 would cost quality without a word."""
    base = WanPipeline.from_pretrained(tiny_wan, dtype=torch.bfloat16).transformer
    model = load_student(folder, base).model
    wanted = {name: p.dtype for name, p in base.named_parameters()}
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    assert {name: p.dtype for name, p in model.transformer.named_parameters()} == wanted
    assert model.transformer.rope.freqs_cos.dtype in (torch.float32, torch.float64)
    assert {p.dtype for p in model.gates.parameters()} == {torch.bfloat16}


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(path, base, *words):
    with pytest.raises(CheckpointError) as caught:
        load_student(path, base)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "Traceback" not in message and message.count("\n") <= 3
    return message


def edit(folder, change):
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))


def test_missing(tmp_path, pipe):
    refused(tmp_path / "nothing", pipe.transformer, "nothing", "no such checkpoint", "train.py")


def test_folder_above_names_what_it_contains(folder, pipe):
    refused(folder.parent, pipe.transformer, "not a student folder", "it contains student")


def test_foreign_folder(tiny_wan, pipe):
    refused(tiny_wan / "transformer", pipe.transformer, "WanTransformer3DModel", "expected 'usv-student-1'")


@pytest.mark.parametrize("text", ["", '{"format": "usv-stu', "[]", "3", "{}", '{"format": "usv-student-9"}'])
def test_config_that_is_no_config(folder, pipe, text):
    (folder / "config.json").write_text(text)
    refused(folder, pipe.transformer, str(folder))


@pytest.mark.parametrize("key", ["transformer", "tile", "plan", "sampling", "training"])
def test_config_that_lacks_a_part(folder, pipe, key):
    edit(folder, lambda record: record.pop(key))
    refused(folder, pipe.transformer, "lacks", key)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["plan"]["rungs"][0].__setitem__(0, [9, 0]),
        lambda r: r["plan"]["rungs"].pop(),
        lambda r: r["plan"].pop("edges"),
        lambda r: [row.pop() for row in r["plan"]["rungs"]],
        lambda r: r.update(tile=[1, 2]),
    ],
)
def test_plan_or_tile_that_cannot_run(folder, pipe, change):
    edit(folder, change)
    refused(folder, pipe.transformer, "config.json", "use another checkpoint")


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_truncated_weights(folder, pipe, size):
    weights = folder / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused(folder, pipe.transformer, "student.safetensors", "damaged or incomplete")


def test_weights_gone(folder, pipe):
    (folder / "student.safetensors").unlink()
    refused(folder, pipe.transformer, "student.safetensors", "damaged or incomplete")


def test_other_model(folder):
    message = refused(folder, tiny.make_transformer(layers=3), "made for another model", "num_layers: 2 against 3")
    assert "num_attention_heads" not in message  # only what differs


@pytest.mark.parametrize("other", [{"height": 48}, {"width": 16}, {"num_frames": 8}, {"num_frames": 9}], ids=str)
def test_other_grid(folder, pipe, other, caplog):
    """Another size than trained runs, partial tiles included, and one line says so; the trained one runs without."""
    usv.enable(pipe, folder)
    try:
        asked = {"height": 32, "width": 32, "num_frames": 5, **other}
        out = pipe("a cat", output_type="latent", **other).frames
        assert out.shape[-3:] == (asked["num_frames"], asked["height"] // 4, asked["width"] // 4) and out.isfinite().all()
        assert sum("trained at height, width, num_frames = (32, 32, 5) and runs at" in r.message for r in caplog.records) == 1
        caplog.clear()
        pipe("a cat", output_type="latent")
        assert not [r for r in caplog.records if "trained at" in r.message]
    finally:
        usv.disable(pipe)


# ---- never half-written ----------------------------------------------------------------------------------------------


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("failing", ["save_file", "json.dumps"])
def test_failure_while_writing_leaves_the_old_one(folder, student, monkeypatch, failing):
    before = snapshot(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.json if failing == "json.dumps" else checkpoint, failing.split(".")[-1], full)
    with pytest.raises(OSError, match="No space left"):
        save_student(folder, student)
    assert snapshot(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing lies about


@pytest.mark.parametrize("failing", [1, 2])
def test_failure_of_a_rename_leaves_the_old_one(folder, student, monkeypatch, failing):
    """Also of the second one, when the old folder has already stepped aside."""
    before, calls, replace = snapshot(folder), [], os.replace

    def flaky(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(OSError, match="Input/output"):
        save_student(folder, student)
    assert snapshot(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_kill_between_the_renames_loses_nothing(folder, student, pipe):
    """What a kill at the worst moment leaves: the old folder aside, the new one not yet in place."""
    before = snapshot(folder)
    os.replace(folder, folder.with_name(".student.old"))
    shutil.copytree(folder.with_name(".student.old"), folder.with_name(".student.new"))
    assert load_student(folder, pipe.transformer).plan == PLAN
    assert snapshot(folder) == before
    os.replace(folder, folder.with_name(".student.old"))
    save_student(folder, student)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_the_old_student_can_be_read_while_the_new_one_is_written(folder, student, monkeypatch, pipe):
    seen, save_file = [], checkpoint.save_file

    def reading(*args):
        seen.append(read_config(folder)["training"]["steps"])
        save_file(*args)

    monkeypatch.setattr(checkpoint, "save_file", reading)
    save_student(folder, Student(student.model, PLAN, SAMPLING, {"steps": 4}))
    assert seen == [3] and read_config(folder)["training"]["steps"] == 4


def test_students_are_named_after_their_folders():
    entries = ["data/students/usv_mini", "outputs/few/student@1000,750", "other=outputs/few/student", "a=b=c/student"]
    assert checkpoint.named(entries) == {
        "usv_mini": "data/students/usv_mini", "few": "outputs/few/student@1000,750", "other": "outputs/few/student", "a=b": "c/student",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'few' twice"):
        checkpoint.named(["outputs/few/student", "few=x"])


# ---- damaged by accident or by strangers -----------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_neither_saved_nor_read(folder, student, pipe):
    before = snapshot(folder)
    name, weight = next(iter(student.model.named_parameters()))
    value = weight.data.flatten()[0].item()
    weight.data.view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match=f"not saved, {name} is not finite in 1 of .* still stands"):
        save_student(folder, student)
    assert snapshot(folder) == before
    weight.data.view(-1)[0] = value
    tensors = load_file(folder / "student.safetensors")
    tensors[name].view(-1)[0] = float("inf")
    save_file(tensors, folder / "student.safetensors")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if k != "checksum"}))  # as before there were any
    refused(folder, pipe.transformer, "student.safetensors", "is not finite in 1 of")


def test_a_flipped_bit_is_seen(folder, pipe):
    file, draw = folder / "student.safetensors", random.Random(0)
    whole = file.read_bytes()
    for _ in range(6):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        refused(folder, pipe.transformer, "student.safetensors", "damaged or incomplete")


def test_strange_configs_end_in_a_line(folder, pipe):
    """Any value anywhere: refused in one line, or of no consequence; and no number in it asks for memory."""
    record, problems = json.loads((folder / "config.json").read_text()), 0
    for said, value in altered(record, 150):
        (folder / "config.json").write_text(json.dumps(value))
        try:
            read_config(folder)
        except CheckpointError as error:
            problems += 1
            assert "\n" not in str(error), said
    assert problems > 60
    for tile in ([1000, 1000, 1000], [4097, 1, 1], [0, 4, 4], [3, 4], [3.0, 4, 4], "344"):
        (folder / "config.json").write_text(json.dumps(record | {"tile": tile}))
        refused(folder, pipe.transformer, "no usable tile")
    for edges in ([500.0, 500.0], [float("nan"), 1000.0], [5.0, 10.0], [-1.0, 1000.0]):
        (folder / "config.json").write_text(json.dumps(record | {"plan": {**record["plan"], "edges": edges}}))
        refused(folder, pipe.transformer, "no usable plan")
    for name, value in (("num_inference_steps", "<b>"), ("num_inference_steps", 10**9), ("flow_shift", float("nan")), ("student_timesteps", [1000, 1000])):
        (folder / "config.json").write_text(json.dumps(record | {"sampling": {**record["sampling"], name: value}}))
        refused(folder, pipe.transformer, f"sampling.{name}: got")
