"""What can be read from a compiled kernel: registers, spills, the occupancy they allow, and the instructions of its loop."""

import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from ._gpus import Gpu

REGISTERS, SHARED_RESERVED = 65536, 1024  # of an NVIDIA multiprocessor; bytes that every program takes beside its own
TENSOR_COLUMNS = 512  # of Blackwell's tensor memory, a multiprocessor
# Kinds of instructions, SASS and CDNA 3 assembly; the first that matches counts.
MIX = {
    "mma": r"[HIQ]G?MMA|UTC\w*MMA|v_mfma|v_wmma",
    "exp": r"MUFU|v_exp",
    "fp32": r"FFMA|FMUL|FADD|FMNMX|FSEL|v_(pk_)?(fma|fmac|mul|add|sub|max)\w*_f32|v_cndmask",
    "shared": r"LDS|STS|LDSM|LDTM|STTM|ds_",
    "async copy": r"LDGSTS|UTMALDG",
    "global": r"LDG|STG|global_|buffer_|flat_",
    "local": r"LDL|STL|scratch_",
}
SASS = re.compile(r"\s*\.(?P<label>L_x_\d+):|.*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[\w.]+)(?:.*`\(\.(?P<target>L_x_\d+)\))?")


def programs_per_sm(registers: int, shared: int, warps: int, gpu: Gpu, tensor_columns: int = 0) -> int:
    """How many programs a multiprocessor (AMD: compute unit) holds at one time, by registers, shared and tensor memory, and warps."""
    if not gpu.name.startswith("sm_"):
        waves = gpu.simds * min(gpu.registers // (-(-max(registers, 1) // gpu.granule) * gpu.granule), gpu.warps // gpu.simds)
        return min(waves // warps, gpu.total // max(shared, 1))
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_tensor_memory = TENSOR_COLUMNS // tensor_columns if tensor_columns else by_registers
    return min(by_registers, by_tensor_memory, gpu.total // (shared + SHARED_RESERVED), gpu.warps // warps)


def tool(name: str, *arguments: str) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _kind(name: str) -> str:
    return next((kind for kind, pattern in MIX.items() if re.match(pattern, name)), "other")


def _chosen(loops: list[Counter]) -> Counter:
    """Instructions by name of one of the innermost loops: the longest with matrix instructions or, without any, the longest."""
    return max(loops, key=lambda names: (any(_kind(name) == "mma" for name in names), names.total()), default=Counter())


def mix(loop: Counter) -> dict:
    """Instructions of a loop by kind, with their total."""
    kinds = Counter()
    for name, count in loop.items():
        kinds[_kind(name)] += count
    return dict(kinds, total=kinds.total()) if kinds else {}


def nvidia_loop(sass: str) -> Counter:
    """Instructions by name of the innermost loop. Behind the last EXIT lie slow paths (of divisions, say) and a trap, whose
    jumps back are no loops."""
    position, code, ends = {}, [], {}
    body = sass.rpartition(" EXIT")[0] or sass
    for match in filter(None, map(SASS.match, body.splitlines())):
        if match["label"]:
            position[match["label"]] = len(code)
            continue
        code.append(match["name"])
        if match["target"] in position:
            ends[position[match["target"]]] = len(code)
    innermost = [(a, b) for a, b in ends.items() if not any(a < c and d <= b for c, d in ends.items())]
    return _chosen([Counter(code[a:b]) for a, b in innermost])


def amd_loop(assembly: str) -> Counter:
    """The same, by the comments in which LLVM says to which loop a block belongs. Loops without matrix instructions inside the
    one that has them (around a load whose address differs between lanes, say) count as part of it."""
    block, loop, loops, parent = "", "", {}, {}
    for line in assembly.splitlines():
        if start := re.match(r"\.L(BB\w+):|; %bb\.\d+:", line):
            block, loop = start[1] or "", ""
        if ";" in line:
            inside, around = re.search(r"in Loop: Header=(BB\w+)", line), re.search(r"Parent Loop (BB\w+)", line)
            loop = inside[1] if inside else block if "Loop Header: Depth" in line else loop
            parent |= {block: around[1]} if around else {}  # the last one named is the nearest
        if loop and (instruction := re.match(r"\t([a-z]\w+)", line)):
            loops.setdefault(loop, Counter())[instruction[1]] += 1
    products = {header for header, names in loops.items() if any(_kind(name) == "mma" for name in names)}
    outer = {parent[header] for header in loops if header in parent and (header in products or parent[header] not in products)}
    for header in loops:
        if header in parent and parent[header] not in outer:
            loops[parent[header]].update(loops[header])
    return _chosen([names for header, names in loops.items() if header not in outer])


def nvidia_usage(cubin: bytes) -> tuple[int, str]:
    """Registers a thread, and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = tool("cuobjdump", "-res-usage", str(path))
        return int(re.search(r"REG:(\d+)", usage)[1]), tool("nvdisasm", "-c", str(path))


def figures(compiled, gpu: Gpu) -> dict:
    """What the report tells of a compiled kernel."""
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    found = nvidia_figures(compiled) if gpu.name.startswith("sm_") else amd_figures(compiled)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    programs = programs_per_sm(found["registers"], shared, warps, gpu, columns)
    loop = found.pop("loop")
    kind, work = matrix_work(loop, warps)
    if count := sum(n for name, n in loop.items() if re.match("UTC[HIQ]MMA", name)):
        kind, work = "tcgen05", tcgen05_work(compiled.asm["ptx"], count)
    return {"target": gpu.name, "unit": kind, "matrix_work": work, "inner_loop": mix(loop), "shared_bytes": shared, "shared_limit": gpu.shared, "tensor_columns": columns, "programs_per_sm": programs,
            "warps_per_sm": programs * warps, **found}  # fmt: skip


def nvidia_figures(compiled) -> dict:
    ptx = compiled.asm["ptx"]
    registers, sass = nvidia_usage(compiled.asm["cubin"])
    return {
        "registers": registers, "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.M)), "loop": nvidia_loop(sass),
        "wide_accesses": len(re.findall(r"cp\.async\.c[ag]\S* .*, 0x10", ptx)) + len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx)),
    }  # fmt: skip


def amd_figures(compiled) -> dict:
    assembly = compiled.asm["amdgcn"]
    return {
        "registers": amd_field(assembly, "vgpr_count"), "spills": amd_field(assembly, "vgpr_spill_count"),
        "atomics": len(re.findall(r"(?:global|buffer|flat)_atomic", assembly)), "loop": amd_loop(assembly),
        "wide_accesses": len(re.findall(r"(?:global|buffer|flat)_(?:load|store)_(?:dwordx4|b128)", assembly)),
    }  # fmt: skip


# Rows, columns and depth in the name of a matrix instruction; HMMA writes 16816 for 16 x 8 x 16.
SHAPES = {"wgmma": r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)", "mma.sync": r"[HIQ]MMA\.(16)(8)(\d+)", "mfma": r"v_mfma_[fi]32_(\d+)x(\d+)x(\d+)",
          "wmma": r"v_wmma_[fi]32_(\d+)x(\d+)x(\d+)"}  # fmt: skip


def matrix_work(loop: Counter, warps: int) -> tuple[str | None, int]:
    """Kind of the matrix instructions of a loop, and multiply-adds that one pass makes of them: every warp executes each, of wgmma
    every warpgroup."""
    for kind, pattern in SHAPES.items():
        found = [(re.match(pattern, name), count) for name, count in loop.items()]
        work = sum(count * math.prod(map(int, match.groups())) for match, count in found if match)
        if work:
            return kind, work * (warps // 4 if kind == "wgmma" else warps)
    return None, 0


def tcgen05_work(ptx: str, count: int) -> int:
    """Multiply-adds of the tcgen05.mma of the loop that has `count` of them, as disassembled; a program executes each once. M and N
    are in the instruction descriptor (PTX ISA: N / 8 in bits 17 to 22, M / 16 in 24 to 28), K is 16 for 16-bit operands, 32 for 8-bit ones."""
    constants = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx)}
    position, found, loops, depth = {}, [], [], {"f16": 16, "f8f6f4": 32, "i8": 32, "tf32": 8}
    for line in ptx.splitlines():
        if label := re.match(r"(\$L__\w+):", line):
            position[label[1]] = len(found)
        elif match := re.match(r"\s*(?:@%p\d+ )?tcgen05\.mma\.cta_group::1\.kind::(\w+)\s+([^;]+);", line):
            operand = match[2].split(",")[3].strip()
            descriptor = constants[operand] if operand in constants else int(operand)
            found.append((descriptor >> 24 & 31) * 16 * (descriptor >> 17 & 63) * 8 * depth[match[1]])
        elif (jump := re.match(r"\s*(?:@!?%p\d+ )?bra(?:\.uni)?\s+(\$L__\w+);", line)) and jump[1] in position:
            loops.append(found[position[jump[1]] :])
    return next((sum(loop) for loop in loops if len(loop) == count), 0)


def amd_field(assembly: str, key: str) -> int:
    return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])
