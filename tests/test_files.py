"""usv/files.py: whole or not at all, one writer at a time, nothing of the user's replaced; full disks are called that."""

import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from usv.files import FileError, atomic_folder, check_output, claimed, replacing, settle, write_text
from usv.sampling.checkpoint import save_file_atomic


@pytest.fixture
def small_disk():
    """Files of this process end at 64 KiB, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_called_that_whoever_writes(tmp_path, small_disk):
    """torch raises a RuntimeError and safetensors its own kind, neither with a word of a disk."""
    large = {"w": torch.zeros(1 << 16)}
    (tmp_path / "kept").write_text("before")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("before")
    for write in (
        lambda: write_text(tmp_path / "kept", "x" * (1 << 17)),
        lambda: save_file_atomic(tmp_path / "kept", large),
        lambda: atomic_folder(tmp_path / "folder", lambda fresh: save_file(large, fresh / "student.safetensors")),
        lambda: atomic_folder(tmp_path / "folder", lambda fresh: save_file_atomic(fresh / "trainer.pt", large)),
    ):
        with pytest.raises(FileError, match=r"cannot be written .*the disk has [\d,]+ MiB left, make room\); what stood there before still stands") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "kept").read_text() == (tmp_path / "folder" / "a").read_text() == "before"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "folder", "kept"], "half-written files stay behind"


def test_readers_that_put_the_old_folder_back_do_not_stop_the_writer(tmp_path):
    """A reader finds the old folder aside, between the writer's two renames."""
    place, stop, seen = tmp_path / "student", threading.Event(), []

    def read():
        while not stop.is_set():
            settle(place)
            seen.append(1)

    atomic_folder(place, lambda fresh: (fresh / "n").write_text("-1"))
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for n in range(25):
            atomic_folder(place, lambda fresh, n=n: (fresh / "n").write_text(str(n)))
            assert (place / "n").read_text() == str(n)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert seen and [p.name for p in tmp_path.iterdir()] == ["student"]


def test_a_lock_is_one_processs_and_leaves_nothing(tmp_path):
    with claimed(tmp_path):
        with pytest.raises(FileError, match=f"another run writes there .process {os.getpid()} on "), claimed(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text("of a process that was killed")
    with claimed(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out, begins", [("folder", None), ("", None), ("notes.md", ("{",)), ("pipe", None), ("notes.md/x", None)])
def test_outputs_that_cannot_be(tmp_path, monkeypatch, out, begins):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("notes.md").write_text("# mine")
    os.mkfifo("pipe")
    with pytest.raises(FileError, match="^--out"):
        check_output(Path(out), begins=begins)
    check_output(Path("new/deep/x.json"))
    Path("old.json").write_text(' {"a": 1}')
    check_output(Path("old.json"))
    assert Path("notes.md").read_text() == "# mine" and not list(Path("new/deep").iterdir())


def test_replacing_keeps_the_suffix_and_the_old_file(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.mp4") as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == tmp_path
        temporary.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "a.mp4").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
