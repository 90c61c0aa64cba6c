"""The house: imports go down the floors only, programs' libraries stay on the roof, cold imports need no Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# module (or package) of usv -> floor; a package's modules share its floor
FLOORS = {
    "cpu": 1, "grid": 1, "flow": 1, "plan": 1, "cost": 1, "config": 1,
    "policy": 2, "patterns": 2,
    "attention": 3, "sequence_parallel": 3,
    "models": 4, "lora": 5,
    "distill": 5, "data": 5, "buckets": 5, "checkpoint": 5, "metrics": 5, "video": 5,
    "sampler": 5, "remote": 1, "optim": 5, "matching": 5,
    "pipeline": 6, "patterns_pipeline": 6, "generate": 6,
    "compare_patterns": 7, "compare_report": 7, "matched_density": 7,
    "training": 7, "build": 7, "validation": 7, "dry_run": 7, "runtime": 7, "run_state": 7, "export": 7, "tracking": 7, "evaluate": 7, "compare_policies": 7, "oracle": 7, "oracle_steps": 7, "bench": 7, "report": 7, "peers": 7,
}  # fmt: skip
ROOF = 7
RUNTIME = {"accelerate", "deepspeed", "hydra", "trackio", "wandb"}
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


def room(dotted):
    """usv.policy.gumbel -> policy; usv -> None; others -> None."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "usv" and len(parts) > 1 else None


def floor_of(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return 0
    if relative.parts[0] != "usv":
        return ROOF + 1  # programs
    if relative.name == "__init__.py" and len(relative.parts) == 2:
        return ROOF - 1  # usv/__init__.py hands out usv.pipeline
    return FLOORS[relative.with_suffix("").parts[1]]


def test_every_room_has_a_floor():
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "usv").iterdir() if p.name != "__pycache__"}
    rooms = {name for name in rooms if name != "__init__"}
    assert rooms <= set(FLOORS), f"say on which floor: {sorted(rooms - set(FLOORS))}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    floor = floor_of(path)
    for name in imports(path):
        if name.split(".")[0] in {"train", "infer", "tests", "data"}:
            pytest.fail(f"{path}: imports the program or folder {name}")
        target = room(name)
        if floor == 0:
            assert name.split(".")[0] != "usv", f"{path}: a kernel imports {name}"
        elif target in FLOORS:
            assert FLOORS[target] <= min(floor, ROOF), f"{path} (floor {floor}) imports {name} (floor {FLOORS[target]})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_roof_knows_the_runtime(path):
    if floor_of(path) >= ROOF:
        return
    found = {name.split(".")[0] for name in imports(path)} & RUNTIME
    assert not found, f"{path}: imports {sorted(found)}, which belongs on the roof"


def test_the_floor_test_sees_what_it_must():
    """The parser finds lazy, relative and from-imports; a wrong import would be noticed."""
    assert "usv.pipeline" in set(imports(ROOT / "usv" / "__init__.py"))  # inside a function
    assert "usv_kernels._checks" in set(imports(ROOT / "kernels" / "usv_kernels" / "_impl.py"))  # relative
    assert "accelerate" in set(imports(ROOT / "usv" / "runtime.py"))
    assert floor_of(ROOT / "usv" / "policy" / "gumbel.py") == 2 < FLOORS["training"]


def test_rooms_of_one_floor_do_not_import_in_circles():
    edges = {}
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "usv" and path.parent != ROOT / "usv" or path.stem == "__init__" or "usv" not in path.parts[-2:]:
            continue
        edges[path.stem] = {room(name) for name in imports(path)} & set(FLOORS) - {path.stem}

    def visit(name, trail):
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        for following in edges.get(name, ()):
            visit(following, [*trail, name])

    assert len(edges) >= 10
    for name in edges:
        visit(name, [])


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
import torch, usv.models.wan as wan
from usv.attention import sparse_attention
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
