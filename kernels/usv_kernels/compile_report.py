"""What the compiler makes of every kernel, on a machine without a GPU: `python -m usv_kernels.compile_report`.

Compiles each kernel and tile shape to machine code for sm_80, sm_90 and sm_100 and to gfx942 assembly, disassembles it, and
tabulates registers, spills, shared memory, the occupancy these allow, and the instructions of the inner loop; then the
companion kernels (`compile_companions`). Figures of compiled code, not of speed. About 70 seconds on two cores.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from .machine_code import amd_figures, nvidia_figures

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Largest query and key block the host knows (0: none), i.e. one tile a block, two tiles a block, and twice the nested loop.
LAYOUTS = {"tile 64": 64, "tile 128": 128, "tile 512": 512, "clusters": 0}


def kernels():
    """Name -> Triton function, imported here because triton is slow to import and may be absent."""
    from .block_sparse_attention import triton_backward, triton_forward

    return {"forward": triton_forward.forward_kernel, "dq": triton_backward.dq_kernel, "dkv": triton_backward.dkv_kernel,
            "delta": triton_backward.delta_kernel, "gate_sum": triton_backward.gate_sum_kernel}  # fmt: skip


def source(name: str, dim: int, dtype: torch.dtype, layout: str, extras: bool, arch: int):
    """ASTSource and tile shape of one variant, typed as `triton_launch` calls it; extras: with key bias and block gates."""
    import triton
    from triton.compiler import ASTSource

    from .block_sparse_attention import triton_launch as launch

    function, largest = kernels()[name], LAYOUTS[layout]
    cfg = launch.config(name, dim, dtype, largest, largest, arch) if name in ("forward", "dq", "dkv") else launch.Config(64, 64, 4, 3)
    constants = {"BM": cfg.BM, "BN": cfg.BN, "D": dim, "DP": triton.next_power_of_2(dim), "HAS_BIAS": extras,
                 "HAS_GATE": extras, "HAS_GRAD_LSE": extras, "BK": 128,
                 "KV_TILES": launch.tiles_per_block(largest, cfg.BN), "Q_TILES": launch.tiles_per_block(largest, cfg.BM)}  # fmt: skip
    operands = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    floats = ("lse_ptr", "delta_ptr", "bias_ptr", "gate_ptr", "dbias_ptr", "dgate_ptr", "grad_lse_ptr", "partial_ptr")
    signature, constexprs, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        argument = parameter.name
        if parameter.is_constexpr:
            signature[argument], constexprs[argument] = "constexpr", constants[argument]
        elif argument in ("bias_ptr", "gate_ptr", "dbias_ptr", "dgate_ptr", "grad_lse_ptr") and not extras and name != "gate_sum":
            signature[argument], constexprs[argument] = "constexpr", None
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + (TYPES[dtype] if argument in operands else "fp32" if argument in floats else "i32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
            if not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constexprs, attributes), cfg


def compile_nvidia(name, dim, dtype, layout, extras, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget

    ast, cfg = source(name, dim, dtype, layout, extras, arch)
    options = {"num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, figures = compiled.asm["ptx"], nvidia_figures(compiled, cfg.num_warps, arch)
    return {
        **described(name, dim, dtype, layout, extras, cfg), **figures, "warps_per_sm": figures["programs_per_sm"] * cfg.num_warps,
        "wgmma": ptx.count("wgmma.mma_async"), "tensor_work": wgmma_work(ptx, name, cfg, triton.next_power_of_2(dim)),
        "tcgen05": ptx.count("tcgen05.mma"), "mma_sync": ptx.count("mma.sync"),
        "loads_16_bytes": len(re.findall(r"cp\.async\.c[ag]\S* .*, 0x10", ptx)) + len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
    }  # fmt: skip


PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of a tile of queries and keys


def wgmma_work(ptx: str, name: str, cfg, dim: int) -> float | None:
    """Operations of a kernel's wgmma instructions over those of its products: above 1 warpgroups compute the same. None without."""
    columns = [int(n) for n in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k16", ptx)]
    return 64 * 16 * sum(columns) * (cfg.num_warps // 4) / (PRODUCTS[name] * cfg.BM * cfg.BN * dim) if columns else None


def compile_amd(name, dim, dtype, layout, extras) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget

    from .block_sparse_attention.triton_launch import AMD

    ast, cfg = source(name, dim, dtype, layout, extras, AMD)
    options = {"num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
    compiled = triton.compile(ast, target=GPUTarget("hip", "gfx942", 64), options=options)
    figures = amd_figures(compiled, cfg.num_warps)
    return {
        **described(name, dim, dtype, layout, extras, cfg), **figures, "warps_per_sm": figures["programs_per_sm"] * cfg.num_warps,
        "mfma": len(re.findall(r"v_mfma", compiled.asm["amdgcn"])),
    }  # fmt: skip


def described(name, dim, dtype, layout, extras, cfg) -> dict:
    return {"kernel": name, "D": dim, "dtype": TYPES[dtype], "layout": layout, "bias_and_gate": extras, "BM": cfg.BM,
            "BN": cfg.BN, "warps": cfg.num_warps, "stages": cfg.num_stages}  # fmt: skip


def variants():
    """(name, D, dtype, layout, extras, target): every kernel, target, dtype and form of the loop."""
    half, full, main = torch.bfloat16, torch.float32, ("forward", "dq", "dkv")
    for target in (80, 90, 100):
        for name in main:
            for dim in (32, 64, 96, 128):
                yield from ((name, dim, half, layout, extras, target) for layout in LAYOUTS for extras in (False, True) if extras or layout != "tile 512")
                yield from ((name, dim, torch.float16, "tile 64", True, target) for _ in (0,))
                yield from ((name, dim, full, layout, True, target) for layout in ("tile 64", "clusters"))
        yield from ((name, dim, half, "tile 64", True, target) for name in ("delta", "gate_sum") for dim in (64, 128))
    yield from ((name, dim, half, layout, True, "gfx942") for name in main for dim in (64, 128) for layout in LAYOUTS)


LOOP = ("mma", "exp", "fp32", "shared", "async copy", "global", "local", "other")


def markdown(rows: list[dict], columns: dict) -> str:
    """A table; columns: heading -> the cell of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell(r)) for cell in columns.values()) + " |" for r in rows])


def table(rows: list[dict]) -> str:
    """One line an attention variant, or a companion kernel."""
    own = {
        "D": lambda r: r["D"], "dtype": lambda r: r["dtype"], "layout": lambda r: r["layout"],
        "bias, gate": lambda r: "yes" if r["bias_and_gate"] else "no", "BM x BN": lambda r: f"{r['BM']} x {r['BN']}",
        "stages": lambda r: r["stages"],
    }  # fmt: skip
    if rows and "constants" in rows[0]:
        own = {"types": lambda r: r["types"], "constants": lambda r: ", ".join(f"{k} {v}" for k, v in r["constants"].items())}
    return markdown(rows, {"target": lambda r: r["target"], "kernel": lambda r: r["kernel"]} | own | {
        "warps": lambda r: r["warps"], "registers": lambda r: r["registers"], "spills": lambda r: r["spills"],
        "shared KiB": lambda r: f"{r['shared_bytes'] / 1024:.1f}", "programs/SM": lambda r: r["programs_per_sm"],
        "inner loop: " + ", ".join(LOOP): lambda r: ", ".join(str(r["inner_loop"].get(kind, 0)) for kind in LOOP) if r["inner_loop"] else "no loop",
    })  # fmt: skip


def work() -> list[tuple]:
    """What there is to compile: ("attention", *variant) and ("companion", index, target)."""
    from .compile_companions import kernels as companion_kernels

    companions = [("companion", i, target) for target in (80, 90, 100, "gfx942") for i in range(len(companion_kernels(target)))]
    return [("attention", *variant) for variant in variants()] + companions


def compile_one(task: tuple) -> dict:
    """The row of one entry of `work`."""
    kind, *rest = task
    if kind == "companion":
        from .compile_companions import build
        from .compile_companions import kernels as companion_kernels

        index, target = rest
        return build(*companion_kernels(target)[index], target)
    *variant, target = rest
    return compile_amd(*variant) if target == "gfx942" else compile_nvidia(*variant, target)


def write(path: Path, text: str) -> None:
    """All or nothing, so that two runs at once never leave a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--out", type=Path, default=Path("data/results"), help="folder of the written report")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing can be compiled in the interpreter, unset it")
    import triton

    args.out.mkdir(parents=True, exist_ok=True)
    tasks = work()
    # Spawned: a fork would inherit whatever threads torch has started.
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(compile_one, tasks))
    attention, companions = ([r for task, r in zip(tasks, rows) if task[0] == kind] for kind in ("attention", "companion"))
    header = (f"torch {torch.__version__}, triton {triton.__version__}; compiled, not run: no figure here is a time. Spills: loads and stores of local memory (gfx942: spilled registers); "
              "programs/SM: how many fit on a multiprocessor (gfx942: a compute unit) at one time, by registers and shared memory.")  # fmt: skip
    text = f"# Kernels as compiled\n\n{header}\n\n## Attention\n\n{table(attention)}\n\n## Companions\n\n{table(companions)}\n"
    print(text)
    print(f"{len(rows)} variants, {sum(r['spills'] > 0 for r in rows)} with spills")
    write(args.out / "kernels_compiled.md", text)
    write(args.out / "kernels_compiled.json", json.dumps({"torch": torch.__version__, "triton": triton.__version__, "rows": attention, "companions": companions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
