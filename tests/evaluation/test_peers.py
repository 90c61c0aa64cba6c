"""usv/evaluation/peers: every method runs and leaves no trace, caches skip what they say, a failure is a row and not the end."""

import json
import multiprocessing
import os
import sys
from contextlib import contextmanager

import pytest
import tiny
import torch
from processes import started

import usv
from usv.config import IMPLS, ModelConfig
from usv.evaluation.peers import __main__ as command
from usv.evaluation.peers import caches, run
from usv.evaluation.peers.caches import Running, Unavailable
from usv.evaluation.peers.methods import FAMILIES, Method, all_methods
from usv.evaluation.peers.run import Result, speed
from usv.evaluation.worlds import CameraMotion
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, save_student
from usv.sampling.generate import generate, load_pipeline
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

STEPS = 8
SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 3, "max_sequence_length": tiny.TEXT}


@pytest.fixture(scope="module")
def model(tiny_wan):
    return ModelConfig(
        path=str(tiny_wan), height=tiny.SIZE, width=tiny.SIZE, num_frames=tiny.FRAMES, max_sequence_length=tiny.TEXT,
        tile=list(tiny.TILE), num_inference_steps=STEPS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    sparse = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval().requires_grad_(False)
    plan = SparsityPlan.uniform(Rung(2, 2), timestep_bins(2, 3.0), 2)
    folder = tmp_path_factory.mktemp("peers") / "run" / "student"
    save_student(folder, Student(sparse, plan, SAMPLING))
    return folder


def one(pipe, model, steps=None):
    return generate(pipe, model, ["a cat, the camera pans left"], [3], 1, steps).videos


def installed(name):
    try:
        caches.version(name)
    except caches.PackageNotFoundError:
        return False
    return True


def test_every_kernel_that_the_settings_name_is_taken(model):
    pipe = load_pipeline(model.path)
    for impl in IMPLS:
        usv.disable(usv.enable(pipe, attention="tile_top_k", impl=impl))


def test_density_is_a_mean_over_clips_whatever_the_batches():
    """The last batch may be smaller."""
    executed = {4: 0.4, 1: 0.8}
    result = Result(clips=[4, 1], seconds=[1.0, 1.0], executed=[(executed[4], 0.1), (executed[1], 0.6)], forwards=2)
    row = speed(result)
    assert row["attention_density"] == pytest.approx(0.48) and row["merged"] == pytest.approx(0.2)


def test_every_method_runs_and_leaves_no_trace(model, student):
    pipe = load_pipeline(model.path)
    before, methods = one(pipe, model), all_methods(model, {"mine": str(student)}, 0.5, 0.25)
    assert {method.family for method in methods} == set(FAMILIES)
    dense = {}
    for method in methods:
        if method.own_pipeline or method.compiles:  # the tiny grid has partial tiles, which FlexAttention refuses
            continue
        with method.enter(pipe) as running:
            made = one(pipe, model, running.steps)
            density, merged = running.executed()
        assert torch.equal(one(pipe, model), before), f"{method.name} leaves the pipeline changed"
        assert 0 < density <= 1 and 0 <= merged < 1 and made.isfinite().all(), method.name
        dense[method.name] = density, merged, torch.equal(made, before)
    assert dense["dense"] == (1.0, 0.0, True)
    same = {name for name, (*_, equal) in dense.items() if equal} - {"dense"}
    # Random weights hardly change over steps: these two never find a reason to skip, or always skip alike.
    assert same <= {"first_block_cache", "mag_cache", "sea_cache"}, f"does nothing: {same}"
    assert dense["merge_0.25"][1] == 0.25 and dense["merge_0.5"][1] == 0.5 and dense["fixed_density_0.25"][:2] == (0.25, 0.0)
    assert dense["mine"][1] == 0.5
    for name in ("pab", "taylor_seer", "taylor_seer_lite", "svg", "svg2", "radial", "sliding_tile", "tile_top_k"):
        assert dense[name][0] < 1, f"{name} computed all attention"


@pytest.mark.parametrize("enter, options", [(caches.first_block_cache, {"threshold": 1e9}), (caches.mag_cache, {"threshold": 1e9, "steps": STEPS, "ratios": lambda: [1.0] * STEPS})])
def test_caches_skip_as_far_as_they_are_allowed(model, enter, options):
    pipe = load_pipeline(model.path)
    with enter(pipe, **options) as running:
        one(pipe, model)
        # first block: one of two layers after the first step; MagCache: nothing in two steps of eight, then three of four
        wanted = (1 + (STEPS - 1) / 2) / STEPS if enter is caches.first_block_cache else None
        found = running.executed()[0]
    assert found == pytest.approx(wanted) if wanted else found < 0.6


def test_each_branch_of_guidance_broadcasts_its_own_attention(model):
    """diffusers alone would compute no attention in any second forward; ours reuses over steps, in both branches."""
    pipe, counts = load_pipeline(model.path), []
    with caches.pyramid_attention_broadcast(pipe, 2):
        pipe.transformer.blocks[0].attn1.to_q.register_forward_hook(lambda *_: counts.__setitem__(-1, counts[-1] + 1))
        pipe.transformer.register_forward_pre_hook(lambda *_: counts.append(0))
        one(pipe, model)
    conditional, unconditional = counts[0::2], counts[1::2]
    assert len(counts) == 2 * STEPS and conditional == unconditional and 0 in conditional


def test_magnitude_ratios_are_those_of_the_residuals(model):
    pipe, residuals = load_pipeline(model.path), {0: [], 1: []}
    first, last, inputs = pipe.transformer.blocks[0], pipe.transformer.blocks[-1], []
    hooks = [first.register_forward_pre_hook(lambda m, args: inputs.append(args[0])), last.register_forward_hook(lambda m, args, out: residuals[(len(inputs) - 1) % 2].append(out - inputs[-1]))]  # fmt: skip
    one(pipe, model)
    for hook in hooks:
        hook.remove()
    ratios = caches.magnitude_ratios(pipe, STEPS, lambda: one(pipe, model))
    norms = [[r.norm(dim=-1) for r in branch] for branch in residuals.values()]
    wanted = [sum(float((branch[i] / branch[i - 1]).mean()) for branch in norms) / 2 for i in range(1, STEPS)]
    assert ratios == pytest.approx([1.0, *wanted], rel=1e-4)


def test_a_missing_package_says_how_to_get_it(model, monkeypatch):
    def absent(name):
        raise caches.PackageNotFoundError(name)

    monkeypatch.setattr(caches, "version", absent)
    with pytest.raises(Unavailable, match="pip install cache-dit"), caches.cache_dit(None, 0.1, 1):
        pass


@pytest.fixture
def small_metrics(monkeypatch):
    """Networks and flow have tests of their own; here the rows count."""
    monkeypatch.setattr(run, "real_clips", lambda model, count: (torch.zeros(1, 3, 3, 8, 8), [0]))
    monkeypatch.setattr("usv.evaluation.worlds.CameraMotion.teller", lambda *a: None)
    monkeypatch.setattr(run, "features", lambda *a: None)

    def quality(videos, subjects, motions, reference, twins=None, prototypes=None, intervals=False):
        assert videos.shape[0] == len(subjects) == len(motions) and (twins is None or twins.shape == videos.shape)
        return {"subject_accuracy": 0.5} | ({} if twins is None else {"psnr": float("inf")})

    monkeypatch.setattr(run, "evaluate_videos", quality)


def test_a_failure_is_a_row_and_the_others_go_on(model, small_metrics):
    entered = []

    @contextmanager
    def breaks(pipe):
        entered.append(1)
        if len(entered) > 2:  # after the trial and one batch
            raise ValueError("no such thing\nand a long story")
        yield Running(2)

    @contextmanager
    def absent(pipe):
        raise Unavailable("not installed: pip install it")
        yield

    methods = all_methods(model, {"gone": "nowhere/student"}, 0.5, 0.25)
    methods = [m for m in methods if m.name in ("dense", "gone")] + [Method("breaks", "cache", "", breaks), Method("absent", "cache", "", absent)]
    report = run.compare(model, methods, 3, 1)
    rows = report["methods"]
    assert list(rows) == ["dense", "gone", "breaks", "absent"]
    assert rows["breaks"]["reason"] == "ValueError: no such thing" and rows["absent"]["reason"] == "not installed: pip install it"
    assert "no such checkpoint" in rows["gone"]["reason"] and "denoise_seconds" not in rows["breaks"]
    assert rows["dense"]["denoise_speedup"] == 1.0 and rows["dense"]["forwards"] == 2 * STEPS and len(entered) == 3


def test_the_command_writes_a_report_that_is_json(model, student, small_metrics, tmp_path, capsys):
    out, videos = tmp_path / "peers.json", tmp_path / "videos"
    words = ["--model", model.path, "--ckpt", f"mine={student}", "--clips", "3", "--batch-size", "2", "--steps", "4", "--only", "merge_0.5",
             "cache_dit", "mine", "--out", str(out), "--videos", str(videos)]  # fmt: skip
    command.main(words, model)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads(out.read_text(), parse_constant=refuse)
    assert report["command"].startswith("python -m usv.peers --model") and report["versions"]["diffusers"] and report["machine"]["threads"]
    rows = report["methods"]
    assert list(rows) == ["dense", "cache_dit", "merge_0.5", "mine"] and rows["merge_0.5"]["psnr"] is None
    assert "psnr" not in rows["mine"] and rows["mine"]["forwards"] == 3 and rows["mine"]["merged"] == 0.5
    assert ("reason" in rows["cache_dit"]) != installed("cache-dit")
    entries = json.loads((videos / "videos.json").read_text())
    assert all((videos / entry["file"]).stat().st_size > 500 for entry in entries)
    assert [entry["methods"] for entry in entries[:3]] == [["dense"], ["merge_0.5"], ["mine"]] or installed("cache-dit")
    assert "merge_0.5" in capsys.readouterr().out


def weighed(videos, subjects, motions, reference, twins=None, **_):
    """Numbers that tell one set of videos, in one order, from any other."""
    order = torch.arange(1.0, len(videos) + 1, dtype=torch.float64)
    assert len(videos) == len(subjects) == len(motions)
    return {"subject_accuracy": float(videos.double().flatten(1).mean(1) @ order)} | ({} if twins is None else {"psnr": float((videos - twins).double().abs().flatten(1).mean(1) @ order)})


def _one_of_two(rank, world, port, words, model, log):
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(f"{log}.{rank}", "w", buffering=1)
    run.real_clips, run.features, run.evaluate_videos = lambda *a: (None, None), lambda *a: None, weighed
    CameraMotion.teller = lambda *a: None
    if rank and "fails" in words:
        words = [word for word in words if word != "fails"]
        run.generate, own = (lambda pipe, model, prompts, seeds, *rest: 1 / 0 if seeds[0] == 2 and hasattr(pipe, "_usv") else own(pipe, model, prompts, seeds, *rest)), run.generate
    made = command.main([word for word in words if word != "fails"], model)
    assert (made is None) == (rank > 0)


@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_have_the_rows_of_one(model, student, small_metrics, monkeypatch, tmp_path, fails):
    monkeypatch.setattr(run, "evaluate_videos", weighed)
    words = ["--model", model.path, "--ckpt", f"mine={student}", "--clips", "5", "--batch-size", "2", "--steps", "4", "--only", "merge_0.5", "first_block_cache", "mine"]
    alone, out = command.main(words, model)["methods"], tmp_path / "two.json"
    arguments = ([*words, "--out", str(out), *["fails"] * fails], model, tmp_path / "log")
    processes = started(2, _one_of_two, *arguments, context=multiprocessing.get_context("spawn"))
    for process in processes:
        process.join(150)
    assert [process.exitcode for process in processes] == [0, 0], [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    report = json.loads(out.read_text())
    assert report["processes"] == 2 and list(report["methods"]) == list(alone)
    for name, row in report["methods"].items():
        if fails and name == "mine":  # on one process, in its batch
            assert row["reason"] == "ZeroDivisionError: division by zero" and "denoise_seconds" not in row
            continue
        assert row.keys() == alone[name].keys() and row["denoise_seconds"] > 0, row
        for key, value in row.items():
            if "seconds" not in key and key != "denoise_speedup":
                assert value == (pytest.approx(alone[name][key], rel=1e-6) if isinstance(value, float) else alone[name][key]), (name, key)


@pytest.mark.parametrize("words, accepted", [(["--only", "nothing"], "accepted: dense"), (["--clips", "0"], "at least 1"), (["--density", "1.5"], "a fraction"), (["--ckpt", "a=x", "--ckpt", "a=y"], "got the name 'a' twice"), (["--ckpt", "pab=x"], "a name of its own")])  # fmt: skip
def test_wrong_words_are_refused(words, accepted, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(words)
    assert accepted in str(error.value) + capsys.readouterr().err
