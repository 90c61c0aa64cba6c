"""Shows that the tests of the companion operations can fail: plants one bug at a time in a copy and runs them on it.

Usage: python tests/kernels/mutate_companions.py [words that a bug's operation, file or text must contain]
Exits with an error if a bug survives. Not part of the test suite: it takes minutes.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
# Operation, file, what stands there, the bug, and which of the operation's tests run (an expression for pytest -k).
BUGS = [
    ("block_pool", "triton", "mask = (t < size)[:, None] &", "mask = (t <= size)[:, None] &", "layouts and triton"),
    ("block_pool", "triton", "tl.maximum(size, 1).to", "tl.maximum(BLOCK_T, 1).to", "layouts and triton"),
    ("block_pool", "cpu", "grad_BHMD.to(acc) / sizes_M.clamp(min=1).unsqueeze(-1)", "grad_BHMD.to(acc)", "layouts and cpu"),
    ("block_pool", "cpu", "mean(-2, dtype=accumulator(x.dtype))", "mean(-2, dtype=x.dtype).mul(1.01)", "layouts and cpu"),
    ("block_pool", "cpu", 'check_blocks("sizes", starts_M', 'check_blocks("sizes", 0 * starts_M', "refusals"),
    ("block_pool", "cpu", "if rest else means", "if False else means", "cpu"),
    ("block_pool", "cpu", "share[:, :, :whole].unsqueeze(3)", "share[:, :, :1].unsqueeze(3)", "cpu"),
    ("block_pool", "cpu", "copy_(share[:, :, -1:])", "copy_(share[:, :, :1])", "cpu"),
    ("select", "triton", "num_above + before < least", "num_above + before <= least", "ties and triton"),
    ("select", "triton", "key > threshold), allowed", "key >= threshold), allowed", "ties and triton"),
    ("select", "triton", "tl.where(x == 0.0, 0.0, x)", "x", "ties and triton"),
    ("select", "cpu", "rank -= np.arange", "rank += np.arange", "ties and cpu"),
    ("select", "cpu", "0.0, order", "-0.0, order", "ties and cpu"),
    ("select", "cpu", "bits ^ ((bits >> 63) & HIGHEST)", "bits.copy()", "random and cpu"),
    ("select", "cpu", "where=np.isnan(scores)", "where=False", "nan and cpu"),
    ("select", "cpu", "keys > LOWEST", "keys == keys", "nan and cpu"),
    ("select", "cpu", "where=index[..., :slots] < blocks", "where=True", "ties and cpu"),
    ("select", "cpu", "capacity and allowed.all()", "capacity", "ties and cpu"),
    ("select", "cpu", "blocks - rows_BHM.numpy()", "rows_BHM.numpy()", "counts and cpu"),
    ("select", "cpu", "mass.cumsum(-1) - mass", "mass.cumsum(-1)", "top_p and cpu"),
    ("select", "cpu", "(torch.arange(blocks) < floor)", "(torch.arange(blocks) <= floor)", "crossing and cpu"),
    ("select", "__init__", ".clamp(1, capacity)", ".clamp(1)", "capacity"),
    ("select", "triton", "p = tl.where(defined | (p > 1.0), p, 0.0)", "p = p * 1.0", "without_a_mass and triton"),
    ("select", "__init__", "not empty.any()", "True", "nan and cpu"),
    ("block_pool", "cpu", "sum(-2).div_(size)", "sum(-2)", "cpu"),
    ("select", "reference", "before = mass.cumsum(-1) - mass", "before = mass.cumsum(-1)", "top_p and reference"),
    ("select", "__init__", "round(floor * num_kv, 9)", "floor * num_kv", "floor"),
    ("token_merge", "triton", "t[:, None] < t[None, :]", "t[:, None] > t[None, :]", "ties and triton"),
    ("token_merge", "triton", "row_j - own", "row_j", "merge_and_unmerge and triton"),
    ("token_merge", "triton", "here = slot == own_slot", "here = member >= 0", "merge_and_unmerge and triton"),
    ("token_merge", "cpu", "div_(sizes[..., None])", "div_(sizes[..., None] - 1 + (sizes[..., None] == 1))", "merge"),
    ("token_merge", "__init__", "(grad / sizes[..., None])", "grad", "merge_and_unmerge and cpu"),
    ("token_merge", "layout", "present = [p for p in cell if 0 <= p < size]", "present = list(cell)", "match and cpu"),
    ("permute", "__init__", "inverse_permutation(index.contiguous())", "index.contiguous()", "rows and cpu"),
    ("permute", "triton", "b * index_b + h * index_h", "b * index_b", "rows and triton"),
    ("permute", "cpu", "lead // heads * length", "lead * length", "rows and cpu"),
    ("permute", "cpu", "lead * length + index", "index", "rows and cpu"),
    ("permute", "cpu", "except IndexError", "except KeyError", "long"),
    ("permute", "cpu", 'check_range("index", index_BHS, length', 'check_range("index", index_BHS, length + 1', "refusals"),
    ("kmeans", "cpu", "mul(-0.5)", "mul(-1.0)", "iteration and cpu"),
    ("kmeans", "cpu", "centroids = centroids - offset", "offset = offset * 0", "offset and cpu"),
    ("kmeans", "triton", "here > best", "here >= best", "ties and triton"),
    ("kmeans", "triton", "tl.dot(x, high) + tl.dot(x, low)", "tl.dot(x, high)", "finer and triton"),
    ("kmeans", "triton", "tl.where(count > 0,", "tl.where(count >= 0,", "iteration and triton"),
    ("norm_rope", "triton", "unit * along", "unit", "gradients and triton"),
    ("norm_rope", "triton", "odd * cos - even * sin", "odd * cos + even * sin", "gradients and triton"),
    ("norm_rope", "triton", "load(positions_ptr + row)", "load(positions_ptr + s)", "gradients and triton"),
    ("norm_rope", "triton", "turn * programs", "turn", "programs"),
    ("norm_rope", "triton", "(cos, sin) if cos.stride() == sin.stride() else", "(cos, sin) if True else", "any_strides and triton"),
    ("token_merge", "triton", "tl.program_id(1) * BLOCK_C", "0", "channels and triton"),
    ("permute", "__init__", "torch.zeros_like(index).scatter_", "torch.full_like(index, 99).scatter_", "twice and cpu"),
    ("norm_rope", "cpu", "-sin_TP", "sin_TP", "gradients and cpu"),
    ("norm_rope", "__init__", "sin[:, 1::2]", "cos[:, 1::2]", "diffusers and cpu"),
]


def survives(folder: pathlib.Path, op: str, name: str, old: str, new: str, tests: str) -> bool:
    path = folder / "kernels" / "usv_kernels" / op / f"{name}.py"
    source = path.read_text()
    assert old in source, f"{path}: {old!r} is not there"
    path.write_text(source.replace(old, new))
    environment = {**os.environ, "PYTHONPATH": str(folder / "kernels")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qx",
        "-p",
        "no:cacheprovider",
        f"tests/kernels/test_{op}.py",
        "-k",
        tests,
    ]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    path.write_text(source)
    assert run.returncode in (0, 1), run.stdout[-2000:] + run.stderr[-2000:]
    return run.returncode == 0


def main() -> int:
    chosen = [bug for bug in BUGS if not sys.argv[1:] or any(word in " ".join(bug) for word in sys.argv[1:])]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ("kernels", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for bug in chosen:
            alive = survives(folder, *bug)
            survivors += alive
            print("SURVIVED" if alive else "caught  ", f"{bug[0]}/{bug[1]}.py: {bug[2]!r} -> {bug[3]!r}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} bugs caught")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main())
