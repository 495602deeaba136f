"""Backward pass in plain Triton: dQ over tiles of query rows, dK and dV over tiles of key rows.

Each gradient is accumulated in registers over all branches and written once: no zero-filled buffers, no atomics, so
repeats are equal bit by bit. In every branch P = exp(s - lse) with the final lse, and dS = P * (dP - delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import COUNTS, head_offset, kept, load_rows, locate, rows_of, run_of


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    out, grad_out, grad_lse, delta, rows, g_batch, g_row, g_head, per_batch, num_heads,
    DV: tl.constexpr, PADDED_V: tl.constexpr, BLOCK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE for every (batch, row, head)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED_V)
    valid = index < rows
    mask = valid[:, None] & (dims < DV)[None, :]
    head, row = index % num_heads, index // num_heads
    place = (row // per_batch) * g_batch + (row % per_batch) * g_row + head * g_head
    o = tl.load(out + index[:, None] * DV + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_out + place[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(o * g, 1)
    if HAS_LSE:
        result -= tl.load(grad_lse + index, mask=valid, other=0.0)
    tl.store(delta + index, result, mask=valid)


@triton.jit
def _query_share(
    q, g, k_pointers, v_pointers, hidden_pointers, dq, row_lse, row_delta, limits, columns_left, partial, scale_log2,
    seed, drop_below, keep_scale, key_rows, query_rows, batch_head, branch,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to dQ / scale; rows that take no part have an lse of +inf, so that P is 0."""
    columns = tl.arange(0, k_pointers.shape[0])
    seen = columns < columns_left
    if HIDDEN:
        seen = seen & (tl.load(hidden_pointers, mask=seen, other=1) == 0)
    k = load_rows(k_pointers, seen, D)
    v = load_rows(v_pointers, seen, DV)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HIDDEN:
        s = tl.where(seen[None, :], s, -float("inf"))
    if partial:
        s = tl.where(columns[None, :] <= limits[:, None], s, -float("inf"))
    p = tl.exp2(s * scale_log2 - row_lse[:, None])
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        survives = kept(seed, drop_below, key_rows[None, :], query_rows[:, None], batch_head, branch)
        dp = tl.where(survives, dp * keep_scale, 0.0)
    ds = p * (dp - row_delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    query, key, value, hidden, grad_out, lse, delta, grad_query, cells, branches,
    num_cells, stride, interleaved, num_branches, num_heads, group, query_rows_total, first_query,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head, hidden_batch,
    delta_branch, scale, scale_log2, seed, drop_below, keep_scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of query rows, contiguous (B, Nq, H, D)."""
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    g_batch, g_row, g_head = g_batch * UNIT, g_row * UNIT, g_head * UNIT
    head, residue, cell = locate(cells, num_cells, stride)
    wide_head, wide_kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    batch = tl.load(cell).to(tl.int64)
    row = tl.load(cell + 1) + residue
    first = tl.load(cell + 2) + residue
    count = (tl.load(cell + 3) - residue + stride - 1) // stride
    if count <= 0:
        return
    key_row0, begin, end = tl.load(cell + 4), tl.load(cell + 5), tl.load(cell + 6)
    steps, columns = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    dims, value_dims = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    in_tile = steps < count
    positions = first + stride * steps
    last = first + stride * (count - 1)
    rows = (row + stride * steps).to(tl.int64)
    q = tl.load(
        query + batch * q_batch + wide_head * q_head + rows[:, None] * q_row + dims[None, :],
        mask=in_tile[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    target = (batch * query_rows_total + rows) * num_heads + head
    final_lse = tl.load(lse + target, mask=in_tile, other=float("inf")) * 1.4426950408889634
    final_lse = tl.where(final_lse == -float("inf"), float("inf"), final_lse)  # a row without keys
    g = tl.load(
        grad_out + batch * g_batch + wide_head * g_head + rows[:, None] * g_row + value_dims[None, :],
        mask=(final_lse != float("inf"))[:, None] & (value_dims < DV)[None, :], other=0.0,
    )  # fmt: skip
    dq = tl.zeros([BLOCK, PADDED], tl.float32)
    for branch in range(num_branches):
        length, rate = tl.load(branches + 2 * branch), tl.load(branches + 2 * branch + 1)
        offset = head_offset(head, rate, num_heads, interleaved)
        row_delta = tl.load(delta + branch * delta_branch + target, mask=final_lse != float("inf"), other=0.0)
        for segment in range(first // length, last // length + 1):
            active = rows_of(positions, in_tile, segment, length, rate, offset)
            if tl.max(active.to(tl.int32), 0) > 0:
                start = segment * length
                row_lse = tl.where(active, final_lse, float("inf"))
                run, keys = run_of(start, length, rate, offset, begin, end)
                unmasked = keys
                if CAUSAL:
                    low = first + stride * (tl.maximum(start - first + stride - 1, 0) // stride)
                    unmasked = tl.minimum(keys, (tl.maximum(low - run + rate, 0)) // rate)
                    keys = tl.minimum(keys, tl.maximum(tl.minimum(last, start + length - 1) - run + rate, 0) // rate)
                unmasked = unmasked // KEYS * KEYS
                run_row = (key_row0 + run).to(tl.int64)
                step = rate.to(tl.int64) * columns
                key_rows = (run_row + step)[:, None]
                k_pointers = key + batch * k_batch + wide_kv_head * k_head + key_rows * k_row + dims[None, :]
                v_pointers = value + batch * v_batch + wide_kv_head * v_head + key_rows * v_row + value_dims[None, :]
                hidden_pointers = hidden + batch * hidden_batch + run_row + step
                jump = rate.to(tl.int64) * KEYS
                limits = tl.zeros_like(positions) + (keys - 1)
                if CAUSAL:
                    limits = tl.minimum(limits, (positions - run + rate) // rate - 1)
                for block in range(0, keys, KEYS):
                    dq = _query_share(
                        q, g, k_pointers, v_pointers, hidden_pointers, dq, row_lse, row_delta,
                        limits - block, keys - block, block >= unmasked,
                        scale_log2, seed, drop_below, keep_scale,
                        key_row0 + run + rate * (block + columns), first_query + row + stride * steps,
                        batch.to(tl.int32) * num_heads + head, branch,
                        D, DV, HIDDEN, DROPOUT, PRECISION,
                    )  # fmt: skip
                    k_pointers += jump * k_row
                    v_pointers += jump * v_row
                    hidden_pointers += jump
    tl.store(
        grad_query + target[:, None] * D + dims[None, :],
        (dq * scale).to(grad_query.dtype.element_ty),
        mask=in_tile[:, None] & (dims < D)[None, :],
    )


@triton.jit
def _key_share(
    k, v, q_pointers, g_pointers, lse_pointers, delta_pointers, dk, dv, firsts, columns_left, partial, scale_log2,
    seed, drop_below, keep_scale, key_rows, query_rows, batch_head, branch,
    D: tl.constexpr, DV: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of query rows to dK / scale and dV; scores are transposed, keys by queries."""
    columns = tl.arange(0, q_pointers.shape[0])
    seen = columns < columns_left
    q = load_rows(q_pointers, seen, D)
    g = load_rows(g_pointers, seen, DV)
    # An lse of +inf makes P 0: beyond the run, and in rows without keys.
    column_lse = tl.load(lse_pointers, mask=seen, other=float("inf")) * 1.4426950408889634
    column_lse = tl.where(column_lse == -float("inf"), float("inf"), column_lse)
    column_delta = tl.load(delta_pointers, mask=seen, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if partial:
        s = tl.where(columns[None, :] >= firsts[:, None], s, -float("inf"))
    p = tl.exp2(s * scale_log2 - column_lse[None, :])
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    weights = p
    if DROPOUT:
        survives = kept(seed, drop_below, key_rows[:, None], query_rows[None, :], batch_head, branch)
        weights = tl.where(survives, p * keep_scale, 0.0)
        dp = tl.where(survives, dp * keep_scale, 0.0)
    dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
    ds = p * (dp - column_delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def key_kernel(
    query, key, value, hidden, grad_out, lse, delta, grad_key, grad_value, cells, branches,
    num_cells, stride, interleaved, num_branches, num_heads, group, query_rows_total, key_rows_total, first_query,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head, hidden_batch,
    delta_branch, scale, scale_log2, seed, drop_below, keep_scale,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dK (B, Nk, G, D) and dV (B, Nk, G, DV), contiguous, of one tile of key rows; all query heads of a group add."""
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    g_batch, g_row, g_head = g_batch * UNIT, g_row * UNIT, g_head * UNIT
    kv_head, residue, cell = locate(cells, num_cells, stride)
    wide_kv_head = kv_head.to(tl.int64)
    batch = tl.load(cell).to(tl.int64)
    row = tl.load(cell + 1) + residue
    first = tl.load(cell + 2) + residue
    count = (tl.load(cell + 3) - residue + stride - 1) // stride
    if count <= 0:
        return
    query_row0, begin, end = tl.load(cell + 4), tl.load(cell + 5), tl.load(cell + 6)
    steps, columns = tl.arange(0, BLOCK), tl.arange(0, QUERIES)
    dims, value_dims = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    in_tile = steps < count
    positions = first + stride * steps
    last = first + stride * (count - 1)
    rows = (row + stride * steps).to(tl.int64)
    shown = in_tile
    if HIDDEN:
        shown = shown & (tl.load(hidden + batch * hidden_batch + rows, mask=in_tile, other=1) == 0)
    k = tl.load(
        key + batch * k_batch + wide_kv_head * k_head + rows[:, None] * k_row + dims[None, :],
        mask=shown[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    v = tl.load(
        value + batch * v_batch + wide_kv_head * v_head + rows[:, None] * v_row + value_dims[None, :],
        mask=shown[:, None] & (value_dims < DV)[None, :], other=0.0,
    )  # fmt: skip
    dk = tl.zeros([BLOCK, PADDED], tl.float32)
    dv = tl.zeros([BLOCK, PADDED_V], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        wide_head = head.to(tl.int64)
        for branch in range(num_branches):
            length, rate = tl.load(branches + 2 * branch), tl.load(branches + 2 * branch + 1)
            offset = head_offset(head, rate, num_heads, interleaved)
            for segment in range(first // length, last // length + 1):
                active = rows_of(positions, shown, segment, length, rate, offset)
                if tl.max(active.to(tl.int32), 0) > 0:
                    start = segment * length
                    run, queries = run_of(start, length, rate, offset, begin, end)
                    # No query before `firsts` of a row's sees it; all blocks from `unmasked` on are seen by all rows.
                    firsts = tl.where(active, 0, 1 << 30)
                    unmasked = tl.where(tl.min(active.to(tl.int32), 0) > 0, 0, 1 << 30)
                    if CAUSAL:
                        low = first + stride * (tl.maximum(start - first + stride - 1, 0) // stride)
                        high = tl.minimum(last, start + length - 1)
                        skipped = tl.maximum(low - run + rate - 1, 0) // rate // QUERIES * QUERIES
                        unmasked = tl.maximum(unmasked, tl.maximum(high - run + rate - 1, 0) // rate - skipped)
                        queries -= skipped
                        run += rate * skipped
                        firsts = tl.maximum(firsts, tl.maximum(positions - run + rate - 1, 0) // rate)
                    run_row = (query_row0 + run).to(tl.int64)
                    query_rows = run_row + rate.to(tl.int64) * columns
                    q_pointers = (
                        query + batch * q_batch + wide_head * q_head + query_rows[:, None] * q_row + dims[None, :]
                    )
                    g_pointers = (
                        grad_out
                        + batch * g_batch
                        + wide_head * g_head
                        + query_rows[:, None] * g_row
                        + value_dims[None, :]
                    )
                    flat = (batch * query_rows_total + query_rows) * num_heads + head
                    lse_pointers = lse + flat
                    delta_pointers = delta + branch * delta_branch + flat
                    jump = rate.to(tl.int64) * QUERIES
                    for block in range(0, queries, QUERIES):
                        dk, dv = _key_share(
                            k, v, q_pointers, g_pointers, lse_pointers, delta_pointers, dk, dv,
                            firsts - block, queries - block, block < unmasked,
                            scale_log2, seed, drop_below, keep_scale,
                            row + stride * steps, first_query + query_row0 + run + rate * (block + columns),
                            batch.to(tl.int32) * num_heads + head, branch,
                            D, DV, DROPOUT, PRECISION,
                        )  # fmt: skip
                        q_pointers += jump * q_row
                        g_pointers += jump * g_row
                        lse_pointers += jump * num_heads
                        delta_pointers += jump * num_heads
    target = (batch * key_rows_total + rows) * (num_heads // group) + kv_head
    tl.store(
        grad_key + target[:, None] * D + dims[None, :],
        (dk * scale).to(grad_key.dtype.element_ty),
        mask=in_tile[:, None] & (dims < D)[None, :],
    )
    tl.store(
        grad_value + target[:, None] * DV + value_dims[None, :],
        dv.to(grad_value.dtype.element_ty),
        mask=in_tile[:, None] & (value_dims < DV)[None, :],
    )
