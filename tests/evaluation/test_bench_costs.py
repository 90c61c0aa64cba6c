"""python -m usv.bench costs: what is solved for, and that its file is what policies and enable read."""

import json
import time

import pytest
import tiny

from usv.config import SettingError
from usv.evaluation.bench import costs
from usv.evaluation.bench.__main__ import size_of
from usv.evaluation.bench.sides import Inputs
from usv.models.forward import SparseTransformer
from usv.sampling.budget import measured_for
from usv.sampling.checkpoint import Student
from usv.sparse.grid import Tile
from usv.sparse.measured import CostsError, costs_of, read_costs
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, SparsityPlan


@pytest.mark.parametrize("layers", [2, 5, 8])
def test_layers_and_switches_are_told_apart(layers):
    """Seconds made from known ones give them back, whatever the number of layers."""
    extra = {rung: 0.01 * i - 0.2 for i, rung in enumerate(RUNGS)}
    extra[Rung()], switch = 0.0, {1: 0.03, 2: 0.02, 3: 0.01}

    def seconds(row):
        total, before = 1.7, 0
        for rung in row:
            total += extra[rung] + (switch[rung.merge] if rung.merge and rung.merge != before else 0)
            before = rung.merge
        return total

    found, switches = costs.solve({key: seconds(row) for key, row in costs.rows_of(layers).items()}, layers)
    assert found == pytest.approx(extra, abs=1e-12) and switches == pytest.approx(switch, abs=1e-12)


def test_a_file_is_of_its_machine_and_model(tmp_path, monkeypatch):
    model = SparseTransformer(tiny.make_transformer(), Tile(*tiny.TILE)).eval()
    inputs = Inputs.random((16, tiny.FRAMES, 8, 8), 1, tiny.TEXT, 64, next(model.parameters()))
    report = costs.bench(model, inputs, (tiny.SIZE, tiny.SIZE, tiny.FRAMES), seconds=0.0, plans=2)
    assert len(report["check"]["rows"]) == 2 and "2 random plans: predicted seconds are off by" in costs.table(report)
    (tmp_path / "costs.json").write_text(json.dumps(report))
    assert report["rounds"] == 1 and len(report["rungs"]) == len(RUNGS) and report["what"]["device"] in costs.table(report)
    plan = SparsityPlan((1000.0,), ((Rung(2, 1), Rung(2, 1)),))
    student = Student(model, plan, {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES})
    measured = measured_for(tmp_path / "costs.json", student, 2)
    assert measured.row_seconds((Rung(),) * 2) == report["dense_seconds"]
    merged = next(r for r in report["rungs"] if (r["density"], r["merged"]) == (0.25, MERGE_LADDER[1]))
    assert measured.plan_cost(plan) * report["dense_seconds"] == pytest.approx(merged["forward_seconds"], rel=1e-6), "what was timed is predicted as it was"
    for change in ({"tile": [1, 2, 2]}, {"height": 64}, {"device": "another"}):
        other = json.loads(json.dumps(report))
        other["what"] |= change
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(CostsError, match=f"measured for {next(iter(change))} = "):
            measured_for(tmp_path / "other.json", student, 2)
    assert read_costs(tmp_path / "costs.json").num_layers == 2


def test_a_prediction_is_held_against_what_was_measured():
    """Seconds made of a layer's own and switches are predicted without error; a row twice as slow as that is off by a half."""
    extra, switch, layers = {rung: -0.001 * i for i, rung in enumerate(RUNGS)}, {1: 0.03, 2: 0.02, 3: 0.01}, 4
    rungs = [{"density": DENSITY_LADDER[r.density], "merged": MERGE_LADDER[r.merge], "extra_seconds": extra[r]} for r in RUNGS]
    record = {"what": {"num_layers": layers}, "dense_seconds": 1.0, "rungs": rungs, "switch_seconds": {str(MERGE_LADDER[m]): s for m, s in switch.items()}}
    rows = costs.random_rows(layers, 20)
    assert len({*rows}) == 20 and {len(row) for row in rows} == {layers} and rows == costs.random_rows(layers, 20)
    exact = [costs_of(record).row_seconds(row) for row in rows]
    assert costs.checked(record, rows, exact)["worst"] == pytest.approx(0, abs=1e-12)
    off = costs.checked(record, rows, [2 * exact[0], *exact[1:]])
    assert off["worst"] == pytest.approx(0.5) and off["median"] == pytest.approx(0, abs=1e-12) and off["rows"][0]["error"] == pytest.approx(-0.5)


def test_seconds_of_the_process_are_those_of_one_thread(monkeypatch):
    monkeypatch.setattr(costs.torch, "get_num_threads", lambda: 2)
    with pytest.raises(SettingError, match="--clock: got cpu on .*accepted: wall; cpu with --threads 1"):
        costs.clock_of("cpu")
    monkeypatch.setattr(costs.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(costs.torch.cuda, "is_available", lambda: False)
    assert costs.clock_of("cpu") is time.process_time


def test_sizes_are_read_or_refused():
    assert size_of("480x832x81") == (480, 832, 81) == size_of("480×832×81")
    for wrong in ("480x832", "axbxc", "0x8x8", ""):
        with pytest.raises(SettingError, match="--size: got"):
            size_of(wrong)
