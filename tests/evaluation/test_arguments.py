"""The commands look at their arguments before the work: outputs that cannot be written, numbers that are none, names that are taken."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from usv.evaluation.arguments import RANGES
from usv.sampling.checkpoint import named

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "evaluate": [], "peers.__main__": [], "bench.__main__": ["forward"], "oracle": ["--ckpt", "x"], "compare_patterns": [], "compare_policies": [],
}  # fmt: skip


def refusal(command, words, monkeypatch) -> str:
    """The message of a command that ends before any model is loaded."""
    module = import_module(f"usv.evaluation.{command}")
    monkeypatch.setattr(sys, "argv", ["command", *words])
    for name in ("load_pipeline", "evaluate", "compare", "run", "Setup"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("the work began"))
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert isinstance(caught.value.code, str) and len(caught.value.code.splitlines()) == 1
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_is_proved_before_the_work(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.md").write_text("# mine")
    (tmp_path / "old.json").write_text("{}")
    for out in ("folder", "notes.md", "notes.md/x.json"):
        said = refusal(command, [*COMMANDS[command], "--out", out], monkeypatch)
        assert said.startswith("FileError: --out") and out.split("/")[0] in said
    assert (tmp_path / "notes.md").read_text() == "# mine" and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    "command, words",
    [
        ("evaluate", ["--clips", "0"]), ("evaluate", ["--batch-size", "-1"]), ("evaluate", ["--guidance", "nan"]), ("evaluate", ["--steps", "0"]),
        ("bench.__main__", ["forward", "--repeats", "0"]), ("bench.__main__", ["forward", "--density", "nan"]), ("bench.__main__", ["--threads", "0", "forward"]),
        ("oracle", ["--ckpt", "x", "--batch-size", "0"]), ("oracle", ["--ckpt", "x", "--most-density", "inf"]), ("compare_policies", ["--seeds", "0"]),
        ("compare_policies", ["--jobs", "0"]), ("compare_patterns", ["--recall-rows", "-1"]),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_one_line(command, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    option = next(w for w in words if w.startswith("--") and w != "--ckpt")
    assert re.match(f"SettingError: {option}: got .*, accepted: (from|above) ", refusal(command, words, monkeypatch))


def test_every_number_of_a_command_has_a_range():
    found = set()
    for path in (ROOT / "usv" / "evaluation").rglob("*.py"):
        found |= set(re.findall(r'"--([a-z-]+)",\s*type=(?:int|float)', path.read_text()))
    assert len(found) > 20 and {name.replace("-", "_") for name in found} <= set(RANGES)


@pytest.mark.parametrize("entry", ["dense=FOLDER", "a/b=FOLDER", "..\\x=FOLDER", "outputs/dense"])
def test_a_student_has_a_name_of_its_own(entry):
    with pytest.raises(ValueError, match="students: got"):
        named([entry])
