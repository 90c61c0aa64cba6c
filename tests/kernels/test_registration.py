"""Every operation of the package is registered completely, and a test says so: none is forgotten when one is added."""

import importlib
import re
from pathlib import Path

import torch
from torch._library.custom_ops import OPDEFS

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
