"""infer.py: one file a prompt, seed and student, each on the disk as soon as it is made; prompts that are cut are named."""

import json
import sys
from pathlib import Path

import dials
import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import infer
from usv.config import InferConfig, ModelConfig, SettingError
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, save_student
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

PROMPTS = ["一只猫", "一只狗", "кот бежит", "кот спит", "A cat!", "a cat?", "x" * 100 + " one", "x" * 100 + " two", "…", "🙂" * 80]
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))


@pytest.fixture
def ask(tiny_wan, tmp_path):
    """infer.run on the tiny model with PROMPTS."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    model = ModelConfig(str(tiny_wan), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE), num_inference_steps=1, guidance_scale=1.0)
    return lambda **more: infer.run(InferConfig(model=model, **{"prompts": str(tmp_path / "prompts.txt"), "output_dir": str(tmp_path / "videos"), "batch_size": 5, **more}))


def student_at(folder, seed):
    sampling = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 1, "max_sequence_length": tiny.TEXT}
    model = SparseTransformer(tiny.make_transformer(seed=seed), Tile(*tiny.TILE)).eval().requires_grad_(False)
    save_student(folder, Student(model, PLAN, sampling))
    return str(folder)


def test_one_file_a_prompt_seed_and_student(ask, tmp_path):
    runs = [ask(), ask(ckpt=student_at(tmp_path / "a", 1), prompts=None, prompt="A cat!"), ask(ckpt=student_at(tmp_path / "b", 2), prompts=None, prompt="A cat!")]
    runs.append(ask(ckpt=student_at(tmp_path / "b", 3), prompts=None, prompt="A cat!", seeds=2))  # trained anew in the same folder
    paths = [Path(video["path"]) for report in runs for video in report["videos"]]
    assert len(paths) == len(set(paths)) == len(PROMPTS) + 4 and all(p.is_file() and len(p.name.encode()) < 200 for p in paths)
    assert len({p.name.lower() for p in paths}) == len(paths), "also where capitals are one with small letters"
    assert paths[0].name.startswith("一只猫-") and paths[2].name.startswith("кот-бежит-") and paths[8].name.startswith("video-")
    reports = [json.loads(p.read_text())["ckpt"] for p in (tmp_path / "videos").glob("infer*.json")]
    assert len(reports) == len(set(map(str, reports))) + 1 == 4, "each command's own report is kept"
    assert ask(ckpt=str(tmp_path / "b"), prompts=None, prompt="A cat!", seeds=2)["videos"] == runs[-1]["videos"], "the same command, the same files"


def test_each_budget_of_a_dial_has_its_files(ask, tmp_path):
    dials.save_dial(tmp_path)
    runs = [ask(ckpt=str(tmp_path / "dial"), budget=budget, prompts=None, prompt="A cat!") for budget in (0.6, 0.9, 0.6)]
    first, second, again = (Path(run["videos"][0]["path"]) for run in runs)
    assert first == again != second and first.is_file() and second.is_file()
    reports = [json.loads(p.read_text()) for p in (tmp_path / "videos").glob("infer*.json")]
    assert {report["budget"] for report in reports} == {0.6, 0.9}


def test_what_is_made_is_on_the_disk_and_not_in_memory(ask, tmp_path, monkeypatch):
    held, add = [], infer.Output.add

    def stopping(self, name, batch, executed):
        add(self, name, batch, executed)
        held.append(sum(frames.numel() for frames in self.frames[name].values()))
        if len(held) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(infer.Output, "add", stopping)
    monkeypatch.setattr(infer, "SHEET_ROWS", 2)
    with pytest.raises(KeyboardInterrupt):
        ask(batch_size=2)
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 8 and held[1:] == held[:1] * 3, "only the contact sheet's frames are kept"
    report = json.loads((tmp_path / "videos" / "infer.json").read_text())
    assert len(report["videos"]) == report["methods"]["dense"]["videos"] == 8 and not list((tmp_path / "videos").glob(".*"))


def test_a_prompt_that_is_cut_is_named_with_its_end(ask, capsys):
    ask(prompts=None, prompt=" ".join(["a", "cat"] * 20))
    said = [line for line in capsys.readouterr().err.splitlines() if "prompt cut" in line]
    assert len(said) == 1 and "model.max_sequence_length is 16" in said[0] and "“a cat a cat" in said[0]
    ask(prompts=None, prompt="a cat")
    assert "prompt cut" not in capsys.readouterr().err


def test_numbers_are_refused_by_name(ask):
    for name, value in (("seeds", 0), ("fps", 10**9), ("batch_size", -1), ("num_inference_steps", 10**6), ("output_dir", "")):
        with pytest.raises(SettingError, match=f"^{name}: got {value}, accepted"):
            ask(**{name: value})


def test_a_sheet_of_large_videos_is_small():
    from usv.video import thumbnails

    assert thumbnails(torch.rand(7, 3, 48, 832)).shape == (5, 3, 24, 416) and thumbnails(torch.rand(2, 3, 8, 8)).dtype == torch.uint8


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offload_and_tiling_make_the_same_videos(ask, tmp_path, offload):
    """Dense, then a student put in with the offload on; frames of 32 pixels are one tile."""
    ckpt, videos = student_at(tmp_path / "a", 1), []
    for more in ({}, {"offload": offload, "vae_tiling": True}):
        report = ask(ckpt=ckpt, compare=True, prompts=None, prompt="A cat!", output_dir=str(tmp_path / str(len(videos))), **more)
        videos.append([Path(video["path"]).read_bytes() for video in report["videos"]])
    assert len(videos[0]) == 2 and videos[0] == videos[1]
    with pytest.raises(SettingError, match="offload: got disk, accepted: none | model | group"):
        ask(offload="disk")


def test_a_dry_run_says_the_memory(tmp_path, capsys):
    """Its order: group below model below none, tiles below whole frames; a student beside the pipeline's own transformer."""
    big = {"output_dir": str(tmp_path / "videos"), "dry_run": True, "batch_size": 1, "dry_run_gpu": "rtx4090"}
    model = ModelConfig("Wan-AI/none", 480, 832, 81)
    for name, value in {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}.items():
        setattr(model.architecture, name, value)
    found = {offload: infer.run(InferConfig(model=model, offload=offload, **big)) for offload in ("none", "model", "group")}
    assert found["none"]["bytes"] > found["model"]["bytes"] > found["group"]["bytes"] and found["model"]["fits"]
    assert abs(found["none"]["stages"]["text"]["weights"] / 2**30 - (2 * 5.68e9 + 2 * 1.42e9 + 4 * 127e6) / 2**30) < 1, "UMT5-XXL, 1.3B, the VAE"
    tiled = infer.run(InferConfig(model=model, vae_tiling=True, **big))
    assert tiled["stages"]["decoding"]["work"] < 0.5 * found["none"]["stages"]["decoding"]["work"]
    ours = infer.run(InferConfig(model=model, ckpt=student_at(tmp_path / "a", 1), **big))["stages"]["denoising"]["weights"]
    assert ours - found["none"]["stages"]["denoising"]["weights"] == found["model"]["stages"]["denoising"]["weights"], "beside the pipeline's own transformer"
    said = capsys.readouterr().out
    assert "peak" in said and "an estimate" in said and not (tmp_path / "videos").exists()
