"""What students are asked in an evaluation, and which of them are held to the dense model's own videos."""

import tiny
import torch

from usv.config import ModelConfig
from usv.evaluation import evaluate, judge
from usv.evaluation.clips import requests
from usv.evaluation.worlds import CameraMotion
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, save_student
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins


def test_every_subject_with_every_motion():
    """120 captions, no two alike; twice as many ask each twice; a few still ask for all subjects and all motions."""
    world, asked = CameraMotion().script, ModelConfig()
    prompts, subjects, motions, labels = requests(asked, 120)
    assert len({*prompts}) == len({*zip(subjects, motions)}) == len(world.SUBJECTS) * len(world.MOTIONS) == 120
    assert prompts == [world.caption(s, m) for s, m in zip(subjects, motions)]
    assert sorted(requests(asked, 240).prompts) == sorted(prompts * 2)
    few = requests(asked, 16)
    assert {*few[1]} == set(range(15)) and {*few[2]} == set(range(8))


def test_only_the_teachers_steps_have_a_dense_twin(tiny_wan, tmp_path, monkeypatch):
    """A student that takes the teacher's steps is held to the dense videos of the same noise; one of fewer steps is not."""
    sparse = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    plan, size = SparsityPlan.uniform(Rung(2, 2), timestep_bins(2, 3.0), 2), {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES}
    samplings = {"same": {"num_inference_steps": 3}, "few": {"num_inference_steps": 2, "student_timesteps": [1000.0, 750.0]}, "fewer": {"num_inference_steps": 2}}
    for name, sampling in samplings.items():
        save_student(tmp_path / name, Student(sparse, plan, {**size, "max_sequence_length": tiny.TEXT, **sampling}))
    asked = []

    def measured(videos, subjects, motions, twins=None, **_):
        asked.append((videos, twins))
        each = {"subject_accuracy": torch.tensor([1.0, 0.0])} | ({} if twins is None else {"psnr": torch.full((2,), float("inf"))})
        return each, torch.zeros(2, 4)

    monkeypatch.setattr(evaluate, "real_clips", lambda model, count: (torch.zeros(1, 3, 3, 8, 8), [0]))
    monkeypatch.setattr(CameraMotion, "teller", lambda *a: None)
    monkeypatch.setattr(evaluate, "features", lambda *a: None)
    monkeypatch.setattr(judge, "measure_videos", measured)
    model = ModelConfig(path=str(tiny_wan), max_sequence_length=tiny.TEXT, tile=list(tiny.TILE), num_inference_steps=3, **size)
    report = evaluate.evaluate(model, {name: str(tmp_path / name) for name in samplings}, clips=2, batch_size=2)
    (dense, none), (same, twins), (few, missing), (_, other) = asked
    assert none is None and missing is None and other is None and torch.equal(twins, dense) and not torch.equal(same, dense) and few.shape == dense.shape
    rows = report["methods"]
    assert rows["same"]["psnr"] is None and "psnr" not in rows["few"], "JSON has no infinity"
    assert rows["few"]["values"]["subject_accuracy"] == [1.0, 0.0] and rows["few"]["subject_accuracy"] == 0.5
    assert rows["few"]["total_seconds"] == sum(rows["few"][f"{stage}_seconds"] for stage in ("text", "denoise", "decode"))


def test_dense_rows_and_lookup(tiny_wan, monkeypatch):
    """The dense model at fewer steps runs so many forwards, with guidance twice; no model at all has a row without seconds."""
    monkeypatch.setattr(evaluate, "real_clips", lambda model, count: (torch.zeros(1, 3, 3, 8, 8), [0]))
    monkeypatch.setattr(evaluate, "asked_clips", lambda model, labels, *a: torch.full((len(labels), 5, 3, 8, 8), 0.25))
    monkeypatch.setattr(CameraMotion, "teller", lambda *a: None)
    monkeypatch.setattr(evaluate, "features", lambda *a: None)
    shown = {}

    def measured(videos, *a, **_):
        shown[len(shown)] = videos
        return {"subject_accuracy": torch.ones(2)}, torch.zeros(2, 4)

    monkeypatch.setattr(judge, "measure_videos", measured)
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES}
    model = ModelConfig(path=str(tiny_wan), max_sequence_length=tiny.TEXT, tile=list(tiny.TILE), num_inference_steps=3, **size)
    dense = {"dense_1": evaluate.Dense(1), "dense_2_unguided": evaluate.Dense(2, 1.0)}
    report = evaluate.evaluate(model, {}, clips=2, batch_size=2, dense=dense, lookup=True)
    rows = report["methods"]
    assert {name: row.get("forwards") for name, row in rows.items()} == {"dense": 6, "dense_1": 2, "dense_2_unguided": 2, "lookup": None}
    assert (shown[3] == 0.25).all() and not torch.equal(shown[0], shown[1])
    assert "–" in judge.table(report) and judge.markdown(report).splitlines()[-1].startswith("| lookup | – | – |")
