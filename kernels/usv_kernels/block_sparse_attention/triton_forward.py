"""Triton forward: one program per tile of query rows walks the list of its query block with an online softmax.

s = <q, k> * scale + column, where one vector `column` per key tile carries key bias, block gate and the -inf of columns
past the block's end, so masks and biases cost one fused multiply-add an element. The scale is applied to the fp32 dot
product, never to a rounded operand. Logits stay in natural units and log2(e) multiplies s - top, after the large terms have
cancelled: folding it into the scale saves one multiplication an element, but logits of base 2 and their lse are rounded
more often, which cost 1.2 x the allowed error of dV at q and k of scale 16.

Letters: S tokens, M query blocks, N key blocks, K slots; BM, BN rows and columns of a tile; D head size, DP its power of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_pointers(base, stride, start, ROWS: tl.constexpr, DP: tl.constexpr):
    """[ROWS, DP] pointers. The start enters as one 64-bit scalar; offsets inside a tile fit 32 bits and leave the loop."""
    first = base + start.to(tl.int64) * stride
    return first + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, DP)[None, :])


@triton.jit
def load_rows(base, stride, start, count, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[ROWS, DP] rows start..start+count of a (S, D) matrix with contiguous channels; rows past count are 0."""
    inside = (tl.arange(0, ROWS) < count)[:, None]
    if DP != D:
        inside = inside & (tl.arange(0, DP) < D)[None, :]
    return tl.load(row_pointers(base, stride, start, ROWS, DP), mask=inside, other=0.0)


@triton.jit
def store_rows(base, stride, start, count, values, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    inside = (tl.arange(0, ROWS) < count)[:, None] & (tl.arange(0, DP) < D)[None, :]
    tl.store(row_pointers(base, stride, start, ROWS, DP), values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def listed_block(list_ptr, starts_ptr, sizes_ptr, slot, count):
    """Start and size of the block in a slot; slots past the count are not read (block 0 stands in, its result unused)."""
    block = tl.load(list_ptr + slot, mask=slot < count, other=0)
    return tl.load(starts_ptr + block), tl.load(sizes_ptr + block)


@triton.jit
def column_bias(bias_base, gate, start, offset, size, HAS_BIAS: tl.constexpr, BN: tl.constexpr):
    """[BN] what is added to each column of logits: key bias and gate, -inf past the block."""
    column = tl.arange(0, BN)
    inside = offset + column < size
    if HAS_BIAS:
        value = tl.load(bias_base + start + offset + column, mask=inside, other=0.0) + gate
    else:
        value = tl.zeros([BN], tl.float32) + gate
    return tl.where(inside, value, float("-inf"))


@triton.jit
def attend_tile(acc, top, total, q, k_base, v_base, k_stride, v_stride, bias_base, gate, start, offset, size, scale,
                HAS_BIAS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """One step of the online softmax over BN keys."""
    k = load_rows(k_base, k_stride, start + offset, size - offset, BN, D, DP)
    column = column_bias(bias_base, gate, start, offset, size, HAS_BIAS, BN)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + column[None, :]
    new_top = tl.maximum(top, tl.max(s, 1))
    # While a row has met no key its maximum is -inf; subtracting 0 instead keeps exp(-inf) = 0 and no NaN.
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - safe_top[:, None]) * LOG2E)
    shrink = tl.exp2((top - safe_top) * LOG2E)
    v = load_rows(v_base, v_stride, start + offset, size - offset, BN, D, DP)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["H", "M", "K", "q_len", "table_stride", "kv_layout_stride", "bias_stride_b", "bias_stride_h", "scale"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, gate_ptr, counts_ptr, lists_ptr, kv_starts_ptr, kv_sizes_ptr,
    tile_block_ptr, tile_start_ptr, tile_rows_ptr, scale, H, M, K, q_len, table_stride, kv_layout_stride,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s, bias_stride_b, bias_stride_h,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, KV_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * H). KV_TILES: tiles of BN tokens in a key block, where the host knows it; 0: any size."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    table = bh * table_stride + tile
    rows = tl.load(tile_rows_ptr + table)
    if rows == 0:
        return
    start_q = tl.load(tile_start_ptr + table)
    block = bh * M + tl.load(tile_block_ptr + table)
    count = tl.load(counts_ptr + block)
    list_ptr = lists_ptr + block * K
    starts_ptr = kv_starts_ptr + bh * kv_layout_stride
    sizes_ptr = kv_sizes_ptr + bh * kv_layout_stride
    q = load_rows(q_ptr + batch * q_stride_b + head * q_stride_h, q_stride_s, start_q, rows, BM, D, DP)
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    bias_base = k_ptr
    if HAS_BIAS:
        bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h

    acc = tl.zeros([BM, DP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    gate = 0.0
    if KV_TILES == 0:
        for slot in range(count):
            start, size = listed_block(list_ptr, starts_ptr, sizes_ptr, slot, count)
            if HAS_GATE:
                gate = tl.load(gate_ptr + block * K + slot)
            for offset in range(0, size, BN):
                acc, top, total = attend_tile(acc, top, total, q, k_base, v_base, k_stride_s, v_stride_s, bias_base, gate,
                                              start, offset, size, scale, HAS_BIAS, BN, D, DP)  # fmt: skip
    else:
        # The block of the next step is looked up one step ahead: its two dependent loads hide behind the products.
        start, size = listed_block(list_ptr, starts_ptr, sizes_ptr, 0, count)
        for step in range(count * KV_TILES):
            slot = step // KV_TILES
            next_start, next_size = listed_block(list_ptr, starts_ptr, sizes_ptr, (step + 1) // KV_TILES, count)
            if HAS_GATE:
                gate = tl.load(gate_ptr + block * K + slot)
            acc, top, total = attend_tile(acc, top, total, q, k_base, v_base, k_stride_s, v_stride_s, bias_base, gate,
                                          start, step % KV_TILES * BN, size, scale, HAS_BIAS, BN, D, DP)  # fmt: skip
            start, size = next_start, next_size

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    store_rows(out_ptr + batch * out_stride_b + head * out_stride_h, out_stride_s, start_q, rows, acc, BM, D, DP)
    row = tl.arange(0, BM)
    lse = tl.where(empty, float("-inf"), top + tl.log2(total) * LN2)
    tl.store(lse_ptr + bh * q_len + start_q + row, lse, mask=row < rows)
