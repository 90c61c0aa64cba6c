"""A pattern under a learned plan: the student's densities, coarse branch and merging, the pattern's blocks."""

import json

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from pattern_reference import qkv

import infer
import usv
from usv.config import AttentionConfig, InferConfig, ModelConfig, check_overrides, config_groups, typed
from usv.models.forward import SparseTransformer
from usv.patterns import SVG2
from usv.patterns.planned import PlannedPattern, planned_pattern
from usv.patterns.protocol import Clock, PatternState, attend, plan_recall
from usv.sampling.checkpoint import CheckpointError, Student, save_student
from usv.sampling.generate import load_pipeline
from usv.sparse.grid import Tile, TokenGrid
from usv.sparse.plan import LayerPlan, Rung, SparsityPlan, timestep_bins

GRID, TILE = TokenGrid(5, 4, 4), Tile(*tiny.TILE)  # 80 tokens in 8 tiles
CLUSTERS = {"q_clusters": 12, "k_clusters": 32}
OPTIONS = {"svg": {"block": 4}, "svg2": CLUSTERS, "radial": {"block": 4}, "sliding_tile": {"tile": (1, 2, 2)},
           "tile_top_k": {"tile": (1, 2, 2)}}  # fmt: skip
EDGES = timestep_bins(2, 3.0)
PLAN = SparsityPlan(EDGES, ((Rung(1), Rung(2)), (Rung(), Rung(1))))
MERGING = SparsityPlan(EDGES, ((Rung(1, 2), Rung(2, 2)), (Rung(), Rung(1, 1))))
SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 4, "max_sequence_length": tiny.TEXT}


def network():
    model = SparseTransformer(tiny.make_transformer(seed=5), TILE).eval().requires_grad_(False)
    for gate in model.gates:
        torch.nn.init.normal_(gate.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return model


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 16, 5, 8, 8), torch.tensor([700.0, 700.0]), torch.randn(2, 7, 64)


def run(model, rungs, pattern=None):
    """Velocity under rungs, the executed densities by layer, and the record of the pattern's calls."""
    calls, fine = [], None
    if pattern is not None:
        fine = PlannedPattern(pattern, model.num_layers, TILE, lambda t: (1, 4, calls), calls.append, recall_rows=9)
        fine.begin(model.grid_of(inputs()[0].shape), inputs()[1])
    velocity, stats = model(*inputs(), rungs, fine=None if fine is None else fine.layers)
    return velocity, {layer: float(s.density) for layer, s in stats.items()}, calls


@pytest.mark.parametrize("name", OPTIONS)
def test_all_blocks_are_the_students_own_attention(name):
    """With every block kept nothing is left to choose: coarse branch, gate and order of tokens must be the student's."""
    model = network()
    full = [LayerPlan(8, 0.0)] * 2
    expected, _, _ = run(model, full)
    velocity, densities, calls = run(model, full, planned_pattern(name, PLAN, **OPTIONS[name]))
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    assert densities == {0: 1.0, 1: 1.0} and len(calls) == 2
    assert not torch.allclose(expected, model(*inputs())[0], atol=1e-4), "the coarse branch must show"


def test_svg2_keeps_merged_tokens_and_their_weights():
    model = network()
    full = [Rung(0, 2), Rung(0, 2)]
    expected, _, _ = run(model, full)
    velocity, densities, calls = run(model, full, planned_pattern("svg2", MERGING, **CLUSTERS))
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    assert densities == {0: 1.0, 1: 1.0} and all(c.recall == pytest.approx(1.0, abs=1e-5) for c in calls)
    sparse, densities, calls = run(model, [Rung(1, 2), Rung(2, 2)], planned_pattern("svg2", MERGING, **CLUSTERS))
    assert 0.45 < densities[0] <= 0.5 and 0.2 < densities[1] <= 0.25
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, expected, atol=1e-4)


def test_a_key_of_bias_log_n_is_n_keys():
    """Choice, output and recall on merged keys are those on the keys written out, whatever the clusters."""
    q, k, v = qkv(2, 2, 30, 16, scale=2.0)
    times = torch.randint(1, 5, (2, 30), generator=torch.Generator().manual_seed(0))
    bias = times.float().log()[:, None]
    settings = SVG2(density=0.5, q_clusters=5, k_clusters=8, dense_layers=0, dense_steps=0)
    state, line = PatternState(), TokenGrid(1, 1, 30)
    plan = settings.plan(q, k, v, line, state, None, Clock(q.device), key_bias=bias)
    out, stats = attend(q, k, v, line, settings, PatternState(recall_rows=30), key_bias=bias)
    selection, mask, recall = plan.selection, plan.selection.to_mask(), 0.0
    for b in range(2):
        written = torch.repeat_interleave(times[b])
        for h in range(2):
            q_of, k_of = torch.empty(30, dtype=torch.long), torch.empty(30, dtype=torch.long)
            q_of[plan.q_order[b, h]] = torch.repeat_interleave(selection.q_sizes[b, h].long())
            k_of[plan.kv_order[b, h]] = torch.repeat_interleave(selection.kv_sizes[b, h].long())
            kept = mask[b, h][q_of][:, k_of][:, written]
            scores = q[b, h].double() @ k[b, h, written].double().T / 4
            expected = scores.masked_fill(~kept, float("-inf")).softmax(-1) @ v[b, h, written].double()
            torch.testing.assert_close(out[b, h].double(), expected, rtol=1e-5, atol=1e-5)
            recall += float((scores.softmax(-1) * kept).sum(-1).mean()) / 4
    assert stats.recall == pytest.approx(recall, abs=1e-5) and stats.recall < 0.999
    assert float(plan_recall(q, k, plan, None, 30)) != pytest.approx(recall, abs=1e-3), "weights must show"
    assert 0.4 < stats.density <= 0.5


@pytest.fixture(scope="module")
def pipe(tiny_wan):
    return load_pipeline(str(tiny_wan))


@pytest.fixture(autouse=True)
def clean(request):
    yield
    if "pipe" in request.fixturenames:
        usv.disable(request.getfixturevalue("pipe"))


def student(plan):
    return Student(network(), plan, SAMPLING)


def latents(pipe):
    return pipe("a cat, the camera pans left", generator=torch.Generator().manual_seed(0), output_type="latent").frames


def test_every_layer_and_step_runs_at_the_density_of_its_plan(pipe):
    own = usv.enable(pipe, student(PLAN))
    expected = latents(own)
    density = own._usv.record.mean_density()
    assert usv.enable(pipe, student(PLAN), attention="svg2", recall_rows=8, **CLUSTERS) is pipe
    sparse, record = latents(pipe), pipe._usv.record
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, expected, atol=1e-3)
    timesteps = pipe.scheduler.timesteps
    planned = [(layer, step, 0.5**rung.density) for step, t in enumerate(timesteps.tolist())
               for layer, rung in enumerate(PLAN.at(t)) if rung != Rung()]  # fmt: skip
    assert [(c.layer, c.step) for c in record.calls] == [(layer, step) for layer, step, _ in planned]
    assert len({density for *_, density in planned}) == 2, "the case must hold two densities"
    for call, (_, _, wanted) in zip(record.calls, planned):
        # 80 tokens in 12 × 32 clusters: one pair of clusters is a few hundredths of a rung.
        assert wanted * 0.9 <= call.density <= wanted and 0 < call.recall < 1
    assert record.mean_density() == pytest.approx(density, rel=0.05)
    text = usv.summary(pipe)
    assert "blocks by SVG2(" in text and "cluster" in text and "recall" in text
    record.reset()
    assert torch.equal(latents(pipe), sparse) and len(record.calls) == len(planned), "a second video starts afresh"
    usv.enable(pipe, student(PLAN))
    assert torch.equal(latents(pipe), expected), "the student's own tiles are back"


def test_what_a_plan_cannot_use_is_refused_and_changes_nothing(pipe):
    before = latents(usv.enable(pipe, student(PLAN)))
    cases = [
        ({"attention": "svg"}, MERGING, r"attention: got 'svg' beside a plan that merges 31% of the tokens, accepted: 'svg2'"),
        ({"attention": "svg2", "top_p": 0.9}, PLAN, "top_p: got 0.9, accepted: not given beside a checkpoint"),
        ({"attention": "svg2", "dense_steps": 0.1}, PLAN, "dense_steps: got 0.1, accepted: not given"),
        ({"attention": "svg2", "cluster": 3}, PLAN, "cluster: got an unknown option of svg2"),
        ({"attention": "svgg"}, PLAN, "attention: got 'svgg'"),
    ]  # fmt: skip
    for options, plan, message in cases:
        with pytest.raises(ValueError, match=message):
            usv.enable(pipe, student(plan), **options)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        usv.enable(pipe, "nowhere", attention="svg2")
    assert torch.equal(latents(pipe), before)
    usv.enable(pipe, student(MERGING), attention="svg2")  # 500 clusters of 40 tokens: seen by the first call
    with pytest.raises(ValueError, match=r"q_clusters: got 100, accepted: 1\.\.\d+"):
        latents(pipe)


def infer_config(tiny_wan, folder, pattern, options, ckpt=None):
    shape = ModelConfig(path=str(tiny_wan), height=tiny.SIZE, width=tiny.SIZE, num_frames=tiny.FRAMES, max_sequence_length=tiny.TEXT,
                        num_inference_steps=4, tile=list(tiny.TILE))  # fmt: skip
    return InferConfig(ckpt=ckpt, model=shape, attention=AttentionConfig(pattern=pattern, options=options), seeds=2,
                       prompt="a cat, the camera pans left", output_dir=str(folder))  # fmt: skip


def test_infer_reports_density_recall_and_stages(tiny_wan, tmp_path, capsys):
    """Without training, and under a student's plan, whose settings of how much win over those of conf/attention."""
    options = {"top_p": 0.6, "floor": 0.0, "dense_steps": 0.3, **CLUSTERS}
    infer.run(infer_config(tiny_wan, tmp_path / "free", "svg2", options))
    row = json.loads((tmp_path / "free" / "infer.json").read_text())["methods"]["svg2"]
    # 4 steps × 2 branches × 2 layers; 0.3 · 4 steps and 0.03 · 2 layers stay dense: two steps, one layer.
    assert row["attention_calls"] == {"dense": 12, "sparse": 4}
    assert 0 < row["sparse_density"] < row["density"] < 1 and 0 < row["recall"] < 1
    assert row["density"] == pytest.approx((12 + 4 * row["sparse_density"]) / 16, abs=1e-3)
    assert set(row["pattern_seconds"]) == {"profile", "cluster", "select", "permute", "attention", "measure"}
    assert row["pattern_seconds"]["cluster"] > 0 and row["dense_attention_seconds"] > 0
    save_student(tmp_path / "student", student(PLAN))
    infer.run(infer_config(tiny_wan, tmp_path / "both", "svg2", options, str(tmp_path / "student")))
    assert "top_p, floor, dense_steps of svg2 is not used" in capsys.readouterr().out
    row = json.loads((tmp_path / "both" / "infer.json").read_text())["methods"]["student"]
    assert row["attention"] == "svg2" and row["attention_calls"]["dense"] == 0
    assert row["density"] == pytest.approx(PLAN.density(8), rel=0.2) and 0 < row["recall"] < 1


def test_options_of_a_pattern_are_set_on_the_command_line():
    words = ["attention=svg2", "attention.options.top_p=0.8", "+attention.options.recall_rows=0"]
    check_overrides(words, InferConfig, config_groups(tiny.ROOT / "conf"))
    with initialize_config_dir(version_base="1.3", config_dir=str(tiny.ROOT / "conf")):
        config = typed(compose("infer", words), InferConfig)
    assert config.attention.options["top_p"] == 0.8 and config.attention.options["recall_rows"] == 0
    assert config.attention.options["k_clusters"] == 200 and config.attention.pattern == "svg2"
