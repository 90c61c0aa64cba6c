"""A user's own prompts and shards: judged without labels, beside real clips, with intervals paired by prompt; and shown by the report."""

import json
import os
import sys

import pytest
import tiny
import torch

from usv.evaluation import evaluate, judge, on_ray, own
from usv.evaluation.report.inputs import gather
from usv.evaluation.report.page import page, usable
from usv.metrics import frechet
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, save_student
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins


@pytest.fixture(scope="module")
def mine(tmp_path_factory, tiny_wan):
    """Shards of 84 clips, 17 held out, and a student of the teacher's steps."""
    folder = tmp_path_factory.mktemp("own")
    tiny.save_shards(folder / "shards", tiny_wan, clips=84)
    sparse = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "max_sequence_length": tiny.TEXT, "num_inference_steps": 2}
    save_student(folder / "student", Student(sparse, SparsityPlan.uniform(Rung(2, 2), timestep_bins(2, 3.0), 2), size))
    (folder / "prompts.txt").write_text("# mine\na dog runs\n\nsnow falls\na boat\n")
    return folder


@pytest.fixture
def coarse(monkeypatch):
    """Fréchet distances in 8 dimensions: an eighth of the time, the same arithmetic."""
    frechet._projections.cache_clear()
    monkeypatch.setattr(frechet, "PROJECTED_DIM", 8)
    monkeypatch.setattr(frechet, "NUM_PROJECTIONS", 1)
    yield
    frechet._projections.cache_clear()


def command(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    evaluate.main()


def test_from_shards_to_the_report(mine, tiny_wan, coarse, monkeypatch, capsys):
    """The command's table, JSON and page hold what needs no label, the floor, and paired differences; labels are nowhere."""
    out = mine / "result.json"
    command(monkeypatch, ["--model", tiny_wan, "--ckpt", f"mine={mine / 'student'}", "--shards", mine / "shards", "--prompts", mine / "prompts.txt",
                          "--clips", 33, "--steps", 2, "--batch-size", 11, "--out", out])  # fmt: skip
    said, report = capsys.readouterr().out, json.loads(out.read_text())
    rows = report["methods"]
    assert report["clips"] == 33 and report["real"] == {"shards": str(mine / "shards"), "split": "val", "clips": 17, "floor_clips": 33}
    assert not [key for row in rows.values() for key in row if "subject_accuracy" in key or "motion_accuracy" in key or key == "equal_quality"]
    for key in ("subject_consistency", "flicker", "flow_warp_error", "frechet_distance"):
        for row in rows.values():
            assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
    # real clips are nearer to real clips than a random network's videos
    assert report["floor"]["frechet_distance"] < rows["dense"]["frechet_distance"] / 2
    assert {"psnr", "ssim"} <= set(rows["mine"]) and "psnr" not in rows["dense"]
    paired = rows["mine"]["to_dense"]
    assert set(paired) == {*judge.UNLABELLED, "frechet_ratio"} and "to_dense" not in rows["dense"]
    each = [torch.tensor(rows[name]["values"]["flicker"]) for name in ("mine", "dense")]
    assert paired["flicker"][0] == pytest.approx(float((each[0] - each[1]).mean()), abs=1e-4) and paired["flicker"][1] <= paired["flicker"][2]
    assert "consistency" in said and "as dense" not in said and "mine against dense, same prompts and seeds: " in said
    assert "33 real clips of train against 17 of val: Fréchet " in said
    inputs = usable(gather([out], {}, [], []))
    text = page(inputs, "report", "abc")
    assert not inputs.problems and "Your own clips: 33 clips" in text and "33 real clips of train against 17 of val" in text and "warp error" in text
    assert "subject accuracy" not in text


def test_captions_of_the_held_out_clips_are_the_prompts(mine, tiny_wan):
    """Without a file they are asked once each, in turn where more clips are wanted; sizes come from the shards, then from the student."""
    asked = own.ask(None, str(mine / "shards"), "val", None, str(tiny_wan))
    captions = [own.opened(str(mine / "shards"), "val", str(tiny_wan)).sample(i)[2]["caption"] for i in range(17)]
    assert asked.prompts == list(dict.fromkeys(captions))
    assert own.ask(None, str(mine / "shards"), "val", 50, str(tiny_wan)).prompts[len(asked.prompts)] == asked.prompts[0]
    assert own.ask(mine / "prompts.txt", None, "val", None, "x").prompts == ["a dog runs", "snow falls", "a boat"]
    for shards, students in ((str(mine / "shards"), {}), (None, {"mine": f"{mine / 'student'}@1000"})):
        model = own.sized(own.model_of(str(tiny_wan)), shards, students)
        assert (model.height, model.width, model.num_frames, model.max_sequence_length) == (tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT)
    wan = own.model_of("wan_1_3b")
    assert (wan.path, wan.flow_shift, wan.width) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 8.0, 832)
    assert own.spread(10, 4) == [0, 3, 6, 9] and own.spread(3, 4) == [0, 1, 2]


def test_few_clips_have_no_frechet_distance(mine, tiny_wan):
    """It is said why, in the record and in the table; so it is without shards."""
    few = own.Own(["a dog"] * 3, str(mine / "shards"))
    reference, record = own.real_features(None, few, own.ModelConfig(path=str(tiny_wan)))
    assert reference is None and record["reason"] == "17 clips of split val and 3 videos: a Fréchet distance takes 16 of each"
    assert judge.floor_of({"real": record})[0].startswith("no Fréchet distance: 17 clips")
    assert own.real_features(None, own.Own(["a dog"], None), own.ModelConfig())[1]["reason"].startswith("no --shards")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--prompts", "{}/none.txt"], "SettingError: --prompts {}/none.txt: no such file; give a text file with one prompt a line"),
        (["--shards", "{}/none"], "DataError: {}/none: no such folder or shard"),
        (["--shards", "{}/shards", "--split", "test"], "DataError: {}/shards has no split 'test', only ['train', 'val']"),
        (["--shards", "{}/shards", "--lookup"], "SettingError: --lookup: got it with --shards, accepted: with CameraMotion's prompts alone"),
        (["--split", "train"], "SettingError: --split: got train without --shards FOLDER"),
        (["--shards", "{}/shards", "--model", "data/wan-mini"], "DataError: {}/shards was written for another model"),
    ],
)
def test_wrong_input_is_one_line(mine, tiny_wan, monkeypatch, words, said):
    words = [word.format(mine) for word in words]
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, ["--model", tiny_wan, *words])
    assert str(caught.value.code).startswith(said.format(mine)) and "\n" not in caught.value.code


@pytest.mark.timeout(900)
def test_workers_of_ray_give_the_rows_of_one_process(mine, tiny_wan, monkeypatch):
    """Two actors, each with half of the clips; what they measure of the videos is what one process measures. One that dies ends the run in a line."""
    pytest.importorskip("ray", reason="the package ray is optional")
    asked = ["--model", tiny_wan, "--ckpt", f"mine={mine / 'student'}", "--prompts", mine / "prompts.txt", "--clips", 4, "--steps", 2, "--batch-size", 2, "--out"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command(monkeypatch, [*asked, mine / "one.json"])
    command(monkeypatch, [*asked, mine / "two.json", "--engine", "ray", "--workers", 2])
    one, two = (json.loads((mine / name).read_text())["methods"] for name in ("one.json", "two.json"))
    for name, row in one.items():
        for key in ("forwards", "subject_consistency", "flicker", "flow_warp_error"):
            assert row[key] == pytest.approx(two[name][key], rel=1e-6), (name, key)
    original = on_ray.pickle.dumps
    monkeypatch.setattr(on_ray.pickle, "dumps", lambda arguments: original((Ends(),)))
    with pytest.raises(SystemExit, match="RuntimeError: --engine ray: a worker died"):
        command(monkeypatch, [*asked, mine / "none.json", "--engine", "ray", "--workers", 2])


class Ends:
    """Arguments that end the process they are unpacked in."""

    def __reduce__(self):
        return os._exit, (1,)


def test_options_of_ray_alone_are_refused_elsewhere(mine, tiny_wan, monkeypatch):
    with pytest.raises(SystemExit, match="SettingError: --workers: got 2 with --engine local, accepted: with --engine ray"):
        command(monkeypatch, ["--model", tiny_wan, "--ckpt", mine / "student", "--workers", 2])
