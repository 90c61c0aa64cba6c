"""What the compiler makes of every companion kernel, without a GPU; `compile_report` tabulates it beside the attention kernels."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._gpus import Gpu
from .block_pool import triton as block_pool
from .kmeans import triton as kmeans
from .machine_code import figures
from .norm_rope import triton as norm_rope
from .permute import triton as permute
from .select import triton as select
from .token_merge import triton as token_merge


def kernels(gpu: Gpu) -> list[tuple]:
    """(kernel, types of its pointer arguments, types of arguments that are not i32, constants, number of warps): the shapes
    of Wan 2.1 (head dim 128, 1536 channels, tiles of 64 tokens, 512 blocks) and bfloat16, as the wrappers launch them."""
    means, rotation = {"BLOCK_T": 32, "BLOCK_D": 128}, {"PAIRS": 64, "HAS_POSITIONS": True, "BLOCK_P": 1024}
    half, full = (kmeans.assign_tile(128, dtype, gpu) for dtype in (torch.bfloat16, torch.float32))
    return [
        (block_pool._forward_kernel, "bf16 i32 i32 bf16", {}, means, 4),
        (block_pool._backward_kernel, "bf16 i32 i32 bf16", {}, means, 4),
        (permute._permute_kernel, "bf16 i64 bf16", {}, {"BLOCK_R": 32, "BLOCK_D": 128}, 4),
        (select._select_kernel, "fp32 i32 i32 i32", {"p": "fp32"}, {"TOP_P": False, "BLOCK_N": 512}, 1),
        (select._select_kernel, "fp32 i32 i32 i32", {"p": "fp32"}, {"TOP_P": True, "BLOCK_N": 2048}, 4),
        (token_merge._match_kernel, "bf16 i64 i32 i32 i32 i32 i64 i64 i32", {}, {"BLOCK_T": 64, "BLOCK_C": 32}, 4),
        (token_merge._reduce_kernel, "bf16 i64 i64 i64 bf16", {}, {"MEAN": True, "BLOCK_C": 1024}, 4),
        (token_merge._reduce_kernel, "bf16 i64 i64 i64 bf16", {}, {"MEAN": False, "BLOCK_C": 1024}, 4),
        (token_merge._take_kernel, "bf16 i64 bf16", {}, {"BLOCK_R": 4, "BLOCK_C": 1024}, 4),
        (kmeans._assign_kernel, "bf16 fp32 fp32 i64", {}, *half),
        (kmeans._assign_kernel, "fp32 fp32 fp32 i64", {}, *full),
        (kmeans._update_kernel, "bf16 i64 i64 i64 fp32 fp32", {}, means, 4),
        (norm_rope._forward_kernel, "bf16 bf16 fp32 fp32 i64 bf16 fp32", {"eps": "fp32"}, rotation, 4),
        (norm_rope._backward_kernel, "bf16 bf16 bf16 fp32 fp32 i64 fp32 bf16 fp32", {}, rotation, 4),
    ]  # fmt: skip


def build(kernel, pointers: str, other: dict, constants: dict, warps: int, gpu: Gpu) -> dict:
    """One kernel for one GPU."""
    names = kernel.arg_names
    types = iter(pointers.split())
    signature = {}
    for name in names:
        default = "*" + next(types) if name.endswith("_ptr") else other.get(name, "i32")
        signature[name] = "constexpr" if name in constants else default
    # Row strides and widths are multiples of 16 in every model; without saying so no 16-byte access is possible. Tensors below 2 GiB
    # are read through buffers on AMD, which Triton asks of every tensor at run time.
    wide = ("dim", "channels", "stride_b", "stride_h", "stride_s", "num_kv")
    amd, attributes = not gpu.name.startswith("sm_"), {}
    for i, name in enumerate(names):
        if name.endswith("_ptr") or name in wide:
            attributes[(i,)] = [["tt.divisibility", 16]] + ([["tt.pointer_range", 32]] if amd and name.endswith("_ptr") else [])
    special = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize or p.name.endswith("_ptr"))]
    source = ASTSource(kernel, signature, constants, attributes)
    stages = kmeans.STAGES if kernel is kmeans._assign_kernel else 3
    target = GPUTarget("hip", gpu.name, 64 if gpu.unit == "mfma" else 32) if amd else GPUTarget("cuda", int(gpu.name[3:]), 32)
    options = {"num_warps": warps, "num_stages": min(stages, 2) if amd else stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    found = figures(compiled, gpu)
    return {"kernel": f"{kernel.__module__.split('.')[1]}.{kernel.__name__}", "types": pointers, "constants": constants, "warps": warps,
            "specialised": special} | found | {"dots": found["inner_loop"].get("mma", 0)}  # fmt: skip
