"""Backward pass over lists of key blocks in plain Triton: dQ by query tile, dK and dV by key tile.

The second kernel walks the transposed lists. Each gradient is accumulated in registers and written once: no atomics,
so repeats are equal bit by bit. P = exp(s - lse) with the final lse, and dS = P * (dP - delta).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sparse_tile import SPARSE_COUNTS, pairs_seen, part_of_tile
from .tile import kept, load_rows


@triton.jit(do_not_specialize=SPARSE_COUNTS)
def sparse_query_kernel(
    query, key, value, hidden, grad_out, lse, delta, grad_query, query_tiles, key_tiles, row_pointer, columns, whole,
    row_bits, dilated, num_query_tiles, head_step, num_branches, num_heads, group, query_rows_total, first_query,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head, hidden_batch,
    scale, scale_log2, seed, drop_below, keep_scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr, PARTLY: tl.constexpr, WORDS: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK rows of one query tile of SIZE rows, contiguous (B, Nq, H, D)."""
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    g_batch, g_row, g_head = g_batch * UNIT, g_row * UNIT, g_head * UNIT
    program = tl.program_id(0)
    part = program % (SIZE // BLOCK)
    tile = (program // (SIZE // BLOCK)) % num_query_tiles
    head = program // (SIZE // BLOCK) // num_query_tiles
    wide_head, wide_kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    batch, row, position, count = part_of_tile(query_tiles, tile, part, BLOCK)
    if count <= 0:
        return
    steps, columns_of = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    dims, value_dims = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    in_tile = steps < count
    positions = position + steps
    rows = (row + steps).to(tl.int64)
    q = tl.load(
        query + batch * q_batch + wide_head * q_head + rows[:, None] * q_row + dims[None, :],
        mask=in_tile[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    target = (batch * query_rows_total + rows) * num_heads + head
    row_lse = tl.load(lse + target, mask=in_tile, other=float("inf")) * 1.4426950408889634
    row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)  # a row without keys
    with_keys = row_lse != float("inf")
    row_delta = tl.load(delta + target, mask=with_keys, other=0.0)
    g = tl.load(
        grad_out + batch * g_batch + wide_head * g_head + rows[:, None] * g_row + value_dims[None, :],
        mask=with_keys[:, None] & (value_dims < DV)[None, :], other=0.0,
    )  # fmt: skip
    dq = tl.zeros([BLOCK, PADDED], tl.float32)
    pointer = row_pointer + head * head_step + tile
    for entry in range(tl.load(pointer), tl.load(pointer + 1)):
        record = key_tiles + tl.load(columns + entry) * 4
        for skipped in range(0, SIZE, KEYS):
            key_row = tl.load(record + 1) + skipped
            key_positions = tl.load(record + 2) + skipped + columns_of
            seen = columns_of < tl.load(record + 3) - skipped
            key_rows = (key_row + columns_of).to(tl.int64)
            if HIDDEN:
                seen = seen & (tl.load(hidden + batch * hidden_batch + key_rows, mask=seen, other=1) == 0)
            k = load_rows(
                key + batch * k_batch + wide_kv_head * k_head + key_rows[:, None] * k_row + dims[None, :], seen, D
            )
            v = load_rows(
                value + batch * v_batch + wide_kv_head * v_head + key_rows[:, None] * v_row + value_dims[None, :],
                seen, DV,
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = tl.where(seen[None, :], s, -float("inf"))
            if CAUSAL:
                s = tl.where(key_positions[None, :] <= positions[:, None], s, -float("inf"))
            if PARTLY:  # noqa: SIM102 (a choice of the compiler's, then one at run time)
                if tl.load(whole + entry) == 0:
                    counted = pairs_seen(
                        row_bits, dilated, num_branches, entry, (part * BLOCK + steps)[:, None], positions[:, None],
                        key_positions[None, :], head, num_heads, WORDS,
                    )  # fmt: skip
                    s = tl.where(counted, s, -float("inf"))
            p = tl.exp2(s * scale_log2 - row_lse[:, None])
            dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                survives = kept(
                    seed, drop_below, (key_row + columns_of)[None, :], (first_query + row + steps)[:, None],
                    batch.to(tl.int32) * num_heads + head, 0,
                )  # fmt: skip
                dp = tl.where(survives, dp * keep_scale, 0.0)
            ds = p * (dp - row_delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(
        grad_query + target[:, None] * D + dims[None, :],
        (dq * scale).to(grad_query.dtype.element_ty),
        mask=in_tile[:, None] & (dims < D)[None, :],
    )


@triton.jit(do_not_specialize=SPARSE_COUNTS)
def sparse_key_kernel(
    query, key, value, hidden, grad_out, lse, delta, grad_key, grad_value, query_tiles, key_tiles, row_pointer,
    columns, entries, whole, row_bits, dilated, num_key_tiles, head_step, num_branches, num_heads, group,
    query_rows_total, key_rows_total, first_query,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head, hidden_batch,
    scale, scale_log2, seed, drop_below, keep_scale,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr, PARTLY: tl.constexpr, WORDS: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dK (B, Nk, G, D) and dV (B, Nk, G, DV), contiguous, of BLOCK rows of one key tile; heads of a group add.

    ``row_pointer``, ``columns`` (query tiles) and ``entries`` (of the lists by query tile) are the transposed lists.
    """
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    g_batch, g_row, g_head = g_batch * UNIT, g_row * UNIT, g_head * UNIT
    program = tl.program_id(0)
    part = program % (SIZE // BLOCK)
    tile = (program // (SIZE // BLOCK)) % num_key_tiles
    kv_head = program // (SIZE // BLOCK) // num_key_tiles
    wide_kv_head = kv_head.to(tl.int64)
    batch, row, position, count = part_of_tile(key_tiles, tile, part, BLOCK)
    if count <= 0:
        return
    steps, columns_of = tl.arange(0, BLOCK), tl.arange(0, QUERIES)
    dims, value_dims = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    in_tile = steps < count
    positions = position + steps
    rows = (row + steps).to(tl.int64)
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
        pointer = row_pointer + head * head_step + tile
        for listed in range(tl.load(pointer), tl.load(pointer + 1)):
            record = query_tiles + tl.load(columns + listed) * 4
            for skipped in range(0, SIZE, QUERIES):
                query_row = tl.load(record + 1) + skipped
                query_positions = tl.load(record + 2) + skipped + columns_of
                exists = columns_of < tl.load(record + 3) - skipped
                query_rows = (query_row + columns_of).to(tl.int64)
                flat = (batch * query_rows_total + query_rows) * num_heads + head
                # An lse of +inf makes P 0: beyond the tile, and in rows without keys.
                column_lse = tl.load(lse + flat, mask=exists, other=float("inf")) * 1.4426950408889634
                column_lse = tl.where(column_lse == -float("inf"), float("inf"), column_lse)
                column_delta = tl.load(delta + flat, mask=exists, other=0.0)
                q = load_rows(
                    query + batch * q_batch + wide_head * q_head + query_rows[:, None] * q_row + dims[None, :],
                    exists, D,
                )  # fmt: skip
                g = load_rows(
                    grad_out + batch * g_batch + wide_head * g_head + query_rows[:, None] * g_row
                    + value_dims[None, :],
                    exists, DV,
                )  # fmt: skip
                s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                s = tl.where(shown[:, None], s, -float("inf"))
                if CAUSAL:
                    s = tl.where(positions[:, None] <= query_positions[None, :], s, -float("inf"))
                if PARTLY:
                    entry = tl.load(entries + listed)
                    if tl.load(whole + entry) == 0:
                        counted = pairs_seen(
                            row_bits, dilated, num_branches, entry, (skipped + columns_of)[None, :],
                            query_positions[None, :], positions[:, None], head, num_heads, WORDS,
                        )  # fmt: skip
                        s = tl.where(counted, s, -float("inf"))
                p = tl.exp2(s * scale_log2 - column_lse[None, :])
                dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                weights = p
                if DROPOUT:
                    survives = kept(
                        seed, drop_below, (row + steps)[:, None], (first_query + query_row + columns_of)[None, :],
                        batch.to(tl.int32) * num_heads + head, 0,
                    )  # fmt: skip
                    weights = tl.where(survives, p * keep_scale, 0.0)
                    dp = tl.where(survives, dp * keep_scale, 0.0)
                dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
                ds = p * (dp - column_delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
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
