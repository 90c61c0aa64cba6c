"""Several processes that generate: prompts spread over them, or a video shared by two; always one process's videos."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import tiny
import torch
from processes import started

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from usv.config import AttentionConfig, InferConfig, ModelConfig, SettingError
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, save_student
from usv.sampling.ranks import Crew, join
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

PROMPTS = ["a cat", "a dog", "a horse", "a cow", "a hen"]
PLAN = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))


def work(rank: int, world: int, port: int, config: InferConfig) -> None:
    """One process of infer.py; leaves the frames of each video beside its file."""
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(f"{config.output_dir}.{rank}.log", "w", buffering=1)
    import infer

    infer.write_mp4 = lambda path, video, fps, scale: torch.save((rank, video.clone()), f"{path}.pt")
    infer.run(config)


def run(config: InferConfig, world: int, **changes) -> tuple[dict, dict]:
    """({video's name: (rank that wrote it, frames)}, infer.json) of several processes."""
    config = InferConfig(**{**vars(config), **changes})
    processes = started(world, work, config, context=multiprocessing.get_context("spawn"))
    for process in processes:
        process.join(150)
        if process.is_alive():
            process.kill()
    logs = "\n".join(Path(f"{config.output_dir}.{rank}.log").read_text() for rank in range(world))
    assert [process.exitcode for process in processes] == [0] * world, logs
    folder = Path(config.output_dir)
    return {path.name: torch.load(path) for path in folder.glob("*.pt")}, json.loads((folder / "infer.json").read_text())


@pytest.fixture(scope="module")
def settings(tiny_wan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crew")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    sampling = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT}
    model = SparseTransformer(tiny.make_transformer(seed=1), Tile(*tiny.TILE)).eval().requires_grad_(False)
    save_student(folder / "student", Student(model, PLAN, sampling))
    about = ModelConfig(str(tiny_wan), tiny.SIZE, tiny.SIZE, tiny.FRAMES, tiny.TEXT, list(tiny.TILE), num_inference_steps=2, guidance_scale=1.0)
    return InferConfig(model=about, ckpt=str(folder / "student"), prompts=str(folder / "prompts.txt"), output_dir=str(folder / "one"), batch_size=2)


def by_one(settings: InferConfig) -> tuple[dict, dict]:
    """({video's name: frames}, infer.json) of one process, this one."""
    import infer

    videos, folder = {}, Path(settings.output_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "write_mp4", lambda path, video, fps, scale: videos.update({f"{path.name}.pt": video.clone()}))
        infer.run(settings)
    return videos, json.loads((folder / "infer.json").read_text())


@pytest.fixture(scope="module")
def alone(settings):
    return by_one(settings)


def facts(report: dict, method: str = "student") -> dict:
    return {key: value for key, value in report["methods"][method].items() if "seconds" not in key}


@pytest.mark.parametrize("sharing", [1, 2])
def test_two_processes_make_the_videos_of_one(settings, alone, sharing, tmp_path):
    videos, report = run(settings, 2, sequence_parallel=sharing, output_dir=str(tmp_path / "two"))
    assert videos.keys() == alone[0].keys() and len(videos) == len(PROMPTS)
    for name, (_, frames) in videos.items():
        assert torch.allclose(frames, alone[0][name], rtol=0, atol=1e-4 if sharing == 2 else 1e-6), name
    writers = sorted(rank for rank, _ in videos.values())
    assert writers == ([0, 0, 0, 1, 1] if sharing == 1 else [0] * 5)
    assert [v["prompt"] for v in report["videos"]] == [v["prompt"] for v in alone[1]["videos"]] == PROMPTS
    assert facts(report) == pytest.approx(facts(alone[1])) and report["processes"] == 2
    assert (tmp_path / "two" / "contact_sheet.png").is_file()


def test_a_pattern_is_shared_as_a_student_is(settings, tmp_path):
    pattern = AttentionConfig(pattern="tile_top_k", options={"density": 0.5, "tile": [1, 2, 2], "dense_steps": 0.0, "dense_layers": 0.0})
    settings = InferConfig(**{**vars(settings), "ckpt": None, "attention": pattern, "output_dir": str(tmp_path / "one")})
    one, report = by_one(settings)
    videos, together = run(settings, 2, sequence_parallel=2, output_dir=str(tmp_path / "two"))
    assert videos.keys() == one.keys() and len(videos) == len(PROMPTS)
    assert all(torch.allclose(frames, one[name], rtol=0, atol=1e-4) for name, (_, frames) in videos.items())
    mine, theirs = facts(together, "tile_top_k"), facts(report, "tile_top_k")
    assert mine.pop("attention_calls") == theirs.pop("attention_calls") and together["processes"] == 2
    assert mine == pytest.approx(theirs, abs=2e-4) and theirs["density"] < 0.6


def test_every_video_is_made_once():
    for world, sharing, count, size in ((1, 1, 5, 2), (2, 1, 5, 2), (4, 2, 9, 4), (3, 1, 2, 1)):
        crews = [Crew(rank, world, rank // sharing, world // sharing) for rank in range(world)]
        made = [i for crew in crews[::sharing] for i in crew.mine(count, size)]
        assert sorted(made) == list(range(count))


def test_what_does_not_divide_is_refused(settings, monkeypatch):
    with pytest.raises(SettingError, match=r"sequence_parallel: got 2 on 1 processes, accepted: divisors of 1; torchrun --nproc_per_node 2"):
        join(2)
    import infer

    several = {"model": settings.model, "prompt": "a cat", "sequence_parallel": 2, "output_dir": settings.output_dir}
    for more in ({}, {"ckpt": settings.ckpt, "compare": True}, {"ckpt": settings.ckpt, "attention": AttentionConfig(pattern="svg2")}):
        with pytest.raises(SettingError, match="sequence_parallel: got 2, accepted: 1, or with a student or a pattern alone"):
            infer.run(InferConfig(**several, **more))


class Gathered(Crew):
    """A crew in one process: `gather` gives what the others left."""

    def __init__(self, rank, world, left):
        super().__init__(rank, world, rank, world)
        object.__setattr__(self, "left", left)

    def gather(self, value):
        self.left[self.rank] = value
        return [self.left[i] for i in range(self.world)] if self.first else []


def test_an_evaluation_has_its_clips_in_order_whoever_made_them(settings):
    from usv.evaluation.methods import Dense, generate_all
    from usv.sampling.checkpoint import load_student
    from usv.sampling.generate import load_pipeline

    pipe = load_pipeline(settings.model.path)
    methods, seeds = {"dense": Dense(), "student": load_student(settings.ckpt, pipe.transformer)}, list(range(len(PROMPTS)))
    whole, left = generate_all(pipe, settings.model, methods, PROMPTS, seeds, 2), {}
    for rank in (2, 1, 0):  # the first collects
        spread = generate_all(pipe, settings.model, methods, PROMPTS, seeds, 2, Gathered(rank, 3, left))
        assert (spread is None) == (rank > 0)
    for name, (generation, density, merged) in spread.items():
        assert torch.allclose(generation.videos, whole[name][0].videos, rtol=0, atol=1e-6)
        assert (density, merged, generation.forwards) == pytest.approx((*whole[name][1:], whole[name][0].forwards))
