"""Triton backward, deterministic: dQ walks the lists, dK and dV walk the inverted lists; nothing is added atomically.

With P_ij = exp(S_ij - lse_i), delta_i = <dO_i, O_i> - dlse_i and dS_ij = P_ij * (<dO_i, v_j> - delta_i):
    dq_i = scale * sum_j dS_ij k_j      dk_j = scale * sum_i dS_ij q_i      dv_j = sum_i P_ij dO_i
    dkey_bias_j = sum_i dS_ij           dblock_gate(m, slot) = sum of dS over that pair of blocks
"""

import triton
import triton.language as tl

from .triton_forward import LOG2E, column_bias, listed_block, load_rows, store_rows


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
def dq_tile(dq, gate_sum, q, grad, lse, delta, k_base, v_base, k_stride, v_stride, bias_base, gate, start, offset, size,
            scale, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr):  # fmt: skip
    """Adds the part of BN keys to dQ (without the scale) and to the block sum of dS."""
    k = load_rows(k_base, k_stride, start + offset, size - offset, BN, D, DP)
    v = load_rows(v_base, v_stride, start + offset, size - offset, BN, D, DP)
    column = column_bias(bias_base, gate, start, offset, size, HAS_BIAS, BN)
    p = probabilities(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, column[None, :], lse[:, None])
    ds = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if HAS_GATE:
        gate_sum += tl.sum(tl.sum(ds, 1), 0)
    return dq, gate_sum


@triton.jit(do_not_specialize=["H", "M", "K", "q_len", "table_stride", "kv_layout_stride", "bias_stride_b", "bias_stride_h",
                               "tiles", "scale"])  # fmt: skip
def dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, dgate_ptr, bias_ptr, gate_ptr, counts_ptr, lists_ptr,
    kv_starts_ptr, kv_sizes_ptr, tile_block_ptr, tile_start_ptr, tile_rows_ptr, scale, H, M, K, q_len, tiles, table_stride,
    kv_layout_stride, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h,
    v_stride_s, grad_stride_b, grad_stride_h, grad_stride_s, dq_stride_b, dq_stride_h, dq_stride_s, bias_stride_b,
    bias_stride_h, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, KV_TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
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
    q = load_rows(q_ptr + batch * q_stride_b + head * q_stride_h, q_stride_s, start_q, rows, BM, D, DP)
    grad = load_rows(grad_ptr + batch * grad_stride_b + head * grad_stride_h, grad_stride_s, start_q, rows, BM, D, DP)
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

    dq = tl.zeros([BM, DP], tl.float32)
    gate, gate_sum = 0.0, 0.0
    if KV_TILES == 0:
        for slot in range(count):
            start, size = listed_block(list_ptr, starts_ptr, sizes_ptr, slot, count)
            if HAS_GATE:
                gate = tl.load(gate_ptr + block * K + slot)
                gate_sum = 0.0
            for offset in range(0, size, BN):
                dq, gate_sum = dq_tile(dq, gate_sum, q, grad, lse, delta, k_base, v_base, k_stride_s, v_stride_s, bias_base,
                                       gate, start, offset, size, scale, HAS_BIAS, HAS_GATE, BN, D, DP)  # fmt: skip
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
            dq, gate_sum = dq_tile(dq, gate_sum, q, grad, lse, delta, k_base, v_base, k_stride_s, v_stride_s, bias_base,
                                   gate, start, step % KV_TILES * BN, size, scale, HAS_BIAS, HAS_GATE, BN, D, DP)  # fmt: skip
            if HAS_GATE:
                tl.store(dgate_base + slot, gate_sum)
            start, size = next_start, next_size
    store_rows(dq_ptr + batch * dq_stride_b + head * dq_stride_h, dq_stride_s, start_q, rows, dq * scale, BM, D, DP)


@triton.jit
def dkv_tile(dk, dv, dbias, k, v, column, q_base, grad_base, q_stride, grad_stride, lse_base, delta_base, start, offset, size,
             gate, scale, HAS_BIAS: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Adds the part of BM query rows to dK (without the scale), dV and the key bias; scores are held transposed."""
    q = load_rows(q_base, q_stride, start + offset, size - offset, BM, D, DP)
    row = tl.arange(0, BM)
    lse = load_lse(lse_base, start + offset, size - offset, BM)
    grad = load_rows(grad_base, grad_stride, start + offset, size - offset, BM, D, DP)
    p = probabilities(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, (column + gate)[:, None], lse[None, :])
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    delta = tl.load(delta_base + start + offset + row, mask=row < size - offset, other=0.0)
    ds = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    if HAS_BIAS:
        dbias += tl.sum(ds, 1)
    return dk, dv, dbias


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
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
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
    k = load_rows(k_ptr + batch * k_stride_b + head * k_stride_h, k_stride_s, start_k, rows, BN, D, DP)
    v = load_rows(v_ptr + batch * v_stride_b + head * v_stride_h, v_stride_s, start_k, rows, BN, D, DP)
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

    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    dbias = tl.zeros([BN], tl.float32)
    gate = 0.0
    if Q_TILES == 0:
        for position in range(first, end):
            entry, start, size = entry_block(entries, starts_ptr, sizes_ptr, position, end, K)
            if HAS_GATE:
                gate = tl.load(gates + entry)
            for offset in range(0, size, BM):
                dk, dv, dbias = dkv_tile(dk, dv, dbias, k, v, column, q_base, grad_base, q_stride_s, grad_stride_s, lse_base,
                                         delta_base, start, offset, size, gate, scale, HAS_BIAS, BM, D, DP)  # fmt: skip
    else:
        entry, start, size = entry_block(entries, starts_ptr, sizes_ptr, first, end, K)
        for step in range((end - first) * Q_TILES):
            ahead = first + (step + 1) // Q_TILES
            next_entry, next_start, next_size = entry_block(entries, starts_ptr, sizes_ptr, ahead, end, K)
            if HAS_GATE:
                gate = tl.load(gates + entry)
            dk, dv, dbias = dkv_tile(dk, dv, dbias, k, v, column, q_base, grad_base, q_stride_s, grad_stride_s, lse_base,
                                     delta_base, start, step % Q_TILES * BM, size, gate, scale, HAS_BIAS, BM, D,
                                     DP)  # fmt: skip
            entry, start, size = next_entry, next_start, next_size
    store_rows(dk_ptr + batch * dk_stride_b + head * dk_stride_h, dk_stride_s, start_k, rows, dk * scale, BN, D, DP)
    store_rows(dv_ptr + batch * dk_stride_b + head * dk_stride_h, dk_stride_s, start_k, rows, dv, BN, D, DP)
    if HAS_BIAS:
        column_index = tl.arange(0, BN)
        tl.store(dbias_ptr + bh * kv_len + start_k + column_index, dbias, mask=column_index < rows)


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
