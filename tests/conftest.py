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


# Files that take half a minute and more, longest first: begun last, one of them would keep one of two workers waiting for minutes.
LONGEST = (
    "test_ranks", "test_block_sparse_attention", "test_metrics", "test_block_proxy", "test_train", "test_kernel_bench", "test_own", "test_compile", "test_crew",
    "test_select", "test_low_precision", "test_peers", "test_together", "test_bench", "test_block_sparse_attention_interface", "test_few_steps", "test_styles",
    "test_image_to_video", "test_faults", "test_prepare", "test_ray", "test_gradient_sign",
)  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    """Files of LONGEST first (pytest-xdist keeps this order with --no-loadscope-reorder), each in its own order."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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
