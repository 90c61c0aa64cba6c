"""What the compiler makes of every kernel, on a machine without a GPU: `python -m usv_kernels.compile_report`.

The product's own launches are made on GPUs that are not here (`absent_gpu`), so what is compiled is what runs, specialised as at run
time. Tabulated: registers, spills, shared and tensor memory, the occupancy these allow, the work of the matrix instructions over
that of the products, and the instructions of the inner loop; then the companion kernels (`compile_companions`). Figures of compiled
code, not of speed. `--half` takes the representative half that CI looks at.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from ._gpus import GPUS

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")
SIBLINGS = ("sm_86", "sm_103", "sm_121", "gfx90a", "gfx1151")  # of the same tiles as another target
ONE_A_UNIT = ("sm_89", "sm_90", "sm_100", "gfx942", "gfx1100")  # of every kind of matrix instruction the smallest
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Largest query and key block the host knows (0: none), i.e. one tile a block, two tiles a block, and twice the nested loop.
LAYOUTS = {"tile 64": 64, "tile 128": 128, "tile 512": 512, "clusters": 0}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of a tile of queries and keys
# Forwards of rounded products: qk_dtype and pv_dtype. Compiled where the GPU multiplies them natively.
LOWER = {"forward int8": (torch.int8, None), "forward fp8": (torch.float8_e4m3fn, None), "forward fp8 pv": (torch.float8_e4m3fn, torch.float8_e4m3fn)}
LIKE = {"proxy_dkv": "dkv"} | dict.fromkeys(LOWER, "forward")  # whose tile another takes


def kernels():
    """Name -> Triton function, imported here because triton is slow to import and may be absent."""
    from .block_sparse_attention import triton_backward, triton_forward

    return dict.fromkeys(("forward", *LOWER), triton_forward.forward_kernel) | {"dq": triton_backward.dq_kernel, "dkv": triton_backward.dkv_kernel,
            "proxy_dkv": triton_backward.proxy_dkv_kernel, "delta": triton_backward.delta_kernel, "gate_sum": triton_backward.gate_sum_kernel}  # fmt: skip


def launch(name: str, dim: int, dtype: torch.dtype, layout: str, extras: bool, proxy: bool = False) -> None:
    """One of `kernels` as the product launches it; extras: with key bias and block gates; proxy: with means of unlisted blocks."""
    from .block_sparse_attention import triton_launch as launches
    from .selection import BlockSelection, inverted_lists

    batch, heads, largest = 1, 2, LAYOUTS[layout]
    sizes = torch.full((2,), largest or 64)
    mask = torch.ones(batch, heads, 2, 2, dtype=torch.bool)
    sizes = sizes if largest else sizes.expand(batch, heads, 2)
    lists = BlockSelection.from_mask(mask, sizes, sizes)
    lists, length, bounds = lists.tensors(), int(sizes.sum(-1).max()), (largest, largest)
    q, k, v, grad = (torch.zeros(batch, heads, length, dim, dtype=dtype) for _ in range(4))
    bias, gate = (torch.zeros(batch, heads, length), torch.zeros(batch, heads, 2, 2)) if extras else (None, None)
    means = torch.zeros(batch, heads, 2, dim, dtype=dtype)
    means = (means, means, torch.zeros(batch, heads, 2)) if proxy else None
    if name == "forward":
        launches.forward(q, k, v, lists, bias, gate, 1.0, *bounds, means)
    elif name in LOWER:
        launches.forward_low_precision(q, k, v, lists, bias, gate, 1.0, *bounds, *LOWER[name])
    elif name == "delta":
        launches._delta(grad, grad, torch.zeros(batch, heads, length) if extras else None)
    else:
        rows = torch.zeros(batch, heads, length)
        strides = (0, 0) if bias is None else bias.stride()[:2]
        rest = (q, k, v, grad, rows, rows, bias, strides, gate, lists, 1.0, *bounds)
        proxies = launches._proxy_arguments(means, *lists[:2])
        if name == "proxy_dkv":
            launches._launch_proxy_dkv(q, grad, rows, rows, proxies, lists, 1.0, largest)
        elif name == "dkv":
            dbias = None if bias is None else torch.zeros(batch, heads, length)
            launches._launch_dkv(torch.zeros_like(k), torch.zeros_like(v), dbias, *inverted_lists(*lists[:2], 2), *rest)
        else:
            launches._launch_dq(torch.zeros_like(q), gate, *rest, proxies)


def attention_row(name: str, dim: int, dtype: torch.dtype, layout: str, extras: bool, proxy: bool, target: str) -> dict:
    """A row of the report, compiled in this process, whose driver becomes that of the target."""
    from . import absent_gpu
    from .block_sparse_attention import triton_launch
    from .machine_code import figures

    absent_gpu.become(target)
    kernels()[name].device_caches.clear()  # what it compiled before, the same perhaps
    launch(name, dim, dtype, layout, extras, proxy)
    compiled, gpu, largest = absent_gpu.compiled(kernels()[name])[-1], GPUS[target], LAYOUTS[layout]
    tiled = LIKE.get(name, name)
    cfg = triton_launch.config(tiled, dim, dtype, largest, largest, gpu, proxy and tiled == name) if tiled in PRODUCTS else triton_launch.Config(64, 0, 4, 3)
    found = figures(compiled, gpu)
    # Of a loop over listed blocks and one over proxies, which are alike, one is counted.
    useful = PRODUCTS.get(tiled, 0) * cfg.BM * cfg.BN * (dim if cfg.halves else triton_launch.triton.next_power_of_2(dim))
    return {
        "kernel": name, "D": dim, "dtype": TYPES[dtype], "layout": layout, "bias_and_gate": extras, "proxy": proxy, "BM": cfg.BM, "BN": cfg.BN,
        "warps": cfg.num_warps, "stages": cfg.num_stages, "halves": cfg.halves, **found,
        "matrix_work": found["matrix_work"] / useful if found["matrix_work"] else None,
    }  # fmt: skip


def lower(target: str) -> list[str]:
    """Of `LOWER` what the GPU multiplies."""
    native = {torch.int8: GPUS[target].int8, torch.float8_e4m3fn: GPUS[target].fp8, None: True}
    return [name for name, dtypes in LOWER.items() if all(native[dtype] for dtype in dtypes)]


def variants(half: bool):
    """(name, D, dtype, layout, extras, proxy, target). half: what CI compiles; most of the smallest target of every kind of matrix
    instruction, least of siblings, which share their tiles with the target before them."""
    bf16, main, extras = torch.bfloat16, tuple(PRODUCTS), (False, True)
    for target in TARGETS:
        if half:
            for name in main:
                yield from ((name, 128, bf16, layout, True, False, target) for layout in ("tile 64", "clusters"))
                if target not in SIBLINGS:
                    yield (name, 96, bf16, "tile 128", True, False, target)
                if target in ONE_A_UNIT:
                    yield (name, 64, bf16, "tile 64", True, False, target)
                    yield (name, 128, bf16, "tile 64", False, name != "dkv", target)
            if target in ONE_A_UNIT:
                yield from ((name, 128, bf16, "tile 64", False, False, target) for name in lower(target))
            continue
        for name in main:
            for dim in (64, 128):
                yield from ((name, dim, bf16, layout, more, False, target) for layout in LAYOUTS for more in extras if more or layout != "tile 512")
                yield (name, dim, torch.float16, "tile 64", True, False, target)
                yield from ((name, dim, torch.float32, layout, True, False, target) for layout in ("tile 64", "clusters"))
            for dim in (32, 96):
                yield from ((name, dim, bf16, layout, True, False, target) for layout in ("tile 64", "tile 128", "clusters"))
            if name != "dkv":
                yield from ((name, 128, bf16, layout, False, True, target) for layout in ("tile 64", "clusters"))
        yield from ((name, dim, bf16, layout, False, False, target) for name in lower(target) for dim, layout in ((64, "tile 64"), (128, "tile 64"), (128, "clusters")))
        yield ("proxy_dkv", 128, bf16, "tile 64", False, True, target)
        yield from ((name, 128, bf16, "tile 64", True, False, target) for name in ("delta", "gate_sum"))


LOOP = ("mma", "exp", "fp32", "shared", "async copy", "global", "local", "other")


def markdown(rows: list[dict], columns: dict) -> str:
    """A table; columns: heading -> the cell of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell(r)) for cell in columns.values()) + " |" for r in rows])


def summary(rows: list[dict]) -> str:
    """One line a target: what the tables below have to show."""
    main = [r for r in rows if r["kernel"] in PRODUCTS]

    def of(target: str, condition) -> list[dict]:
        return [r for r in main if r["target"] == target and condition(r)]

    def wide(r: dict, name: str) -> bool:
        return r["kernel"] == name and r["D"] == 128 and r["layout"] == "tile 64" and r["dtype"] != "fp32"

    def products(target: str) -> str:
        work = [r["matrix_work"] for r in of(target, lambda r: r["dtype"] != "fp32")]
        return f"{min(work):.2f} to {max(work):.2f}" if work and None not in work else "not counted"

    return markdown([{"target": target} for target in dict.fromkeys(r["target"] for r in main)], {
        "target": lambda r: r["target"], "kernels": lambda r: len(of(r["target"], lambda _: True)),
        "spilling": lambda r: len(of(r["target"], lambda x: x["spills"] > 0)),
        "in a loop": lambda r: len(of(r["target"], lambda x: x["inner_loop"].get("local", 0) > 0)),
        "of these forward": lambda r: len(of(r["target"], lambda x: x["inner_loop"].get("local", 0) > 0 and x["kernel"] == "forward")),
        "margin of shared memory, KiB": lambda r: f"{min(x['shared_limit'] - x['shared_bytes'] for x in of(r['target'], lambda _: True)) / 1024:.1f}",
        "products executed / needed": lambda r: products(r["target"]),
        "programs, D 128 tile 64: forward, dq, dkv": lambda r: ", ".join(
            str(min((x["programs_per_sm"] for x in of(r["target"], lambda x: wide(x, name))), default="-")) for name in PRODUCTS),
    })  # fmt: skip


def table(rows: list[dict]) -> str:
    """One line an attention variant, or a companion kernel."""
    own = {
        "D": lambda r: r["D"], "dtype": lambda r: r["dtype"], "layout": lambda r: r["layout"],
        "bias, gate": lambda r: "yes" if r["bias_and_gate"] else "no", "proxy": lambda r: "yes" if r["proxy"] else "no",
        "BM x BN": lambda r: f"{r['BM']} x {r['BN']}{' in halves' if r['halves'] else ''}", "stages": lambda r: r["stages"],
        "products": lambda r: "-" if r["matrix_work"] is None else f"{r['matrix_work']:.2f}",
    }  # fmt: skip
    if rows and "constants" in rows[0]:
        own = {"types": lambda r: r["types"], "constants": lambda r: ", ".join(f"{k} {v}" for k, v in r["constants"].items())}
    return markdown(rows, {"target": lambda r: r["target"], "kernel": lambda r: r["kernel"]} | own | {
        "warps": lambda r: r["warps"], "registers": lambda r: r["registers"], "spills": lambda r: r["spills"],
        "shared KiB": lambda r: f"{r['shared_bytes'] / 1024:.1f}", "programs/SM": lambda r: r["programs_per_sm"],
        "inner loop: " + ", ".join(LOOP): lambda r: ", ".join(str(r["inner_loop"].get(kind, 0)) for kind in LOOP) if r["inner_loop"] else "no loop",
    })  # fmt: skip


def work(half: bool) -> list[tuple]:
    """What there is to compile: ("attention", *variant) and ("companion", index, target)."""
    from .compile_companions import kernels as companion_kernels

    targets = ONE_A_UNIT if half else TARGETS
    companions = [("companion", i, target) for target in targets for i in range(len(companion_kernels(GPUS[target])))]
    return [("attention", *variant) for variant in variants(half)] + companions


def compile_one(task: tuple) -> dict:
    """The row of one entry of `work`."""
    kind, *rest = task
    if kind == "companion":
        from .compile_companions import build
        from .compile_companions import kernels as companion_kernels

        index, target = rest
        return build(*companion_kernels(GPUS[target])[index], GPUS[target])
    return attention_row(*rest)


def write(path: Path, text: str) -> None:
    """All or nothing, so that two runs at once never leave a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--half", action="store_true", help="the representative half that CI compiles")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, help="only these")
    parser.add_argument("--out", type=Path, default=Path("data/results"), help="folder of the written report")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing can be compiled in the interpreter, unset it")
    import triton

    args.out.mkdir(parents=True, exist_ok=True)
    tasks = [task for task in work(args.half) if task[-1] in args.targets]
    # Spawned: a fork would inherit whatever threads torch has started.
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(compile_one, tasks))
    attention, companions = ([r for task, r in zip(tasks, rows) if task[0] == kind] for kind in ("attention", "companion"))
    header = (f"torch {torch.__version__}, triton {triton.__version__}; compiled, not run: no figure here is a time. Spills: loads and stores of local memory (AMD: spilled registers); "
              "programs/SM: how many fit on a multiprocessor (AMD: a compute unit) at one time, by registers, shared and tensor memory, and warps; products: work of the matrix instructions "
              "in a pass of the loop over that of the products.")  # fmt: skip
    text = f"# Kernels as compiled\n\n{header}\n\n{summary(attention)}\n\n## Attention\n\n{table(attention)}\n\n## Companions\n\n{table(companions)}\n"
    print(summary(attention))
    print(f"{len(rows)} variants, {sum(r['spills'] > 0 for r in rows)} with spills")
    write(args.out / "kernels_compiled.md", text)
    write(args.out / "kernels_compiled.json", json.dumps({"torch": torch.__version__, "triton": triton.__version__, "rows": attention, "companions": companions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
