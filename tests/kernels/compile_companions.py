"""Compiles every companion Triton kernel to machine code; run by `test_companions_compile.py` in a process of its own.

Usage: python compile_companions.py 80 90 100
Prints one JSON object a line: kernel, arch, and what ptxas made of it. Needs no GPU, but no TRITON_INTERPRET either.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from usv_kernels.block_pool import triton as block_pool
from usv_kernels.kmeans import triton as kmeans
from usv_kernels.norm_rope import triton as norm_rope
from usv_kernels.permute import triton as permute
from usv_kernels.select import triton as select
from usv_kernels.token_merge import triton as token_merge

# Kernel, types of its pointer arguments, types of arguments that are not i32, constants, number of warps: the shapes of
# Wan 2.1 (head dim 128, 1536 channels, tiles of 64 tokens, 512 blocks) and bfloat16, as the wrappers launch them.
KERNELS = [
    (block_pool._forward_kernel, "bf16 i32 i32 bf16", {}, {"BLOCK_T": 32, "BLOCK_D": 128}, 4),
    (block_pool._backward_kernel, "bf16 i32 i32 bf16", {}, {"BLOCK_T": 32, "BLOCK_D": 128}, 4),
    (permute._permute_kernel, "bf16 i64 bf16", {}, {"BLOCK_R": 32, "BLOCK_D": 128}, 4),
    (select._select_kernel, "fp32 i32 i32 i32", {"p": "fp32"}, {"TOP_P": False, "BLOCK_N": 512}, 1),
    (select._select_kernel, "fp32 i32 i32 i32", {"p": "fp32"}, {"TOP_P": True, "BLOCK_N": 2048}, 4),
    (token_merge._match_kernel, "bf16 i64 i32 i32 i32 i32 i64 i64 i32", {}, {"BLOCK_T": 64, "BLOCK_C": 32}, 4),
    (token_merge._reduce_kernel, "bf16 i64 i64 i64 bf16", {}, {"MEAN": True, "BLOCK_C": 1024}, 4),
    (token_merge._reduce_kernel, "bf16 i64 i64 i64 bf16", {}, {"MEAN": False, "BLOCK_C": 1024}, 4),
    (token_merge._take_kernel, "bf16 i64 bf16", {}, {"BLOCK_R": 4, "BLOCK_C": 1024}, 4),
    (kmeans._assign_kernel, "bf16 fp32 fp32 i64", {}, kmeans.assign_blocks(128, torch.bfloat16), 4),
    (kmeans._assign_kernel, "fp32 fp32 fp32 i64", {}, kmeans.assign_blocks(128, torch.float32), 4),
    (kmeans._update_kernel, "bf16 i64 i64 i64 fp32 fp32", {}, {"BLOCK_T": 32, "BLOCK_D": 128}, 4),
    (norm_rope._forward_kernel, "bf16 bf16 fp32 fp32 i64 bf16 fp32", {"eps": "fp32"},
     {"PAIRS": 64, "HAS_POSITIONS": True, "BLOCK_P": 1024}, 4),
    (norm_rope._backward_kernel, "bf16 bf16 bf16 fp32 fp32 i64 fp32 bf16 fp32", {},
     {"PAIRS": 64, "HAS_POSITIONS": True, "BLOCK_P": 1024}, 4),
]  # fmt: skip


def build(kernel, pointers: str, other: dict, constants: dict, warps: int, arch: int) -> dict:
    names = kernel.arg_names
    types = iter(pointers.split())
    signature = {}
    for name in names:
        default = "*" + next(types) if name.endswith("_ptr") else other.get(name, "i32")
        signature[name] = "constexpr" if name in constants else default
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    # Row strides and widths are multiples of 16 in every model; without saying so no 16-byte access is possible.
    multiples = ("dim", "channels", "stride_b", "stride_h", "stride_s", "num_kv")
    aligned |= {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in multiples}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": kmeans.STAGES if kernel is kmeans._assign_kernel else 3}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": f"{kernel.__module__.split('.')[1]}.{kernel.__name__}",
        "constants": constants,
        "arch": arch,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "wide_accesses": ptx.count(".v4.b32"),
        "dots": ptx.count("mma.sync") + ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"),
        "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.M)),
        "spilled_bytes": spills(ptx) if arch == 90 else None,
    }


def spills(ptx: str) -> int:
    """Bytes of registers that ptxas spills to memory, by its own report."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path) + ".cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:]):
        for entry in KERNELS:
            print(json.dumps(build(*entry, arch)), flush=True)
