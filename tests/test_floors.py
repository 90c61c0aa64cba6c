"""The house: imports go down the floors only, programs' libraries stay on the roof, cold imports need no Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# module or wing of usv -> floor; a wing's modules share its floor
FLOORS = {
    "bounds": 1, "cluster": 1, "cpu": 1, "flow": 1, "video": 1, "config": 1, "files": 1, "metrics": 1,
    "sparse": 2,
    "policy": 3, "patterns": 3, "models": 3,
    "sampling": 4,
    "objectives": 5,
    "training": 6,
    "evaluation": 7,
}  # fmt: skip
ROOF = 7
PROGRAM = ROOF + 1
COMMANDS = {"bench", "compare_budgets", "compare_patterns", "compare_policies", "damages", "decoder", "evaluate", "export", "oracle", "oracle_inputs", "peers", "report", "studio"}  # python -m usv.NAME
RUNTIME = {"accelerate", "deepspeed", "hydra", "trackio", "wandb"}
RUNTIME_FLOOR = FLOORS["training"]
SOURCES = sorted([*(ROOT / "usv").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "train.py", ROOT / "infer.py"])


def imports(path):
    """Absolute dotted names that a file imports anywhere in it, relative imports resolved."""
    package = list(path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted_of(path):
    """usv/policy/gumbel.py -> usv.policy.gumbel; a package's __init__ is the package."""
    parts = path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(dotted):
    """usv.policy.gumbel -> policy; usv -> None; others -> None."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "usv" and len(parts) > 1 else None


def floor_of(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return 0
    if relative.parts[0] != "usv":
        return PROGRAM
    name = relative.with_suffix("").parts[1]
    if name == "__init__":
        return FLOORS["sampling"]  # usv/__init__.py hands out usv.sampling.enable
    return PROGRAM if name in COMMANDS else FLOORS[name]


def circle(edges):
    """The names of a circle in {name: names it imports}, [] where there is none."""
    done, trail = set(), []

    def visit(name):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        trail.append(name)
        found = next(filter(None, map(visit, sorted(edges.get(name, ())))), [])
        trail.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, sorted(edges))), [])


def module_edges(paths):
    """{module: modules it imports}, of these files, imports inside functions counted; usv itself only hands out names."""
    names = {dotted_of(path) for path in paths} - {"usv"}
    return {dotted_of(path): {name for name in imports(path) if name in names} - {dotted_of(path)} for path in paths if dotted_of(path) in names}


def test_every_room_has_a_floor():
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "usv").iterdir() if p.name != "__pycache__"}
    rooms = {name for name in rooms if name != "__init__"}
    assert rooms == set(FLOORS) | COMMANDS, f"say on which floor: {sorted(rooms ^ (set(FLOORS) | COMMANDS))}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    floor = floor_of(path)
    for name in imports(path):
        if name.split(".")[0] in {"train", "infer", "tests", "data"}:
            pytest.fail(f"{path}: imports the program or folder {name}")
        target = room(name)
        assert target not in COMMANDS, f"{path}: imports the command {name}"
        if floor == 0:
            assert name.split(".")[0] != "usv", f"{path}: a kernel imports {name}"
        elif target in FLOORS:
            assert FLOORS[target] <= floor, f"{path} (floor {floor}) imports {name} (floor {FLOORS[target]})"


def test_nothing_but_commands_imports_the_roof():
    for path in SOURCES:
        inside = path.relative_to(ROOT).parts[:2] == ("usv", "evaluation") or path.stem in COMMANDS
        assert inside or "evaluation" not in set(map(room, imports(path))), f"{path} imports usv.evaluation"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_training_and_programs_know_the_runtime(path):
    if floor_of(path) >= RUNTIME_FLOOR:
        return
    found = {name.split(".")[0] for name in imports(path)} & RUNTIME
    assert not found, f"{path}: imports {sorted(found)}, which belongs to training"


def test_the_floor_test_sees_what_it_must():
    """The parser finds lazy, relative and from-imports; a wrong import would be noticed."""
    assert "usv.sampling.enable" in set(imports(ROOT / "usv" / "__init__.py"))  # inside a function
    assert "usv_kernels._checks" in set(imports(ROOT / "kernels" / "usv_kernels" / "_impl.py"))  # relative
    assert "accelerate" in set(imports(ROOT / "usv" / "training" / "ranks.py"))
    assert floor_of(ROOT / "usv" / "policy" / "gumbel.py") == 3 < FLOORS["training"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and circle({"a": {"b", "c"}, "b": {"c"}}) == []
    edges = module_edges(SOURCES)
    assert "usv.training.run" in edges["usv.training.build"] and "usv.flow" in edges["usv.sparse.plan"]


def test_wings_do_not_import_in_circles():
    """Of one floor too: policy, patterns and models know nothing of each other both ways."""
    edges = {}
    for path in SOURCES:
        if (name := room(dotted_of(path))) in FLOORS:
            edges.setdefault(name, set()).update({room(found) for found in imports(path)} & set(FLOORS) - {name})
    assert len(edges) == len(FLOORS) and not circle(edges), f"circle: {' -> '.join(circle(edges))}"


def test_modules_do_not_import_in_circles():
    found = circle(module_edges([path for path in SOURCES if "kernels" not in path.parts]))
    assert not found, f"circle: {' -> '.join(found)}"


def test_files_stay_readable():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 450}
    assert not long, f"more than 450 lines: {long}"


def test_cold_import_without_triton():
    """Library, kernels and models import, and a dense and sparse forward run, where triton cannot be imported at all."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import usv, usv_kernels
assert "torch" in sys.modules and "diffusers" not in sys.modules, "import usv alone must not load diffusers"
import torch, usv.models.forward, usv.models.wan
from usv.sparse.attention import sparse_attention
starts, sizes = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 4], dtype=torch.int32)
q = torch.randn(1, 1, 8, 16)
out, _ = sparse_attention(q, q, q, starts, sizes, 1)
assert out.shape == q.shape and not any(m == "triton" or m.startswith("triton.") for m in sys.modules)
print("cold")
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "cold", done.stderr[-2000:]


def test_kernels_is_never_ours():
    """The hub's `kernels` package must not be shadowed by the folder of that name at the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import sys, importlib.util; sys.path.insert(0, sys.argv[1]); spec = importlib.util.find_spec('kernels');"
        "print(None if spec is None or spec.origin is None else spec.origin)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=ROOT, capture_output=True, text=True, check=True)
    origin = done.stdout.strip()
    assert not origin.startswith(str(ROOT / "kernels")), f"kernels is found at {origin}"
    done = subprocess.run([sys.executable, "-c", code, "/"], cwd="/", capture_output=True, text=True, check=True)
    assert not done.stdout.strip().startswith(str(ROOT / "kernels"))


def test_no_catch_all_rooms():
    names = {p.stem for p in SOURCES}
    assert not names & {"utils", "util", "helpers", "common", "misc", "trainer"}
