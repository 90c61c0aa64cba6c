"""--engine ray: the bytes of the local engine from two workers, and again when one of them is killed. Skipped where ray is not installed."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import prepare  # noqa: E402
import ray_engine  # noqa: E402

CLIPS = 12


def settings(model, out, **changes):
    base = prepare.Settings(model, out, tiny.SIZE, tiny.SIZE, tiny.FRAMES, 8, tiny.TEXT, camera_motion=CLIPS, seed=1, split={"val": 0.2}, shard_size=2)
    return replace(base, **changes)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in [*folder.glob("*.tar"), folder / "empty.safetensors", folder / "index.json"]}


def workers():
    """Processes below this one that are actors of the engine."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if b"Writer" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, ValueError, IndexError):
            continue

    def ours(pid):
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return [pid for pid in found if ours(pid)]


@pytest.fixture(scope="module")
def local(tiny_wan, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "shards"
    prepare.run(settings(tiny_wan, out))
    return bytes_of(out)


@pytest.mark.timeout(900)
def test_two_workers_and_a_killed_one_give_the_same_bytes(local, tiny_wan, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the package ray is optional")
    killed, seen = [], []
    original = ray_engine._Crew.show

    def show(crew, busy, advance):
        seen.append(len(workers()))
        if not killed and crew.finished >= 2 and busy and (found := workers()):
            killed.append(found[0])
            (out / ".train-00009.tar.1.tmp").write_bytes(b"of one that died")
            os.kill(found[0], signal.SIGKILL)
        original(crew, busy, advance)

    monkeypatch.setattr(ray_engine._Crew, "show", show)
    monkeypatch.setattr(ray_engine, "POLL", 0.3)
    out = tmp_path / "shards"
    index = prepare.run(settings(tiny_wan, out, engine="ray", workers=2))
    assert killed and max(seen) >= 2, "two workers ran, and one was killed while shards were missing"
    assert bytes_of(out) == local and sum(part["num_samples"] for part in index["splits"].values()) == CLIPS
    assert not list(out.glob(".*.tmp")) and not workers()


def test_no_cluster_is_one_line():
    pytest.importorskip("ray", reason="the package ray is optional")
    with pytest.raises(ValueError, match="^--engine ray --address 127.0.0.1:1: no cluster answers"):
        ray_engine.connect("127.0.0.1:1", None, False)


def test_without_the_package_it_is_said(tiny_wan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'^--engine ray: the package ray is not installed; pip install "usv\[ray\]"'):
        prepare.run(settings(tiny_wan, tmp_path / "out", engine="ray"))
