"""usv/evaluation/bench: what is reported is what ran; clocks measure without leaving a trace; every subcommand writes its JSON."""

import json
import subprocess
import sys
import time

import pytest
import tiny
import torch

from usv.config import ModelConfig
from usv.evaluation.bench import block, denoise, measure, memory, training
from usv.evaluation.bench.__main__ import main
from usv.evaluation.bench.sides import Inputs, Side, executed, layout_of, uniform_sides
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import Student, save_student
from usv.sparse.cost import ModelShape, rung_flops
from usv.sparse.grid import Tile, TokenGrid
from usv.sparse.plan import LayerPlan, Rung, SparsityPlan

SHAPE = (16, tiny.FRAMES, 8, 8)  # tokens (5, 4, 4), tiles (3, 2, 2): 8 blocks, of 12 tokens and of 8
ARGUMENTS = ["--height", "32", "--width", "32", "--num-frames", "5", "--tile", "3", "2", "2"]


@pytest.fixture
def model():
    return SparseTransformer(tiny.make_transformer(), Tile(*tiny.TILE)).eval()


@pytest.fixture
def inputs(model):
    return Inputs.random(SHAPE, 2, tiny.TEXT, 64, next(model.parameters()))


def test_quantiles_interpolate():
    assert measure.quantiles([3.0]) == {"p10": 3.0, "p50": 3.0, "p90": 3.0, "samples": 1}
    got = measure.quantiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert got == pytest.approx({"p10": 1.4, "p50": 3.0, "p90": 4.6, "samples": 5})


def test_repetitions_alternate_and_warm_up_does_not_count():
    calls = []
    samples = measure.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warmup=1)
    assert calls == list("ab" * 3) and [len(samples[name]) for name in "ab"] == [2, 2]


def test_clock_counts_the_outermost_part_of_a_group():
    clock = measure.Clock()
    inner = clock.wrap("inner", lambda: time.sleep(0.02))
    outer = clock.wrap("outer", inner)
    whole = clock.wrap("block", lambda: (outer(), inner()), "block")
    whole()
    assert clock.seconds["outer"] >= 0.02 and 0.02 <= clock.seconds["inner"] < 0.039
    assert clock.seconds["block"] >= clock.seconds["outer"] + clock.seconds["inner"]
    failing = clock.wrap("failing", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing()
    before = clock.seconds["inner"]
    inner()
    assert clock.seconds["inner"] > before  # an error leaves no part running


def test_clocked_forward_is_the_same_forward_and_leaves_no_trace(model, inputs):
    side = uniform_sides(model, layout_of(model, inputs), (0.25,), (0.5,))[0]
    owners = [(owner, name, getattr(owner, name)) for _, owner, name in (*measure.PARTS, *measure.BLOCK)]
    arguments = (inputs.latents, torch.tensor([500.0, 500.0]), inputs.text, side.rows[0])
    with torch.no_grad():
        plain, _ = model(*arguments)
        with measure.clocked(model) as clock:
            clocked, _ = model(*arguments)
    assert torch.equal(plain, clocked)
    assert all(getattr(owner, name) is original for owner, name, original in owners)
    assert not any("forward" in vars(module) for module in model.modules())
    parts = {part: seconds for part, seconds in clock.seconds.items() if part != "block"}
    assert set(parts) == {"selection", "statistics", "coarse", "attention", "norm_rope", "merging", "projections",
                          "cross_attention", "ffn"}  # fmt: skip
    assert 0 < sum(parts.values()) <= clock.seconds["block"]
    assert 0 < measure.overhead(clock.seconds, clock.seconds["block"]) < 1


def test_executed_is_what_ran_not_what_was_asked_for(model, inputs):
    """30% of partial tiles are whole tokens: 3 of 12 and 2 of 8; a density of 0.3 keeps 3 of 8 blocks."""
    layout = layout_of(model, inputs)
    got = executed(uniform_sides(model, layout, (0.3,), (0.3,))[0], inputs)
    assert got["density"] == 3 / 8 and got["merged"] == (4 * 3 + 4 * 2) / 80
    shape = ModelShape.of(model.config, tiny.TEXT)
    assert got["flops_ratio"] == pytest.approx(
        rung_flops(shape, layout, Rung()) / rung_flops(shape, layout, LayerPlan(3, 0.3))
    )
    mixed = executed(Side("mixed", model, (500.0, 1000.0), ((Rung(), Rung(1, 0)), (Rung(), Rung()))), inputs)
    assert mixed["density"] == (1 + 0.5 + 1 + 1) / 4 and mixed["merged"] == 0.0


def test_a_few_step_student_is_measured_at_its_steps(model):
    plan = SparsityPlan((600.0, 1000.0), ((Rung(1, 0),) * 2, (Rung(2, 0),) * 2))
    few = Side.of("few", Student(model, plan, {"student_timesteps": [1000.0, 700.0, 400.0]}))
    assert few.timesteps == (1000.0, 700.0, 400.0) and few.rows == (plan.rungs[1], plan.rungs[1], plan.rungs[0])
    many = Side.of("many", Student(model, plan, {}))
    assert many.timesteps == (300.0, 800.0) and many.rows == plan.rungs


def test_exact_tile_divides_the_grid():
    assert block.exact_tile(block.GRID) == Tile(3, 5, 4)
    for grid in ((6, 10, 8), (12, 30, 52), (8, 16, 16)):
        tile = block.exact_tile(grid)
        assert (
            all(side % extent == 0 for side, extent in zip(grid, (tile.t, tile.h, tile.w)))
            and 48 <= tile.num_tokens <= 64
        )
    with pytest.raises(ValueError, match=r"grid: got \(1, 2, 2\)"):
        block.exact_tile((1, 2, 2))


def test_ideal_of_the_real_shape():
    """The FLOPs of method: 4.39× at 95% sparsity with 30% merged; ideal is the dense run's parts, each by its own ratio."""
    model = block.random_model(1, block.exact_tile(block.GRID), "meta", torch.float32)
    sides, inputs = block.make_sides(model, block.GRID, ["0.05+0.30"])
    assert layout_of(model, inputs).grid == TokenGrid(*block.GRID) and sides[1].rows == ((LayerPlan(28, 0.3),),)
    seconds = {"attention": 40.0, "projections": 4.0, "cross_attention": 3.0, "ffn": 10.0}
    rows = {
        "dense": {"parts_seconds": seconds, "block_seconds": {"p50": 60.0}, "density": 1.0, "merged": 0.0},
        "sparse": {"parts_seconds": {}, "block_seconds": {"p50": 20.0}, "density": 0.05, "merged": 0.3},
    }
    block.compare(rows, sides, inputs)
    sparse = rows["sparse"]
    assert sparse["flops_ratio"] == pytest.approx(4.39, abs=0.005) and rows["dense"]["flops_ratio"] == 1.0
    cross = 0.7 * 3.0 * (1 + 0.5 * 0.3 / 0.7 * 512 * 1536 * 2 / 32760 / (1536 + 512))  # text projections do not shrink
    assert sparse["ideal_seconds"] == pytest.approx(40 * 0.05 * 0.49 + 4 * 0.7 + cross + 10 * 0.7, rel=2e-3)
    assert sparse["fraction_of_ideal"] == sparse["ideal_seconds"] / 20 and sparse["implied_denoising_speedup"] == 100.0
    assert rows["dense"]["fraction_of_ideal"] == pytest.approx(57 / 60)


def test_plans_that_are_none_are_refused(model):
    with pytest.raises(ValueError, match=r"plan: got 'half', accepted: density or density\+merged"):
        block.make_sides(model, (6, 10, 8), ["half"])


def run(monkeypatch, tmp_path, *arguments):
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(out)])
    main()
    report = json.loads(out.read_text())
    assert {"device", "threads", "torch", "python", "diffusers", "commit"} <= set(report["environment"])
    assert report["command"] == "python -m usv.bench " + " ".join(arguments) + f" --out {out}"
    return report


@pytest.fixture
def students(tmp_path, tiny_wan):
    """Folders of the ablation's rows; steps are 6 for the teacher."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(tiny_wan / "transformer")
    folders = {}
    for name, rung, steps in (
        ("attention", Rung(2, 0), 6),
        ("steps", Rung(), 2),
        ("attention_steps", Rung(2, 0), 2),
        ("merge", Rung(0, 2), 2),
        ("all", Rung(2, 2), 2),
    ):
        plan = SparsityPlan.uniform(rung, (600.0, 1000.0), 2)
        sampling = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": steps}
        folders[name] = tmp_path / name
        save_student(folders[name], Student(SparseTransformer(transformer, Tile(*tiny.TILE)), plan, sampling))
    return folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(monkeypatch, tmp_path, tiny_wan, students, dtype):
    monkeypatch.setattr(memory, "best_place", lambda: (dtype, "cpu"))  # bf16 is what it would be on a GPU
    report = run(monkeypatch, tmp_path, "forward", "--model", str(tiny_wan), *ARGUMENTS, "--ckpt", f"mine={students['all']}",
                 "--density", "0.25", "--merge", "0", "0.5", "--batch-size", "2", "--repeats", "3")  # fmt: skip
    sides = report["sides"]
    assert list(sides) == ["dense", "mine", "density 0.25", "density 0.25, 50% merged"]
    assert [s["density"] for s in sides.values()] == [1.0, 0.25, 0.25, 0.25] and sides["mine"]["merged"] == 0.5
    assert [b["timestep"] for b in sides["mine"]["by_timestep"]] == [300.0, 800.0]
    for s in sides.values():
        assert 0 < s["seconds"]["p10"] <= s["seconds"]["p50"] <= s["seconds"]["p90"] and s["seconds"]["samples"] == 3
    assert sides["dense"]["speedup"] == 1.0 and sides["dense"]["overhead"] == 0.0 < sides["mine"]["overhead"] < 1
    assert sides["mine"]["flops_ratio"] == pytest.approx(sides["density 0.25, 50% merged"]["flops_ratio"]) != 1.0


def test_denoise_fills_the_ablation(monkeypatch, tmp_path, tiny_wan, students, capsys):
    named = [part for name, folder in students.items() for part in ("--ckpt", f"{name}={folder}")]
    report = run(monkeypatch, tmp_path, "denoise", "--model", str(tiny_wan), *ARGUMENTS, *named, "--num-inference-steps", "6",
                 "--repeats", "2")  # fmt: skip
    methods = report["methods"]
    axes = {name: m["axes"] for name, m in methods.items()}
    assert axes == {
        "dense": "dense",
        "attention": "attention only",
        "steps": "steps only",
        "attention_steps": "attention + steps",
        "merge": "merge + steps",
        "all": "all three",
    }
    assert {name: m["forwards"] for name, m in methods.items()} == {
        "dense": 12,
        "attention": 6,
        "steps": 2,
        "attention_steps": 2,
        "merge": 2,
        "all": 2,
    }
    assert methods["steps"]["flops_ratio"] == pytest.approx(6.0) and methods["all"]["density"] == 0.25
    assert methods["all"]["flops_ratio"] == pytest.approx(6 * methods["all"]["flops_ratio_per_forward"])
    for m in methods.values():
        assert m["denoise_seconds"]["p50"] >= m["forwards"] * m["seconds_per_forward"]["p50"] * 0.5 > 0
        assert m["end_to_end_seconds"]["p50"] > m["denoise_seconds"]["p50"]
    assert "policy" in methods["all"]["shares"] and 0 < methods["all"]["overhead"] < 1
    i, forward = report["interaction"], {name: m["forward_speedup"] for name, m in methods.items()}
    assert i["attention"] == pytest.approx(forward["attention_steps"] / forward["steps"]) and i["steps"] == methods["steps"]["denoise_speedup"]
    assert denoise.said(i) in capsys.readouterr().out


def test_product_of_the_three_axes():
    """One forward's speed-up of attention and of merging, over the row that has fewer steps as well; else guidance would count thrice."""
    rows = {"steps only": (50.0, 1.0), "attention + steps": (190.0, 4.0), "merge + steps": (70.0, 1.5), "all three": (210.0, 4.2)}
    i = denoise.interaction({axes: {"axes": axes, "denoise_speedup": d, "forward_speedup": f} for axes, (d, f) in rows.items()})
    assert i["product"] == pytest.approx(300) and i["ratio"] == pytest.approx(0.7) and "0.70" in denoise.said(i)


def test_no_interaction_without_its_rows():
    rows = {"dense": {"axes": "dense", "denoise_speedup": 1.0}, "x": {"axes": "all three", "denoise_speedup": 9.0}}
    assert denoise.interaction(rows) is None


def test_train_checks_the_claim(monkeypatch, tmp_path, tiny_wan):
    """Times are measured, memory is given here: one side takes more than dense, and fails for it alone."""
    peaks = iter([1000, 1000, 1001])
    monkeypatch.setattr(memory, "in_fresh_process", lambda spec: {"peak_bytes": next(peaks), "held_bytes": 1})
    report = run(monkeypatch, tmp_path, "train", "--model", str(tiny_wan), *ARGUMENTS, "--density", "0.5", "0.25",
                 "--batch-size", "2", "--repeats", "2")  # fmt: skip
    dense, half, quarter = report["sides"].values()
    assert half["claim_holds"] and not quarter["claim_holds"] and quarter["memory_ratio"] == 1.001
    assert dense["step_seconds"]["p50"] > dense["student_seconds"]["p50"] > 0 and half["step_seconds"]["samples"] == 2
    assert half["step_speedup"] == dense["step_seconds"]["p50"] / half["step_seconds"]["p50"]


def test_training_step_trains_a_copy(model, inputs):
    sides = [Side("dense", model, (500.0,), (None,)), *uniform_sides(model, layout_of(model, inputs), (0.25,), (0.5,))]
    before = {name: p.clone() for name, p in model.named_parameters()}
    dense, sparse = training.trainers(sides, model, inputs, 3.0)
    assert dense.side.model is sparse.side.model is not model and dense.optimizer is sparse.optimizer
    whole, student = sparse.step()
    assert whole > student > 0
    changed = dict(sparse.side.model.named_parameters())
    assert any(not torch.equal(changed[name], p) for name, p in before.items())
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    assert all(p.grad is None for p in sparse.side.model.parameters())


def test_memory_in_a_fresh_process(monkeypatch, tmp_path, tiny_wan):
    """One side really in a process of its own, which sees what it allocates."""
    model = ModelConfig(path=str(tiny_wan), height=32, width=32, num_frames=5, tile=list(tiny.TILE))
    specs = memory.specs("train", model, {"mine": "x"}, (0.5, 0.25), (0.0, 0.5), 1)
    assert [s.name for s in specs] == [
        "dense",
        "mine",
        "density 0.5",
        "density 0.5, 50% merged",
        "density 0.25",
        "density 0.25, 50% merged",
    ]
    got = memory.in_fresh_process(specs[-1])
    assert got["peak_bytes"] >= got["held_bytes"] > 2**25
    assert got["peak_bytes"] < measure.peak_bytes() + 2**28


@pytest.mark.skipif(
    not torch.cuda.is_available() and sys.platform != "linux", reason="resident peaks can be reset on Linux only"
)
def test_peak_sees_a_transient():
    """In a process of its own, as it is used: elsewhere the memory may be resident already, freed by what ran before."""
    code = (
        "import torch; from usv.evaluation.bench import measure; measure.reset_peak(); before = measure.peak_bytes();"
        "torch.ones(2**26); print(measure.peak_bytes() - before)"  # 256 MiB, gone at once
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 2**27


def test_block_of_the_real_width(monkeypatch, tmp_path, capsys):
    """The whole command at two tiles of tokens: rounds, parts, table."""
    report = run(
        monkeypatch, tmp_path, "wan-1.3b", "--grid", "3", "5", "8", "--plan", "0.5", "0.5+0.30", "--repeats", "2"
    )
    assert report["tokens"] == 120 and report["tile"] == [3, 5, 4] and report["shape"]["dim"] == 1536
    dense, half, merged = report["sides"].values()
    assert (
        half["density"] == merged["density"] == 0.5
        and merged["merged"] == pytest.approx(0.3)
        and len(dense["samples"]) == 2
    )
    for side in (dense, half, merged):
        parts = side["parts_seconds"]
        assert all(parts[part] > 0 for part in block.COMPONENTS) and sum(parts.values()) == pytest.approx(
            side["block_seconds"]["p50"]
        )
    assert dense["overhead"] == 0.0 < half["overhead"] and merged["parts_seconds"]["merging"] > 0
    assert "120 tokens" in capsys.readouterr().out


def test_no_round_is_begun_that_would_end_late(monkeypatch):
    monkeypatch.setattr(block, "random_model", lambda layers, tile, device, dtype: SparseTransformer(small_wan(), tile).eval())
    report = block.bench((3, 5, 8), ["0.5"], 0.0, 5, None)
    assert len(report["sides"]["dense"]["samples"]) == 1


def small_wan():
    """Wan with the text width of the real one, so that the command's inputs fit."""
    model = tiny.make_transformer()
    return type(model).from_config({**model.config, "text_dim": 4096})
