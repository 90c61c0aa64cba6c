"""`python -m usv.models` and the page it prints; every row that says so runs, on a tiny random instance of the pipeline."""

import math
from pathlib import Path

import pytest
import tiny_pipelines
import torch

import usv
from usv.models.__main__ import TRAINING, page, rows, video_pipelines
from usv.patterns import PATTERNS, protocol
from usv.patterns.processors import attached_to, run

ROOT = Path(__file__).resolve().parents[2]
TABLE = {row.pipeline: row for row in rows()}
PATTERN = {"attention": "tile_top_k", "tile": (1, 2, 2), "dense_layers": 0.0, "dense_steps": 0.0}


def test_the_page_is_the_commands_output():
    assert (ROOT / "docs" / "models.md").read_text() == page(), "python -m usv.models > docs/models.md"


def test_every_class_has_a_row_and_every_row_an_answer():
    assert list(TABLE) == list(video_pipelines()) and len(TABLE) >= 75
    supported = {name for name, row in TABLE.items() if row.patterns != "-"}
    assert supported == set(tiny_pipelines.PIPELINES), "what the table says is run below"
    assert len(supported) >= 53
    for row in TABLE.values():
        assert bool(row.refused) == (row.patterns == "-") and row.attention
        assert row.student == "-" or not row.refused, "a row that names a student runs one (test_students.py)"
        assert "not known" not in row.refused, row
    assert all((ROOT / "conf" / "experiment" / f"{said.split('=')[1]}.yaml").exists() for said in TRAINING.values())


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_row(name, monkeypatch):
    """Dense with every block kept; else at half of them, within what is said; bit for bit the pipeline's own when disabled."""
    pipe, call = tiny_pipelines.make(name)
    own = tiny_pipelines.video(pipe, call)
    scale = float(own.abs().max())
    assert torch.isfinite(own).all() and 0.01 < scale < 100
    usv.enable(pipe, density=1.0, **PATTERN)
    full = tiny_pipelines.video(pipe, call)
    record = pipe._usv.record
    attentions = sum(len(attached.attentions) for attached in pipe._usv.attached)
    # Spatio-temporal guidance (LTX-2) leaves the attention of a block out in some forwards.
    assert len(record.calls) == record.forwards * attentions or "LTX2" in name and len(record.calls) > 0
    assert record.mean_density() == 1.0 and not any(call.dense for call in record.calls)
    torch.testing.assert_close(full, own, rtol=0, atol=1e-5 * max(scale, 1))
    executed, whole = watch(monkeypatch), tiny_pipelines.watch_dense(monkeypatch)
    usv.enable(pipe, density=0.5, **PATTERN)
    half = tiny_pipelines.video(pipe, call)
    assert torch.isfinite(half).all() and float((half - own).abs().max()) > 1e-3 * scale
    said = [call.density for call in pipe._usv.record.calls]
    assert len(executed) == len(said) and all(abs(ran - say) < 1e-6 and ran <= half_of(*call) for say, (ran, *call) in zip(said, executed))
    video = min(grid.num_tokens for _, grid, _ in executed)
    assert not [length for length in whole if length >= video], "a self-attention over the whole video stayed dense"
    monkeypatch.undo()
    usv.disable(pipe)
    assert all(attached_to(part) is None for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    assert torch.equal(tiny_pipelines.video(pipe, call), own)


def watch(monkeypatch):
    """A list that grows by (density that the kernel was given, grid, all tokens) for each attention call."""
    kernel, attend, seen = protocol.block_sparse_attention, run.attend, []

    def kernel_spy(q, k, v, selection, **more):
        seen.append(selection.density())
        return kernel(q, k, v, selection, **more)

    def attend_spy(q, k, v, grid, *rest):
        out = attend(q, k, v, grid, *rest)
        seen[-1] = (float(seen[-1]), grid, q.shape[2])
        return out

    monkeypatch.setattr(protocol, "block_sparse_attention", kernel_spy)
    monkeypatch.setattr(run, "attend", attend_spy)
    return seen


def half_of(grid, length):
    """The most that half of the video's block pairs make among those of a sequence of `length` tokens, the rest of it dense."""
    return 1 - 0.5 * (grid.num_tokens / length) ** 2 + 1e-6


def band_of(density, grid, length, block):
    """The most that SVG makes of a density, which counts what is dense beside the video: a band in whole blocks, the first frame on top."""
    tokens = grid.num_tokens
    width = length * (1 - math.sqrt(1 - density + 2 * (length - tokens) / length))
    number = torch.arange(tokens) // block
    listed = (number[:, None] - number).abs() <= math.ceil(width / block)
    listed[:, number <= (tokens // grid.t - 1) // block] = True
    return 1 - float((~listed).double().mean()) * (tokens / length) ** 2 + 1e-6


# a pipeline of each kind of attention, with tokens beside the grid where the kind has them, and the other patterns' settings
KINDS = {
    "self; text by cross-attention": "WanPipeline",
    "self; text and audio by cross-attention": "Kandinsky6TI2VAPipeline",
    "self; history before; text by cross-attention": "HeliosPipeline",
    "self; conditions before; text by cross-attention": "LTXConditionPipeline",
    "self; conditions after; text and audio by cross-attention": "LTX2ConditionPipeline",
    "joint; text before": "CogVideoXPipeline",
    "joint; text after": "HunyuanVideoPipeline",
    "joint; history before, text after": "HunyuanVideoFramepackPipeline",
}
SETTINGS = {
    "svg": {"block": 4, "rows": 8}, "svg2": {"q_clusters": 4, "k_clusters": 9, "first_iters": 5}, "radial": {"block": 4},
    "sliding_tile": {"tile": (1, 2, 2)}, "tile_top_k_proxy": {"tile": (1, 2, 2)},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS.values())
def kind(request):
    """A pipeline of a kind, its call, and its own video."""
    pipe, call = tiny_pipelines.make(request.param)
    return pipe, call, tiny_pipelines.video(pipe, call)


def test_every_kind_and_every_pattern_is_run():
    assert set(KINDS) == {row.attention for row in TABLE.values() if row.patterns != "-"}
    assert all(TABLE[name].attention == said for said, name in KINDS.items())
    assert {*SETTINGS, PATTERN["attention"]} == set(PATTERNS)


@pytest.mark.parametrize("name", SETTINGS)
def test_pattern(kind, name, monkeypatch):
    """As a row, by every other pattern: dense at density 1, sparse as said at half of the video's pairs."""
    pipe, call, own = kind
    settings, scale = {"attention": name, "dense_layers": 0.0, "dense_steps": 0.0, **SETTINGS[name]}, float(own.abs().max())
    executed = watch(monkeypatch)
    usv.enable(pipe, density=1.0, **settings)
    torch.testing.assert_close(tiny_pipelines.video(pipe, call), own, rtol=0, atol=1e-5 * max(scale, 1))
    assert executed and all(ran == 1 for ran, *_ in executed)
    density = 0.5
    if name == "svg":  # its density is of all pairs, those beside the grid among them
        share = max(2 * (1 - grid.num_tokens / length) for _, grid, length in executed)
        density = (1 + share) / 2
    executed.clear()
    usv.enable(pipe, density=density, **settings)
    half = tiny_pipelines.video(pipe, call)
    assert torch.isfinite(half).all() and float((half - own).abs().max()) > 1e-4 * scale
    most = [band_of(density, grid, length, 4) if name == "svg" else half_of(grid, length) for _, grid, length in executed]
    ran = [ran for ran, *_ in executed]
    assert ran == pytest.approx([call.density for call in pipe._usv.record.calls], abs=1e-6)
    assert max(ran) < 1 and all(a <= b for a, b in zip(ran, most))


@pytest.mark.parametrize("name", ["SanaVideoPipeline", "LattePipeline", "AnimateDiffPipeline", "LTXLatentUpsamplePipeline"])
def test_refused_rows_say_why(name):
    assert TABLE[name].refused and TABLE[name].patterns == "-"
