"""What can be read from a compiled kernel: registers, spills, the occupancy they allow, and the instructions of its loop."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

# Shared memory a program may use, and registers and shared memory of a multiprocessor (CUDA programming guide, table of
# compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_TOTAL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, MAX_WARPS, SHARED_RESERVED = 65536, 64, 1024
# The same of a compute unit of CDNA 3: four SIMDs with 512 registers a lane, shared among at most 8 waves (LLVM's AMDGPU guide).
AMD_SHARED, AMD_SIMDS, AMD_REGISTERS, AMD_WAVES = 64 * 1024, 4, 512, 8
# Kinds of instructions, SASS and CDNA 3 assembly; the first that matches counts.
MIX = {
    "mma": r"HGMMA|HMMA|UTC\w*MMA|v_mfma",
    "exp": r"MUFU|v_exp",
    "fp32": r"FFMA|FMUL|FADD|FMNMX|FSEL|v_(pk_)?(fma|fmac|mul|add|sub|max)\w*_f32|v_cndmask",
    "shared": r"LDS|STS|LDSM|LDTM|STTM|ds_",
    "async copy": r"LDGSTS|UTMALDG",
    "global": r"LDG|STG|global_|buffer_|flat_",
    "local": r"LDL|STL|scratch_",
}
SASS = re.compile(r"\s*\.(?P<label>L_x_\d+):|.*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>\w+)(?:.*`\(\.(?P<target>L_x_\d+)\))?")


def programs_per_sm(registers: int, shared: int, warps: int, arch: int) -> int:
    """How many programs a multiprocessor of an NVIDIA architecture (80, 90, 100) holds at one time, by registers and memory."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, SHARED_TOTAL[arch] // (shared + SHARED_RESERVED), MAX_WARPS // warps)


def programs_per_cu(registers: int, shared: int, warps: int) -> int:
    """The same for a compute unit of gfx942."""
    waves = AMD_SIMDS * min(AMD_REGISTERS // (-(-max(registers, 1) // 8) * 8), AMD_WAVES)
    return min(waves // warps, AMD_SHARED // max(shared, 1))


def tool(name: str, *arguments: str) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _kind(name: str) -> str:
    return next((kind for kind, pattern in MIX.items() if re.match(pattern, name)), "other")


def _chosen(loops: list[Counter]) -> dict:
    """Of innermost loops the longest with matrix instructions or, without any, the longest, with its total."""
    best = max(loops, key=lambda c: (c["mma"] > 0, c.total()), default=Counter())
    return dict(best, total=best.total()) if best else {}


def nvidia_loop(sass: str) -> dict:
    """Instructions by kind of the innermost loop. Behind the last EXIT lie slow paths (of divisions, say) and a trap, whose
    jumps back are no loops."""
    position, code, ends = {}, [], {}
    body = sass.rpartition(" EXIT")[0] or sass
    for match in filter(None, map(SASS.match, body.splitlines())):
        if match["label"]:
            position[match["label"]] = len(code)
            continue
        code.append(_kind(match["name"]))
        if match["target"] in position:
            ends[position[match["target"]]] = len(code)
    innermost = [(a, b) for a, b in ends.items() if not any(a < c and d <= b for c, d in ends.items())]
    return _chosen([Counter(code[a:b]) for a, b in innermost])


def amd_loop(assembly: str) -> dict:
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
            loops.setdefault(loop, Counter())[_kind(instruction[1])] += 1
    outer = {parent[header] for header in loops if header in parent and (loops[header]["mma"] or not loops.get(parent[header], {}).get("mma"))}
    for header in loops:
        if header in parent and parent[header] not in outer:
            loops[parent[header]].update(loops[header])
    return _chosen([count for header, count in loops.items() if header not in outer])


def nvidia_usage(cubin: bytes) -> tuple[int, str]:
    """Registers a thread, and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = tool("cuobjdump", "-res-usage", str(path))
        return int(re.search(r"REG:(\d+)", usage)[1]), tool("nvdisasm", "-c", str(path))


def nvidia_figures(compiled, warps: int, arch: int) -> dict:
    """What the report tells of a kernel compiled for an NVIDIA architecture (80, 90, 100)."""
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, sass = nvidia_usage(compiled.asm["cubin"])
    return {
        "target": f"sm_{arch}", "registers": registers, "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)), "shared_bytes": shared,
        "shared_limit": SHARED_LIMIT[arch], "programs_per_sm": programs_per_sm(registers, shared, warps, arch),
        "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.M)), "inner_loop": nvidia_loop(sass),
    }  # fmt: skip


def amd_figures(compiled, warps: int) -> dict:
    """The same of one compiled for gfx942."""
    assembly, shared = compiled.asm["amdgcn"], compiled.metadata.shared
    registers = amd_field(assembly, "vgpr_count")
    return {
        "target": "gfx942", "registers": registers, "spills": amd_field(assembly, "vgpr_spill_count"), "shared_bytes": shared,
        "shared_limit": AMD_SHARED, "programs_per_sm": programs_per_cu(registers, shared, warps),
        "atomics": len(re.findall(r"(?:global|buffer|flat)_atomic", assembly)), "inner_loop": amd_loop(assembly),
    }  # fmt: skip


def amd_field(assembly: str, key: str) -> int:
    return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])
