"""Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors."""

import os
import tempfile

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
