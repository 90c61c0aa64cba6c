"""Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors."""

import os
import signal
import tempfile
from functools import partial

import pytest
import tiny
import torch

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when it is imported: never the user's own
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory):
    """A complete diffusers Wan folder with two random layers; see tests/tiny.py."""
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory, tiny_wan):
    """CameraMotion shards for it, splits train and val."""
    return tiny.save_shards(tmp_path_factory.mktemp("tiny") / "shards", tiny_wan)


@pytest.fixture
def make(tiny_wan, tiny_shards):
    """Settings of a run of train.py on them; see tests/runs.py."""
    import runs

    return partial(runs.settings, tiny_wan, tiny_shards)


@pytest.fixture
def watched(monkeypatch):
    """Runs train() and watches its steps; see tests/runs.py."""
    import runs

    handler = signal.getsignal(signal.SIGINT)
    yield runs.watcher(monkeypatch)
    signal.signal(signal.SIGINT, handler)
