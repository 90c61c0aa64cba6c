"""`python -m usv.models` and the page it prints; every row that says so runs, on a tiny random instance of the pipeline."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch

import usv
from usv.models.__main__ import TRAINING, page, rows, video_pipelines
from usv.patterns import protocol
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
    executed = watch(monkeypatch)
    usv.enable(pipe, density=0.5, **PATTERN)
    half = tiny_pipelines.video(pipe, call)
    assert torch.isfinite(half).all() and float((half - own).abs().max()) > 1e-3 * scale
    said = [call.density for call in pipe._usv.record.calls]
    assert len(executed) == len(said) and all(abs(ran - say) < 1e-6 and ran <= most for say, (ran, most) in zip(said, executed))
    monkeypatch.undo()
    usv.disable(pipe)
    assert all(attached_to(part) is None for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    assert torch.equal(tiny_pipelines.video(pipe, call), own)


def watch(monkeypatch):
    """A list that grows by (density that the kernel was given, the most that half of the video's blocks with dense text make)
    for each attention call."""
    kernel, attend, seen = protocol.block_sparse_attention, run.attend, []

    def kernel_spy(q, k, v, selection, **more):
        seen.append(selection.density())
        return kernel(q, k, v, selection, **more)

    def attend_spy(q, k, v, grid, *rest):
        out = attend(q, k, v, grid, *rest)
        everything, of_video = q.shape[2] ** 2, grid.num_tokens**2
        seen[-1] = (float(seen[-1]), 1 - 0.5 * of_video / everything + 1e-6)
        return out

    monkeypatch.setattr(protocol, "block_sparse_attention", kernel_spy)
    monkeypatch.setattr(run, "attend", attend_spy)
    return seen


@pytest.mark.parametrize("name", ["SanaVideoPipeline", "LattePipeline", "AnimateDiffPipeline", "LTXLatentUpsamplePipeline"])
def test_refused_rows_say_why(name):
    assert TABLE[name].refused and TABLE[name].patterns == "-"
