"""What is read from compiled kernels: loops of both assemblies, the work of matrix instructions, and occupancy."""

from collections import Counter

from usv_kernels._gpus import GPUS
from usv_kernels.machine_code import amd_loop, matrix_work, mix, nvidia_loop, programs_per_sm, tcgen05_work

NVIDIA_TEXT = """
	.text.kernel:
.L_x_1:
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0020*/              @!P0 FFMA R1, R2, R3, R4 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/              @!P2 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
        /*0080*/                   MOV R1, R2 ;
        /*0090*/                   BRA `(.L_x_1) ;
"""
AMD_TEXT = """
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\tds_read_b128 v[0:3], v4
.LBB0_2:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_4 Depth 2
\tglobal_load_dwordx4 v[0:3], v[4:5], off
.LBB0_3:                                ;   in Loop: Header=BB0_4 Depth=2
\tv_exp_f32_e32 v1, v2
.LBB0_4:                                ; %.lr.ph
                                        ;   Parent Loop BB0_2 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_3
; %bb.5:                                ;   in Loop: Header=BB0_2 Depth=1
\ts_cbranch_vccnz .LBB0_1
; %bb.6:
\ts_endpgm
"""


def test_the_innermost_loop_with_matrix_instructions_is_counted():
    assert mix(nvidia_loop(NVIDIA_TEXT)) == {"mma": 1, "fp32": 1, "other": 1, "total": 3}
    assert mix(amd_loop(AMD_TEXT)) == {"mma": 1, "exp": 1, "other": 1, "total": 3}
    without = NVIDIA_TEXT.replace("HMMA", "IADD")  # none has any: still the innermost counts
    assert mix(nvidia_loop(without)) == {"fp32": 1, "other": 2, "total": 3}
    assert not nvidia_loop("        /*0000*/   EXIT ;")
    moved = AMD_TEXT.replace("v_mfma_f32_32x32x8_bf16_1k", "v_readfirstlane_b32").replace(
        "ds_read_b128", "v_mfma_f32_32x32x8_bf16_1k"
    )
    assert mix(amd_loop(moved)) == {"mma": 1, "exp": 1, "global": 1, "other": 3, "total": 6}  # the inner loop has none
    assert not amd_loop(".LBB0_1:   ; %then\n\tds_read_b32 v1, v2\n\ts_cbranch_scc1 .LBB0_1\n")  # no head of a loop


def test_occupancy():
    """By hand: 65,536 registers in units of 8 a thread, 64 warps, shared memory plus 1 KiB a program."""
    sm_80, sm_90, sm_100, sm_89 = (GPUS[name] for name in ("sm_80", "sm_90", "sm_100", "sm_89"))
    assert programs_per_sm(128, 0, 4, sm_80) == 4
    assert programs_per_sm(121, 0, 4, sm_80) == 4 and programs_per_sm(129, 0, 4, sm_80) == 3
    assert programs_per_sm(32, 48 * 1024, 4, sm_80) == 3 and programs_per_sm(32, 48 * 1024, 4, sm_90) == 4
    assert programs_per_sm(16, 0, 4, sm_90) == 16
    # 48 warps of Ada and 100 KiB; 512 columns of Blackwell's tensor memory
    assert programs_per_sm(16, 0, 4, sm_89) == 12 and programs_per_sm(16, 48 * 1024, 4, sm_89) == 2
    assert programs_per_sm(64, 0, 4, sm_100, 256) == 2 and programs_per_sm(64, 0, 4, sm_100, 192) == 2
    # CDNA: 512 registers of each of four SIMDs, 8 waves; RDNA 3: 1,536 of two, in units of 24, 16 waves
    gfx942, gfx1100 = GPUS["gfx942"], GPUS["gfx1100"]
    assert [programs_per_sm(r, 1024, 4, gfx942) for r in (64, 65, 256, 512)] == [8, 7, 2, 1]
    assert programs_per_sm(64, 20 * 1024, 4, gfx942) == 3 and programs_per_sm(64, 20 * 1024, 4, GPUS["gfx950"]) == 8
    assert [programs_per_sm(r, 1024, 4, gfx1100) for r in (96, 97, 192, 256)] == [8, 6, 4, 2]


def test_work_of_matrix_instructions():
    """Every warp executes each; a warpgroup, four warps, one wgmma; a program one tcgen05, whose shape is in its descriptor."""
    assert matrix_work(Counter({"HMMA.16816.F32.BF16": 3, "FFMA": 9}), 4) == ("mma.sync", 3 * 16 * 8 * 16 * 4)
    assert matrix_work(Counter({"HGMMA.64x128x16.F32.BF16": 2}), 8) == ("wgmma", 2 * 64 * 128 * 16 * 2)
    assert matrix_work(Counter({"v_mfma_f32_16x16x16_bf16": 2, "v_mfma_f32_32x32x8_bf16": 1}), 4) == ("mfma", (2 * 4096 + 8192) * 4)
    assert matrix_work(Counter({"v_wmma_f32_16x16x16_bf16": 5}), 2) == ("wmma", 5 * 4096 * 2)
    assert matrix_work(Counter({"FFMA": 5}), 2) == (None, 0)
    n, m = 128 // 8 << 17, 64 // 16 << 24
    step = "\ttcgen05.mma.cta_group::1.kind::f16 [ %r2 + 0 ], [ %r5 + 0 ], %rd1, %r9, %p1;\n"
    ptx = f"\tmov.b32 \t%r9, {n | m};\n" + step + "$L__BB0_1:\n" + 2 * step + "\t@%p2 bra \t$L__BB0_1;\n" + 3 * step
    assert tcgen05_work(ptx, 2) == 2 * 64 * 128 * 16 and tcgen05_work(ptx, 4) == 0


def test_products_of_eight_bits():
    """Names as disassembled; QK^T of 64 x 64 x 128 in 8 bits and PV in 16, in four warps."""
    loops = {
        "mma.sync": {"IMMA.16832.S8.S8.SAT": 32, "HMMA.16816.F32.BF16": 64},
        "wgmma": {"QGMMA.64x64x32.F32.E4M3.E4M3": 4, "HGMMA.64x128x16.F32.BF16": 4},
        "mfma": {"v_mfma_i32_16x16x64_i8": 8, "v_mfma_f32_16x16x32_bf16": 16},
        "wmma": {"v_wmma_i32_16x16x16_iu8": 32, "v_wmma_f32_16x16x16_bf16": 32},
    }
    for kind, names in loops.items():
        assert matrix_work(Counter(names), 4) == (kind, 2 * 64 * 64 * 128)
        assert mix(Counter(names))["mma"] == sum(names.values())
    assert matrix_work(Counter({"IGMMA.64x64x32.S8.S8": 4}), 4) == ("wgmma", 64 * 64 * 128)
    assert mix(Counter({"UTCQMMA": 4, "UTCHMMA": 4})) == {"mma": 8, "total": 8}
