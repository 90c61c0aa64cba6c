"""Every operation of the package is registered completely, and runs where its tensors lie: none is forgotten."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import usv_kernels
from torch._library.custom_ops import OPDEFS
from usv_kernels import _impl

HERE = Path(__file__).parent


def checked_by_opcheck() -> set[str]:
    """Qualified names of the ops that a test of this folder hands to `torch.library.opcheck`."""
    names = set()
    for path in sorted(HERE.glob("test_*.py")):
        module = None
        for expression in re.findall(r"torch\.library\.opcheck\((\w+(?:\.\w+)*)", path.read_text()):
            module = module or importlib.import_module(path.stem)
            value = module
            for part in expression.split("."):
                value = getattr(value, part)
            names.add(value._qualname)
    return names


def test_every_op_is_checked_and_every_operation_is_compiled():
    checked = checked_by_opcheck()  # imports every operation
    ours = {name for name in OPDEFS if name.startswith("usv_kernels::")}
    assert len(ours) >= 14 and ours == checked
    for name in ours:
        op = getattr(torch.ops.usv_kernels, name.split("::")[1])
        assert OPDEFS[name]._abstract_fn is not None and op.default is not None, name
    for path in HERE.glob("test_*.py"):
        text = path.read_text()
        if "torch.library.opcheck(" in text and path.name != "test_registration.py":
            assert "assert_compiles(" in text or "fullgraph=True" in text, f"{path.name} compiles nothing"


def test_auto_takes_another_where_triton_does_not_run():
    """A shape beyond Triton's is refused where it was asked for and left to the reference where nobody asked."""
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, is_floating_point=lambda: True)
    for within, expected in ((True, "triton"), (False, "reference")):
        assert _impl.resolve("op", "auto", x, ("reference", "triton"), (within, "x", "much", "less")) == expected
    with pytest.raises(ValueError, match="^x: got much, expected less"):
        _impl.resolve("op", "triton", x, ("reference", "triton"), (False, "x", "much", "less"))


LAUNCHERS = sorted(
    path for path in Path(usv_kernels.__file__).parent.rglob("triton*.py") if "import on_its_device" in path.read_text()
)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.parent.name)
def test_kernels_run_on_the_gpu_of_their_tensors(path, monkeypatch):
    """Triton launches on the current GPU; every function that an op calls first makes that the one of its tensors."""
    module = importlib.import_module(f"usv_kernels.{path.parent.name}.{path.stem}")
    called = set(re.findall(r"(?:backend|module|_implementation\(impl\)|_backend\(impl, \w+\))\.(\w+)\(",
                            "".join(p.read_text() for p in path.parent.glob("*.py")))) & set(vars(module))  # fmt: skip
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device", Guard)
    assert called
    for name in called:
        entered.clear()
        with pytest.raises((AttributeError, TypeError)):  # not a tensor: it fails, but on the right device
            getattr(module, name)(SimpleNamespace(device=torch.device("cuda", 1)))
        assert entered == [torch.device("cuda", 1)], name


def test_all_launchers_are_known():
    folders = {path.parent.name for path in LAUNCHERS}
    assert folders == {
        "block_pool",
        "block_sparse_attention",
        "kmeans",
        "norm_rope",
        "permute",
        "select",
        "token_merge",
    }
