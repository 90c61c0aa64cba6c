"""usv/sampling/fingerprint.py: another model of the same shapes is refused in a line, a changed copy is named, an unchanged one runs silently."""

import copy
import importlib.util
import json
import logging

import pytest
import tiny
import torch

from usv.models import lora
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, load_student, read_config, save_student
from usv.sampling.comfyui import write_weights
from usv.sampling.fingerprint import ANOTHER, distance, fingerprint
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT}
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))
KINDS = ("whole", "adapters", "router", "file")


@pytest.fixture(scope="module")
def base():
    return tiny.make_transformer(seed=0).requires_grad_(False)


@pytest.fixture(params=KINDS)
def path(request, base, tmp_path):
    """A student of each kind, as training writes it."""
    kind, out = request.param, tmp_path / "student"
    own = copy.deepcopy(base)
    if kind == "adapters":
        settings = {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}
        model = lora.adapt(copy.deepcopy(base), Tile(*tiny.TILE), **settings)
        adapters = {name: value for name, value in model.state_dict().items() if lora.is_adapter(name)}
        student = Student(SparseTransformer(own, Tile(*tiny.TILE)), PLAN, SAMPLING, {}, {}, settings, adapters)
    else:
        student = Student(SparseTransformer(own, Tile(*tiny.TILE)), PLAN, SAMPLING, router=kind == "router")
    student.base = fingerprint(base)
    if kind == "file":
        write_weights(student, base, out := tmp_path / "student.safetensors")
    else:
        save_student(out, student)
    return out


def said(path, base, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "usv"):
        student = load_student(path, base)
    return student, [record.getMessage() for record in caplog.records if record.name == "usv"]


def test_another_model_of_the_same_shapes_is_refused_in_a_line(path):
    with pytest.raises(CheckpointError, match="got another model of the same shapes.*accepted: the model that the student was trained from") as error:
        load_student(path, tiny.make_transformer(seed=1))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_its_own_base_is_taken_silently_in_any_storage(path, base, caplog):
    for treat in (lambda b: b, lambda b: b.to(torch.bfloat16), lambda b: b.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)):
        changed = copy.deepcopy(base)
        treat(changed)
        student, heard = said(path, changed, caplog)
        assert not heard and student.base == fingerprint(base)


def test_a_changed_copy_is_taken_and_named(path, base, caplog):
    changed = copy.deepcopy(base)
    for p in changed.parameters():
        p.mul_(1.03)
    _, heard = said(path, changed, caplog)
    assert len(heard) == 1 and "differs by 3% from the one that the student was trained from" in heard[0]


@pytest.mark.parametrize("path", ["router"], indirect=True)
def test_quantised_copies(path, base, caplog):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for seed in (0, 1):
        changed = tiny.make_transformer(seed=seed).requires_grad_(False)
        quantize_(changed, Int8WeightOnlyConfig())
        assert (distance(fingerprint(base), changed) < 0.05) == (seed == 0)
        if seed:
            with pytest.raises(CheckpointError, match="got another model of the same shapes"):
                load_student(path, changed)
        else:
            assert said(path, changed, caplog)[1] == []


@pytest.mark.parametrize("path", ["whole", "router"], indirect=True)
def test_a_folder_from_before_loads_on_any_model_of_its_shapes(path, caplog):
    record = read_config(path)
    del record["base"]
    (path / "config.json").write_text(json.dumps(record))
    student, heard = said(path, tiny.make_transformer(seed=1), caplog)
    assert student.base is None and not heard


@pytest.mark.parametrize("path", ["whole"], indirect=True)
def test_a_damaged_base_ends_in_a_line(path, base):
    record = read_config(path)
    for wrong in ([1.0], {"blocks.0.attn1.to_q.weight": "x"}, {"blocks.0.attn1.to_q.weight": [None]}):
        (path / "config.json").write_text(json.dumps(record | {"base": wrong}))
        with pytest.raises(CheckpointError, match="base: expected lists of numbers by name"):
            load_student(path, base)


def test_the_distance_tells_models_from_copies():
    """Over seeds: what is accepted lies well below the bound, what is refused well above."""
    base = tiny.make_transformer(seed=0).requires_grad_(False)
    wanted, cast = fingerprint(base), copy.deepcopy(base)
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert distance(wanted, base) == 0 and 0 < distance(wanted, cast) < ANOTHER / 4
    assert all(distance(wanted, tiny.make_transformer(seed=seed)) > 2 * ANOTHER for seed in range(1, 4))
