"""What the compiler makes of every attention kernel, on a machine without a GPU: `python -m usv_kernels.compile_report`.

Compiles each kernel and tile shape to machine code for sm_80, sm_90 and sm_100 and to gfx942 assembly, disassembles it, and
tabulates registers, spills, shared memory, the occupancy these allow, and the instructions of the inner loop. Figures of
compiled code, not of speed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

# Shared memory a program may use, and registers and shared memory of a multiprocessor (CUDA programming guide, table of
# compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_TOTAL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, MAX_WARPS, SHARED_RESERVED = 65536, 64, 1024
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MIX = {
    "mma": r"HGMMA|HMMA|UTC\w*MMA",
    "exp": r"MUFU",
    "fp32": r"FFMA|FMUL|FADD|FMNMX|FSEL",
    "shared": r"LDS|STS|LDSM|LDTM|STTM",
    "async copy": r"LDGSTS|UTMALDG",
    "global": r"LDG|STG",
    "local": r"LDL|STL",
}
# Largest query and key block the host knows (0: none), i.e. one tile a block, two tiles a block, the nested loop.
LAYOUTS = {"tile 64": 64, "tile 128": 128, "clusters": 0}


def kernels():
    """Name -> Triton function, imported here because triton is slow to import and may be absent."""
    from .block_sparse_attention import triton_backward, triton_forward

    return {"forward": triton_forward.forward_kernel, "dq": triton_backward.dq_kernel, "dkv": triton_backward.dkv_kernel,
            "delta": triton_backward.delta_kernel, "gate_sum": triton_backward.gate_sum_kernel}  # fmt: skip


def source(name: str, dim: int, dtype: torch.dtype, layout: str, extras: bool):
    """ASTSource and options of one variant, typed as `triton_launch` calls it; extras: with key bias and block gates."""
    from triton.compiler import ASTSource

    from .block_sparse_attention import triton_launch as launch

    function, largest = kernels()[name], LAYOUTS[layout]
    cfg = launch.config(name, dim, dtype, largest, largest) if name in ("forward", "dq", "dkv") else launch.Config(64, 64, 4, 3)
    constants = {"BM": cfg.BM, "BN": cfg.BN, "D": dim, "DP": 1 << (dim - 1).bit_length(), "HAS_BIAS": extras,
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


def tool(name: str, *arguments: str) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def inner_loop(sass: str) -> Counter:
    """Counts by kind of the instructions in the loop with the most matrix instructions (or, without any, the longest)."""
    position, code, loops = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            position[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
            if (jump := re.search(r"BRA.*`\(\.(L_x_\d+)\)", instruction[1])) and position.get(jump[1], len(code)) < len(code) - 1:
                loops.append((position[jump[1]], len(code)))

    def count(span):
        return Counter(kind for text in code[slice(*span)] for kind in kinds(text))

    def kinds(text):
        mnemonic = re.sub(r"^@!?U?P\w+\s+", "", text)
        yield "total"
        yield next((kind for kind, pattern in MIX.items() if re.match(pattern, mnemonic)), "other")

    counts = [count(span) for span in loops]
    return max(counts, key=lambda c: (c["mma"] > 0, -c["total"] if c["mma"] else c["total"]), default=Counter())


def compile_nvidia(name, dim, dtype, layout, extras, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget

    ast, cfg = source(name, dim, dtype, layout, extras)
    options = {"num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(path))
        sass = tool("nvdisasm", "-c", str(path))
    ptx, registers, shared = compiled.asm["ptx"], int(re.search(r"REG:(\d+)", usage)[1]), compiled.metadata.shared
    per_register = REGISTERS // (-(-registers // 8) * 8 * 32 * cfg.num_warps)
    per_shared = SHARED_TOTAL[arch] // (shared + SHARED_RESERVED)
    programs = min(per_register, per_shared, MAX_WARPS // cfg.num_warps)
    return {
        **described(name, dim, dtype, layout, extras, cfg), "target": f"sm_{arch}", "registers": registers,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)), "shared_bytes": shared, "shared_limit": SHARED_LIMIT[arch],
        "programs_per_sm": programs, "warps_per_sm": programs * cfg.num_warps,
        "wgmma": ptx.count("wgmma.mma_async"), "tcgen05": ptx.count("tcgen05.mma"), "mma_sync": ptx.count("mma.sync"),
        "loads_16_bytes": len(re.findall(r"cp\.async\.c[ag]\S* .*, 0x10", ptx)) + len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.M)), "inner_loop": dict(inner_loop(sass)),
    }  # fmt: skip


def compile_amd(name, dim, dtype, layout, extras) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget

    ast, cfg = source(name, dim, dtype, layout, extras)
    options = {"num_warps": cfg.num_warps, "num_stages": min(cfg.num_stages, 2)}
    compiled = triton.compile(ast, target=GPUTarget("hip", "gfx942", 64), options=options)
    assembly = compiled.asm["amdgcn"]

    def field(key):
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return {
        **described(name, dim, dtype, layout, extras, cfg), "target": "gfx942", "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"), "shared_bytes": compiled.metadata.shared, "shared_limit": 64 * 1024,
        "mfma": len(re.findall(r"v_mfma", assembly)),
    }  # fmt: skip


def described(name, dim, dtype, layout, extras, cfg) -> dict:
    return {"kernel": name, "D": dim, "dtype": TYPES[dtype], "layout": layout, "bias_and_gate": extras, "BM": cfg.BM,
            "BN": cfg.BN, "warps": cfg.num_warps, "stages": cfg.num_stages}  # fmt: skip


def variants(quick: bool):
    """(name, D, dtype, layout, extras, target) of the report, or of the tests' subset: every kernel, target and loop form."""
    half, full, main = torch.bfloat16, torch.float32, ("forward", "dq", "dkv")
    if quick:
        for target in (80, 90, 100):
            yield from ((name, dim, half, "tile 64", True, target) for name in main for dim in (64, 128))
        yield from ((name, 128, half, "clusters", True, 90) for name in main)
        yield from ((name, 128, full, "tile 64", False, 80) for name in main)
        yield from ((name, 64, half, "tile 64", True, "gfx942") for name in main)
        yield from ((name, 64, half, "tile 64", True, 90) for name in ("delta", "gate_sum"))
        return
    for target in (80, 90, 100):
        for name in main:
            for dim in (32, 64, 96, 128):
                yield from ((name, dim, half, layout, extras, target) for layout in LAYOUTS for extras in (False, True))
                yield from ((name, dim, torch.float16, "tile 64", True, target) for _ in (0,))
                yield from ((name, dim, full, layout, True, target) for layout in ("tile 64", "clusters"))
        yield from ((name, dim, half, "tile 64", True, target) for name in ("delta", "gate_sum") for dim in (64, 128))
    yield from ((name, dim, half, layout, True, "gfx942") for name in main for dim in (64, 128) for layout in LAYOUTS)


def table(rows: list[dict]) -> str:
    """Markdown, one line a variant."""
    lines = ["| target | kernel | D | dtype | layout | bias, gate | BM x BN | warps | stages | registers | spills | shared KiB | programs/SM | inner loop: mma, exp, fp32, shared, async copy, other |", "|" + "---|" * 14]
    for r in rows:
        mix = r.get("inner_loop") or {}
        loop = ", ".join(str(mix.get(kind, 0)) for kind in ("mma", "exp", "fp32", "shared", "async copy", "other")) if mix else "-"
        cells = (r["target"], r["kernel"], r["D"], r["dtype"], r["layout"], "yes" if r["bias_and_gate"] else "no", f"{r['BM']} x {r['BN']}",
                 r["warps"], r["stages"], r["registers"], r["spills"], f"{r['shared_bytes'] / 1024:.0f}", r.get("programs_per_sm", "-"), loop)  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the subset that the tests compile")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of the table, write nothing")
    parser.add_argument("--out", type=Path, default=Path("data/results"), help="folder of the written report")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing can be compiled in the interpreter, unset it")
    import triton

    rows = []
    for name, dim, dtype, layout, extras, target in variants(args.quick):
        build = compile_amd if target == "gfx942" else compile_nvidia
        rows.append(build(name, dim, dtype, layout, extras, *(() if target == "gfx942" else (target,))))
        if args.json:
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        return
    header = f"torch {torch.__version__}, triton {triton.__version__}; compiled, not run: no figure here is a time.\n\n"
    print(header + table(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernels_compiled.md").write_text(f"# Attention kernels as compiled\n\n{header}{table(rows)}\n")
    (args.out / "kernels_compiled.json").write_text(json.dumps({"torch": torch.__version__, "triton": triton.__version__, "rows": rows}, indent=1))
    spilled = [r for r in rows if r["spills"] and r["target"] != "gfx942"]
    print(f"\n{len(rows)} variants, {len(spilled)} with spills")


if __name__ == "__main__":
    main()
