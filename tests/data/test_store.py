"""--out in a store that fsspec reaches: the bytes of a local folder, each file there whole or not at all."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

pytest.importorskip("upath", reason="the package universal_pathlib is optional")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import prepare  # noqa: E402
import shards  # noqa: E402

from usv.training.data import ShardDataset  # noqa: E402

CLIPS = 5


def settings(model, out):
    return prepare.Settings(model, out, tiny.SIZE, tiny.SIZE, tiny.FRAMES, 8, tiny.TEXT, camera_motion=CLIPS, seed=1, split={"val": 0.2}, shard_size=2)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


@pytest.fixture(scope="module")
def local(tiny_wan, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "shards"
    prepare.run(settings(tiny_wan, out))
    return bytes_of(out)


@pytest.mark.parametrize("url", ["memory://bucket/mine", "file://{folder}/mine"])
def test_a_store_holds_what_a_folder_holds(url, local, tiny_wan, tmp_path, monkeypatch):
    """And goes on where it stopped: after an error in mid-shard nothing half stands there, and only what is missing is made again."""
    url = url.format(folder=tmp_path)
    asked = settings(tiny_wan, shards.place(url))
    made, original = [], shards._add

    def failing(tar, name, data):
        if len(made) == 3:
            raise OSError("the store is full")
        made.append(name)
        original(tar, name, data)

    monkeypatch.setattr(shards, "_add", failing)
    with pytest.raises(OSError, match="the store is full"):
        prepare.run(asked)
    assert not list(asked.out.glob("*.tar")) and not list(asked.out.glob(".*.tmp")), "nothing half"
    monkeypatch.setattr(shards, "_add", original)
    prepare.run(asked)
    assert bytes_of(asked.out) == local
    (asked.out / "train-00001.tar").unlink()
    prepare.run(asked)
    assert bytes_of(asked.out) == local
    with pytest.raises(ValueError, match="was begun with seed = 1, now it is 2"):
        prepare.run(replace(asked, seed=2))


def test_it_is_trained_on(local, tiny_wan, tmp_path):
    out = shards.place(f"file://{tmp_path}/mine")
    prepare.run(settings(tiny_wan, out))
    batch = next(iter(ShardDataset(f"file://{tmp_path}/mine", 2, split="train", model=str(tiny_wan))))
    assert len(batch["latents"]) == 2


def test_what_is_no_store_is_one_line(capsys, tiny_wan, monkeypatch):
    for url, said in (("nonsense://bucket/x", "nonsense"), ("memory://a/b", r'pip install "usv[store]"')):
        if "memory" in url:
            monkeypatch.setitem(sys.modules, "upath", None)
        with pytest.raises(SystemExit):
            prepare.parse(["--camera-motion", "4", "--model", str(tiny_wan), "--out", url])
        line = capsys.readouterr().err.splitlines()[-1]
        assert "--out " + url in line and said in line
