"""Triton backward, deterministic: dQ walks the lists, dK and dV walk the inverted lists; nothing is added atomically.

With P_ij = exp(S_ij - lse_i), delta_i = <dO_i, O_i> - dlse_i and dS_ij = P_ij * (<dO_i, v_j> - delta_i):
    dq_i = scale * sum_j dS_ij k_j      dk_j = scale * sum_i dS_ij q_i      dv_j = sum_i P_ij dO_i
    dkey_bias_j = sum_i dS_ij           dblock_gate(m, slot) = sum of dS over that pair of blocks
"""

import triton
import triton.language as tl

from .triton_forward import (
    LOG2E,
    accumulator,
    column_bias,
    inner,
    listed_block,
    load_parts,
    load_rows,
    proxy_column,
    store_rows,
)


@triton.jit(do_not_specialize=["H", "q_len"])
def delta_kernel(out_ptr, grad_ptr, grad_lse_ptr, delta_ptr, H, q_len, out_stride_b, out_stride_h, out_stride_s,
                 grad_stride_b, grad_stride_h, grad_stride_s,
                 HAS_GRAD_LSE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """delta_i = <dO_i, O_i> - dlse_i, grid (query rows / BM, B * H)."""
    start = tl.program_id(0) * BM
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    out = load_rows(out_ptr + batch * out_stride_b + head * out_stride_h, out_stride_s, start, q_len - start, BM, D, DP)
    grad = load_rows(grad_ptr + batch * grad_stride_b + head * grad_stride_h, grad_stride_s, start, q_len - start, BM, D, DP)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    row = start + tl.arange(0, BM)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + bh * q_len + row, mask=row < q_len, other=0.0)
    tl.store(delta_ptr + bh * q_len + row, delta, mask=row < q_len)


@triton.jit
def load_lse(lse_base, start, count, ROWS: tl.constexpr):
    """lse of rows; +inf for rows past count and rows without keys, whose probabilities become exp2(-inf) = 0."""
    row = tl.arange(0, ROWS)
    lse = tl.load(lse_base + start + row, mask=row < count, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def probabilities(dot, scale, column, lse):
    """exp(dot * scale + column - lse); the score is rounded exactly as in the forward, so that its error cancels."""
    return tl.exp2((dot * scale + column - lse) * LOG2E)


@triton.jit
def dq_tile(dq, dq1, gate_sum, q, q1, grad, grad1, lse, delta, k_base, v_base, k_stride, v_stride, column, start, count, scale,
            HAS_GATE: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, D1: tl.constexpr):  # fmt: skip
    """Adds the part of `count` keys from `start` on to dQ (without the scale) and to the block sum of dS."""
    k, k1 = load_parts(k_base, k_stride, start, count, BN, D, DP, D1)
    v, v1 = load_parts(v_base, v_stride, start, count, BN, D, DP, D1)
    p = probabilities(inner(q, q1, k, k1, D1), scale, column[None, :], lse[:, None])
    ds = p * (inner(grad, grad1, v, v1, D1) - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if D1 > 0:
        dq1 = tl.dot(ds.to(k.dtype), k1, dq1, input_precision="ieee")
    if HAS_GATE:
        gate_sum += tl.sum(tl.sum(ds, 1), 0)
    return dq, dq1, gate_sum


@triton.jit(do_not_specialize=["H", "M", "N", "K", "q_len", "table_stride", "kv_layout_stride", "bias_stride_b", "bias_stride_h",
                               "tiles", "scale"])  # fmt: skip
def dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, dgate_ptr, bias_ptr, gate_ptr, proxy_k_ptr, proxy_v_ptr,
    proxy_bias_ptr, listed_ptr, counts_ptr, lists_ptr, kv_starts_ptr, kv_sizes_ptr, tile_block_ptr, tile_start_ptr, tile_rows_ptr,
    scale, H, M, N, K, q_len, tiles, table_stride, kv_layout_stride, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h,
    v_stride_s, grad_stride_b, grad_stride_h, grad_stride_s, dq_stride_b, dq_stride_h, dq_stride_s, bias_stride_b,
    bias_stride_h, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PROXY: tl.constexpr, KV_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, B * H). dgate_ptr is (B, H, tiles, K): sums over this tile's rows."""
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
    grad, grad1 = load_parts(grad_ptr + batch * grad_stride_b + head * grad_stride_h, grad_stride_s, start_q, rows, BM, D, DP, D1)
    row = tl.arange(0, BM)
    lse = load_lse(lse_ptr + bh * q_len, start_q, rows, BM)
    delta = tl.load(delta_ptr + bh * q_len + start_q + row, mask=row < rows, other=0.0)
    k_base = k_ptr + batch * k_stride_b + head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + head * v_stride_h
    bias_base = k_ptr
    if HAS_BIAS:
        bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h
    dgate_base = dgate_ptr
    if HAS_GATE:
        dgate_base = dgate_ptr + (bh * tiles + tile) * K

    dq, dq1 = accumulator(BM, DP), accumulator(BM, D1)
    gate, gate_sum = 0.0, 0.0
    if KV_TILES == 0:
        for slot in range(count):
            start, size = listed_block(list_ptr, starts_ptr, sizes_ptr, slot, count)
            if HAS_GATE:
                gate = tl.load(gate_ptr + block * K + slot)
                gate_sum = 0.0
            for offset in range(0, size, BN):
                column = column_bias(bias_base, gate, start, offset, size, HAS_BIAS, BN)
                dq, dq1, gate_sum = dq_tile(dq, dq1, gate_sum, q, q1, grad, grad1, lse, delta, k_base, v_base, k_stride_s, v_stride_s,
                                            column, start + offset, size - offset, scale, HAS_GATE, BN, D, DP, D1)  # fmt: skip
            if HAS_GATE:
                tl.store(dgate_base + slot, gate_sum)
    else:
        start, size = listed_block(list_ptr, starts_ptr, sizes_ptr, 0, count)
        for step in range(count * KV_TILES):
            slot = step // KV_TILES
            next_start, next_size = listed_block(list_ptr, starts_ptr, sizes_ptr, (step + 1) // KV_TILES, count)
            if HAS_GATE:
                gate = tl.load(gate_ptr + block * K + slot)
                gate_sum = tl.where(step % KV_TILES == 0, 0.0, gate_sum)
            offset = step % KV_TILES * BN
            column = column_bias(bias_base, gate, start, offset, size, HAS_BIAS, BN)
            dq, dq1, gate_sum = dq_tile(dq, dq1, gate_sum, q, q1, grad, grad1, lse, delta, k_base, v_base, k_stride_s, v_stride_s,
                                        column, start + offset, size - offset, scale, HAS_GATE, BN, D, DP, D1)  # fmt: skip
            if HAS_GATE:
                tl.store(dgate_base + slot, gate_sum)
            start, size = next_start, next_size
    if HAS_PROXY:
        proxy_k, proxy_v = proxy_k_ptr + bh * N * (D + D1), proxy_v_ptr + bh * N * (D + D1)
        for first in range(0, N, BN):
            column = proxy_column(proxy_bias_ptr + bh * N, listed_ptr + block * N, first, N, BN)
            dq, dq1, _ = dq_tile(dq, dq1, 0.0, q, q1, grad, grad1, lse, delta, proxy_k, proxy_v, D + D1, D + D1, column, first,
                                 N - first, scale, False, BN, D, DP, D1)  # fmt: skip
    dq_base = dq_ptr + batch * dq_stride_b + head * dq_stride_h
    store_rows(dq_base, dq_stride_s, start_q, rows, dq * scale, BM, D, DP)
    if D1 > 0:
        store_rows(dq_base + D, dq_stride_s, start_q, rows, dq1 * scale, BM, D1, D1)


@triton.jit
def dkv_tile(dk, dk1, dv, dv1, dbias, k, k1, v, v1, column, q_base, grad_base, q_stride, grad_stride, lse_base, delta_base, start,
             offset, size, gate, scale, HAS_BIAS: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
             D1: tl.constexpr):  # fmt: skip
    """Adds the part of BM query rows to dK (without the scale), dV and the key bias; scores are held transposed."""
    q, q1 = load_parts(q_base, q_stride, start + offset, size - offset, BM, D, DP, D1)
    row = tl.arange(0, BM)
    lse = load_lse(lse_base, start + offset, size - offset, BM)
    grad, grad1 = load_parts(grad_base, grad_stride, start + offset, size - offset, BM, D, DP, D1)
    p = probabilities(inner(k, k1, q, q1, D1), scale, (column + gate)[:, None], lse[None, :])
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    if D1 > 0:
        dv1 = tl.dot(p.to(grad.dtype), grad1, dv1, input_precision="ieee")
    delta = tl.load(delta_base + start + offset + row, mask=row < size - offset, other=0.0)
    ds = p * (inner(v, v1, grad, grad1, D1) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    if D1 > 0:
        dk1 = tl.dot(ds.to(q.dtype), q1, dk1, input_precision="ieee")
    if HAS_BIAS:
        dbias += tl.sum(ds, 1)
    return dk, dk1, dv, dv1, dbias


@triton.jit
def entry_block(entries_ptr, starts_ptr, sizes_ptr, position, end, K):
    """Flat list position m * K + slot of an inverted entry, start and size of its query block; not read past the end."""
    entry = tl.load(entries_ptr + position, mask=position < end, other=0)
    return entry, tl.load(starts_ptr + entry // K), tl.load(sizes_ptr + entry // K)


@triton.jit(do_not_specialize=["H", "M", "N", "K", "q_len", "kv_len", "table_stride", "q_layout_stride", "bias_stride_b",
                               "bias_stride_h", "scale"])  # fmt: skip
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr, bias_ptr, gate_ptr, offsets_ptr,
    entries_ptr, q_starts_ptr, q_sizes_ptr, tile_block_ptr, tile_start_ptr, tile_rows_ptr, scale, H, M, N, K, q_len, kv_len,
    table_stride, q_layout_stride, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b,
    v_stride_h, v_stride_s, grad_stride_b, grad_stride_h, grad_stride_s, dk_stride_b, dk_stride_h, dk_stride_s,
    bias_stride_b, bias_stride_h, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, Q_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Grid (key tiles, B * H). dk and dv share strides. Q_TILES: tiles of BM rows in a query block, 0: any size."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    table = bh * table_stride + tile
    rows = tl.load(tile_rows_ptr + table)
    if rows == 0:
        return
    start_k = tl.load(tile_start_ptr + table)
    block = bh * (N + 1) + tl.load(tile_block_ptr + table)
    first = tl.load(offsets_ptr + block)
    end = tl.load(offsets_ptr + block + 1)
    entries = entries_ptr + bh * M * K
    gates = entries_ptr
    if HAS_GATE:
        gates = gate_ptr + bh * M * K
    starts_ptr = q_starts_ptr + bh * q_layout_stride
    sizes_ptr = q_sizes_ptr + bh * q_layout_stride
    k, k1 = load_parts(k_ptr + batch * k_stride_b + head * k_stride_h, k_stride_s, start_k, rows, BN, D, DP, D1)
    v, v1 = load_parts(v_ptr + batch * v_stride_b + head * v_stride_h, v_stride_s, start_k, rows, BN, D, DP, D1)
    bias_base = k_ptr
    if HAS_BIAS:
        bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h
    # No mask: a row past the block spoils nothing but its own sums, which are not stored.
    column = tl.zeros([BN], tl.float32)
    if HAS_BIAS:
        column = tl.load(bias_base + start_k + tl.arange(0, BN), mask=tl.arange(0, BN) < rows, other=0.0)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h
    grad_base = grad_ptr + batch * grad_stride_b + head * grad_stride_h
    lse_base, delta_base = lse_ptr + bh * q_len, delta_ptr + bh * q_len

    dk, dk1 = accumulator(BN, DP), accumulator(BN, D1)
    dv, dv1 = accumulator(BN, DP), accumulator(BN, D1)
    dbias = tl.zeros([BN], tl.float32)
    gate = 0.0
    if Q_TILES == 0:
        for position in range(first, end):
            entry, start, size = entry_block(entries, starts_ptr, sizes_ptr, position, end, K)
            if HAS_GATE:
                gate = tl.load(gates + entry)
            for offset in range(0, size, BM):
                dk, dk1, dv, dv1, dbias = dkv_tile(dk, dk1, dv, dv1, dbias, k, k1, v, v1, column, q_base, grad_base, q_stride_s,
                                                   grad_stride_s, lse_base, delta_base, start, offset, size, gate, scale, HAS_BIAS,
                                                   BM, D, DP, D1)  # fmt: skip
    else:
        entry, start, size = entry_block(entries, starts_ptr, sizes_ptr, first, end, K)
        for step in range((end - first) * Q_TILES):
            ahead = first + (step + 1) // Q_TILES
            next_entry, next_start, next_size = entry_block(entries, starts_ptr, sizes_ptr, ahead, end, K)
            if HAS_GATE:
                gate = tl.load(gates + entry)
            dk, dk1, dv, dv1, dbias = dkv_tile(dk, dk1, dv, dv1, dbias, k, k1, v, v1, column, q_base, grad_base, q_stride_s,
                                               grad_stride_s, lse_base, delta_base, start, step % Q_TILES * BM, size, gate, scale,
                                               HAS_BIAS, BM, D, DP, D1)  # fmt: skip
            entry, start, size = next_entry, next_start, next_size
    dk_base, dv_base = dk_ptr + batch * dk_stride_b + head * dk_stride_h, dv_ptr + batch * dk_stride_b + head * dk_stride_h
    store_rows(dk_base, dk_stride_s, start_k, rows, dk * scale, BN, D, DP)
    store_rows(dv_base, dk_stride_s, start_k, rows, dv, BN, D, DP)
    if D1 > 0:
        store_rows(dk_base + D, dk_stride_s, start_k, rows, dk1 * scale, BN, D1, D1)
        store_rows(dv_base + D, dk_stride_s, start_k, rows, dv1, BN, D1, D1)
    if HAS_BIAS:
        column_index = tl.arange(0, BN)
        tl.store(dbias_ptr + bh * kv_len + start_k + column_index, dbias, mask=column_index < rows)


@triton.jit(do_not_specialize=["H", "M", "N", "q_len", "tiles", "table_stride", "scale"])
def proxy_dkv_kernel(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, proxy_k_ptr, proxy_v_ptr, proxy_bias_ptr, listed_ptr, dk_ptr, dv_ptr, dbias_ptr,
    tile_block_ptr, tile_start_ptr, tile_rows_ptr, scale, H, M, N, q_len, tiles, table_stride, q_stride_b, q_stride_h, q_stride_s,
    grad_stride_b, grad_stride_h, grad_stride_s,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Gradients of BN proxies from one of several equal parts of the query tiles. Grid (proxy tiles, parts, B * H); dk and dv are
    (parts, B * H, N, D + D1) fp32, dbias (parts, B * H, N): torch adds the parts, in order."""
    first, part = tl.program_id(0) * BN, tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    batch, head = bh // H, bh % H
    each = tl.cdiv(tiles, tl.num_programs(1))
    proxies = bh * N
    k, k1 = load_parts(proxy_k_ptr + proxies * (D + D1), D + D1, first, N - first, BN, D, DP, D1)
    v, v1 = load_parts(proxy_v_ptr + proxies * (D + D1), D + D1, first, N - first, BN, D, DP, D1)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h
    grad_base = grad_ptr + batch * grad_stride_b + head * grad_stride_h
    lse_base, delta_base = lse_ptr + bh * q_len, delta_ptr + bh * q_len
    dk, dk1 = accumulator(BN, DP), accumulator(BN, D1)
    dv, dv1 = accumulator(BN, DP), accumulator(BN, D1)
    dbias = tl.zeros([BN], tl.float32)
    table = bh * table_stride
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        block = bh * M + tl.load(tile_block_ptr + table + tile)
        start, rows = tl.load(tile_start_ptr + table + tile), tl.load(tile_rows_ptr + table + tile)
        column = proxy_column(proxy_bias_ptr + proxies, listed_ptr + block * N, first, N, BN)
        dk, dk1, dv, dv1, dbias = dkv_tile(dk, dk1, dv, dv1, dbias, k, k1, v, v1, column, q_base, grad_base, q_stride_s, grad_stride_s,
                                           lse_base, delta_base, start, 0, rows, 0.0, scale, True, BM, D, DP, D1)  # fmt: skip
    place = (part.to(tl.int64) * tl.num_programs(2) + bh) * N
    dk_base, dv_base = dk_ptr + place * (D + D1), dv_ptr + place * (D + D1)
    store_rows(dk_base, D + D1, first, N - first, dk * scale, BN, D, DP)
    store_rows(dv_base, D + D1, first, N - first, dv, BN, D, DP)
    if D1 > 0:
        store_rows(dk_base + D, D + D1, first, N - first, dk1 * scale, BN, D1, D1)
        store_rows(dv_base + D, D + D1, first, N - first, dv1, BN, D1, D1)
    index = first + tl.arange(0, BN)
    tl.store(dbias_ptr + place + index, dbias, mask=index < N)


@triton.jit(do_not_specialize=["M", "K", "tiles", "table_stride"])
def gate_sum_kernel(partial_ptr, dgate_ptr, counts_ptr, tile_first_ptr, M, K, tiles, table_stride, BK: tl.constexpr):
    """dgate of a query block = sum over its tiles, in order; grid (M, B * H). tile_first_ptr: (B * H or 1, M + 1)."""
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    first = tl.load(tile_first_ptr + bh * table_stride + block)
    last = tl.load(tile_first_ptr + bh * table_stride + block + 1)
    count = tl.load(counts_ptr + bh * M + block)
    for start in range(0, count, BK):
        slot = start + tl.arange(0, BK)
        total = tl.zeros([BK], tl.float32)
        for tile in range(first, last):
            total += tl.load(partial_ptr + (bh * tiles + tile) * K + slot, mask=slot < count, other=0.0)
        tl.store(dgate_ptr + (bh * M + block) * K + slot, total, mask=slot < count)
