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
# LLVM says which blocks are heads of loops; others can be jumped back to without being one.
AMD = re.compile(r"\.(?P<label>LBB\w+):(?=.*(?:=>\s*This|Parent Loop))|\t(?P<name>[a-z]\w+)(?:\s+\.(?P<target>LBB\w+))?")


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


def inner_loop(assembly: str, line: re.Pattern) -> Counter:
    """Counts by kind of the instructions of an innermost loop: the longest with matrix instructions or, without any, the longest.

    line: SASS or AMD. Behind the last EXIT lie slow paths (of divisions, say) and a trap, whose jumps back are no loops.
    """
    position, code, ends = {}, [], {}
    body = assembly.rpartition(" EXIT")[0] or assembly
    for match in filter(None, map(line.match, body.splitlines())):
        if match["label"]:
            position[match["label"]] = len(code)
            continue
        code.append(next((kind for kind, pattern in MIX.items() if re.match(pattern, match["name"])), "other"))
        if match["target"] in position:
            ends[position[match["target"]]] = len(code)
    innermost = [(a, b) for a, b in ends.items() if not any(a < c and d <= b for c, d in ends.items())]
    loops = [Counter(code[a:b], total=b - a) for a, b in innermost]
    return max(loops, key=lambda c: (c["mma"] > 0, c["total"]), default=Counter())


def nvidia_usage(cubin: bytes) -> tuple[int, str]:
    """Registers a thread, and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = tool("cuobjdump", "-res-usage", str(path))
        return int(re.search(r"REG:(\d+)", usage)[1]), tool("nvdisasm", "-c", str(path))


def amd_field(assembly: str, key: str) -> int:
    return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])
