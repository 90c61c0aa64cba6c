"""Triton forward: one program per tile of query rows walks the list of its query block with an online softmax.

s = <q, k> * scale + column, where one vector `column` per key tile carries key bias, block gate and the -inf of columns
past the block's end, so masks and biases cost one fused multiply-add an element. The scale is applied to the fp32 dot
product, never to a rounded operand. Logits stay in natural units and log2(e) multiplies s - top, after the large terms have
cancelled: folding it into the scale saves one multiplication an element, but logits of base 2 and their lse are rounded
more often, which cost 1.2 x the allowed error of dV at q and k of scale 16.

A head may be walked in two parts of its channels: D of the first, DP its power of two, D1 of the second (0: one part is the whole).
An accumulator of 64 rows and 128 channels is otherwise split over its channels on GPUs that multiply from registers: row maxima,
sums and P then cross warps through shared memory. Two of 64 x 64 are split over rows, and 96 channels are 64 and 32, not 128.

Low precision (`low_precision`): with LOW_QK q and k are int8 or e4m3, and what multiplies their product is the scale of the query block
times those of the keys, one vector as `column` is; with LOW_PV v is e4m3 and so is P, times 448, while the sum of P stays fp32.

Letters: S tokens, M query blocks, N key blocks, K slots; BM, BN rows and columns of a tile.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FP8_TOP = tl.constexpr(448.0)  # the largest number of e4m3


@triton.jit
def row_pointers(base, stride, start, ROWS: tl.constexpr, DP: tl.constexpr):
    """[ROWS, DP] pointers. The start enters as one 64-bit scalar; offsets inside a tile fit 32 bits and leave the loop."""
    first = base + tl.cast(start, tl.int64) * stride
    return first + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, DP)[None, :])


@triton.jit
def load_rows(base, stride, start, count, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[ROWS, DP] rows start..start+count of a (S, D) matrix with contiguous channels; rows past count are 0."""
    inside = (tl.arange(0, ROWS) < count)[:, None]
    if DP != D:
        inside = inside & (tl.arange(0, DP) < D)[None, :]
    return tl.load(row_pointers(base, stride, start, ROWS, DP), mask=inside, other=0.0)


@triton.jit
def load_parts(base, stride, start, count, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, D1: tl.constexpr):
    """The same in two parts of D and D1 channels; where the first is the whole the second is not used."""
    first = load_rows(base, stride, start, count, ROWS, D, DP)
    second = first
    if D1 > 0:
        second = load_rows(base + D, stride, start, count, ROWS, D1, D1)
    return first, second


@triton.jit
def inner(a, a1, b, b1, D1: tl.constexpr):
    """a b^T over both parts, fp32; of int8 int32."""
    product = tl.dot(a, tl.trans(b), input_precision="ieee")
    if D1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee", out_dtype=product.dtype)
    return product


@triton.jit
def accumulator(ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """fp32 zeros; of a part that is not there a scalar, which the compiler drops."""
    if CHANNELS == 0:
        return 0.0
    else:
        return tl.zeros([ROWS, CHANNELS], tl.float32)


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
def proxy_column(bias_base, listed_base, first, N, BN: tl.constexpr):
    """[BN] what is added to the logits of proxies first to first + BN: log size, -inf where the block is listed."""
    index = first + tl.arange(0, BN)
    listed = tl.load(listed_base + index, mask=index < N, other=1)
    value = tl.load(bias_base + index, mask=index < N, other=0.0)
    return tl.where(listed == 0, value, float("-inf"))


@triton.jit
def attend_tile(acc, acc1, top, total, q, q1, k_base, v_base, k_stride, v_stride, column, start, count, scale, k_scale_base,
                BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, D1: tl.constexpr, LOW_QK: tl.constexpr = False,
                LOW_PV: tl.constexpr = False):  # fmt: skip
    """One step of the online softmax over the `count` keys from `start` on, at most BN of them."""
    k, k1 = load_parts(k_base, k_stride, start, count, BN, D, DP, D1)
    if LOW_QK:
        key = tl.arange(0, BN)
        factor = tl.load(k_scale_base + start + key, mask=key < count, other=0.0) * scale
        s = inner(q, q1, k, k1, D1).to(tl.float32) * factor[None, :] + column[None, :]
    else:
        s = inner(q, q1, k, k1, D1) * scale + column[None, :]
    new_top = tl.maximum(top, tl.max(s, 1))
    # While a row has met no key its maximum is -inf; subtracting 0 instead keeps exp(-inf) = 0 and no NaN.
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - safe_top[:, None]) * LOG2E)
    shrink = tl.exp2((top - safe_top) * LOG2E)
    total = total * shrink + tl.sum(p, 1)
    if LOW_PV:
        p = p * FP8_TOP
    v, v1 = load_parts(v_base, v_stride, start, count, BN, D, DP, D1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    if D1 > 0:
        acc1 = tl.dot(p.to(v.dtype), v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc, acc1, new_top, total


@triton.jit
def channel_scales(base, D: tl.constexpr, DP: tl.constexpr):
    """[1, DP] fp32 scales of the channels of fp8 values, over what P was multiplied by."""
    channel = tl.arange(0, DP)
    return tl.load(base + channel, mask=channel < D, other=0.0)[None, :] / FP8_TOP


@triton.jit(do_not_specialize=["H", "M", "N", "K", "q_len", "kv_len", "table_stride", "kv_layout_stride", "bias_stride_b", "bias_stride_h", "scale"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, gate_ptr, proxy_k_ptr, proxy_v_ptr, proxy_bias_ptr, listed_ptr, counts_ptr,
    lists_ptr, kv_starts_ptr, kv_sizes_ptr, tile_block_ptr, tile_start_ptr, tile_rows_ptr, scale, H, M, N, K, q_len, kv_len, table_stride,
    kv_layout_stride, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    out_stride_b, out_stride_h, out_stride_s, bias_stride_b, bias_stride_h,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PROXY: tl.constexpr, KV_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, D1: tl.constexpr,
    LOW_QK: tl.constexpr = False, LOW_PV: tl.constexpr = False,
):  # fmt: skip
    """Grid (query tiles, B * H). KV_TILES: tiles of BN tokens in a key block, where the host knows it; 0: any size.
    Proxies: (B, H, N, D + D1) keys and values, (B, H, N) fp32 log sizes, listed (B, H, M, N) bytes. Scales, fp32: of queries (B, H, q_len),
    equal within a block, of keys (B, H, kv_len), of the channels of v (B, H, D + D1)."""
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
    q, q1 = load_parts(q_ptr + batch * q_stride_b + head * q_stride_h, q_stride_s, start_q, rows, BM, D, DP, D1)
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    bias_base = k_ptr
    if HAS_BIAS:
        bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h
    k_scale_base = k_ptr
    if LOW_QK:
        k_scale_base = k_scale_ptr + bh * kv_len
        scale = scale * tl.load(q_scale_ptr + bh * q_len + start_q)

    acc, acc1 = accumulator(BM, DP), accumulator(BM, D1)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    gate = 0.0
    if KV_TILES == 0:
        for slot in range(count):
            start, size = listed_block(list_ptr, starts_ptr, sizes_ptr, slot, count)
            if HAS_GATE:
                gate = tl.load(gate_ptr + block * K + slot)
            for offset in range(0, size, BN):
                column = column_bias(bias_base, gate, start, offset, size, HAS_BIAS, BN)
                acc, acc1, top, total = attend_tile(acc, acc1, top, total, q, q1, k_base, v_base, k_stride_s, v_stride_s, column,
                                                    start + offset, size - offset, scale, k_scale_base, BN, D, DP, D1, LOW_QK, LOW_PV)  # fmt: skip
    else:
        # The block of the next step is looked up one step ahead: its two dependent loads hide behind the products.
        start, size = listed_block(list_ptr, starts_ptr, sizes_ptr, 0, count)
        for step in range(count * KV_TILES):
            slot = step // KV_TILES
            next_start, next_size = listed_block(list_ptr, starts_ptr, sizes_ptr, (step + 1) // KV_TILES, count)
            if HAS_GATE:
                gate = tl.load(gate_ptr + block * K + slot)
            offset = step % KV_TILES * BN
            column = column_bias(bias_base, gate, start, offset, size, HAS_BIAS, BN)
            acc, acc1, top, total = attend_tile(acc, acc1, top, total, q, q1, k_base, v_base, k_stride_s, v_stride_s, column,
                                                start + offset, size - offset, scale, k_scale_base, BN, D, DP, D1, LOW_QK, LOW_PV)  # fmt: skip
            start, size = next_start, next_size
    if HAS_PROXY:
        proxy_k, proxy_v = proxy_k_ptr + bh * N * (D + D1), proxy_v_ptr + bh * N * (D + D1)
        for first in range(0, N, BN):
            column = proxy_column(proxy_bias_ptr + bh * N, listed_ptr + block * N, first, N, BN)
            acc, acc1, top, total = attend_tile(acc, acc1, top, total, q, q1, proxy_k, proxy_v, D + D1, D + D1, column, first,
                                                N - first, scale, k_scale_base, BN, D, DP, D1)  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if LOW_PV:
        v_scale_base = v_scale_ptr + bh * (D + D1)
        acc = acc * channel_scales(v_scale_base, D, DP)
        if D1 > 0:
            acc1 = acc1 * channel_scales(v_scale_base + D, D1, D1)
    out_base = out_ptr + batch * out_stride_b + head * out_stride_h
    store_rows(out_base, out_stride_s, start_q, rows, acc / total[:, None], BM, D, DP)
    if D1 > 0:
        store_rows(out_base + D, out_stride_s, start_q, rows, acc1 / total[:, None], BM, D1, D1)
    row = tl.arange(0, BM)
    lse = tl.where(empty, float("-inf"), top + tl.log2(total) * LN2)
    tl.store(lse_ptr + bh * q_len + start_q + row, lse, mask=row < rows)
