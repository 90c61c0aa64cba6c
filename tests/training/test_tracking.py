"""The tracker writes to wandb offline, goes on with the same run, and keeps its own jsonl."""

import json

import pytest
import torch

from usv.config import LoggerConfig, SettingError, TrainConfig
from usv.training import ranks
from usv.training.tracking import Tracker, has_account
from usv.video import write_mp4


def test_wandb_offline_without_an_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine example.org login me password secret\n")  # of another service
    write_mp4(tmp_path / "clip.mp4", torch.rand(3, 3, 16, 16))
    for step in (1, 2):
        tracker = Tracker(LoggerConfig(), tmp_path, {"seed": 0}, "test")
        assert tracker.run.settings.mode == "offline"
        tracker.scalars(step, {"loss/velocity": 0.5, "absent": None})
        tracker.heatmap(step, "sparsity/density_map", [[0.0, 1.0], [0.5, 0.25]], "layer", "timestep bin")
        tracker.video(step, "validation/video_0", tmp_path / "clip.mp4", "teacher | student")
        tracker.table(step, "quality/videos", ["prompt", "student", "speed-up"], [["a cat", tmp_path / "clip.mp4", 4.2]])
        identity = tracker.run.id
        tracker.close()
    assert (tmp_path / "wandb_id").read_text() == identity, "both sessions are one run"
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss/velocity": 0.5} for step in (1, 2)]


def test_an_account_is_a_key_of_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_account()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + 40 * "a" + "\n")
    assert has_account()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_account()
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    assert has_account()


def test_trackio_keeps_one_run_on_this_machine(tmp_path):
    """In TRACKIO_DIR, which conftest.py sets before anything can import trackio."""
    write_mp4(tmp_path / "clip.mp4", torch.rand(3, 3, 16, 16))
    for step in (1, 2):
        tracker = Tracker(LoggerConfig(name="trackio"), tmp_path, {"seed": 0}, "test")
        tracker.scalars(step, {"loss/velocity": 0.5})
        tracker.heatmap(step, "sparsity/density_map", [[0.0, 1.0], [0.5, 0.25]], "layer", "timestep bin")
        tracker.table(step, "quality/videos", ["prompt", "student"], [["a cat", tmp_path / "clip.mp4"]])
        tracker.close()
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = (n for n in SQLiteStorage.get_runs("usv") if n == f"test-{(tmp_path / 'wandb_id').read_text()}")
    logs = SQLiteStorage.get_logs("usv", name)
    assert [row["step"] for row in logs if "loss/velocity" in row] == [1, 2]
    assert sum("quality/videos" in row for row in logs) == 2 and sum("sparsity/density_map" in row for row in logs) == 2


def test_a_board_that_is_not_installed_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(ranks, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="pip install trackio"):
        ranks.start(TrainConfig(logger=LoggerConfig(name="trackio")))


def test_a_log_goes_on_where_the_run_does(tmp_path):
    """Half a line of a kill is left out, steps after the checkpoint come once, another beginning keeps the earlier log aside."""
    log, quiet = tmp_path / "metrics.jsonl", LoggerConfig(name="none")
    rows = [json.dumps({"step": step, "loss/velocity": 0.5}) for step in (1, 2, 3, 4)]
    log.write_text("\n".join([*rows, '{"step": 5, "lo']))
    Tracker(quiet, tmp_path, {}, "test").close()
    assert log.read_text().splitlines() == rows
    log.write_text("\n".join([*rows, '{"step": 5, "lo']))
    tracker = Tracker(quiet, tmp_path, {}, "test", begun=2)
    tracker.scalars(3, {"loss/velocity": 0.25})
    tracker.close()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    Tracker(quiet, tmp_path, {}, "test", begun=0).close()
    (aside,) = tmp_path.glob("metrics-*.jsonl")
    assert log.read_text() == "" and len(aside.read_text().splitlines()) == 3
