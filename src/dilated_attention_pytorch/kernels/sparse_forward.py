"""Forward pass over lists of key blocks in plain Triton: one online softmax over the tiles that a query tile lists."""

from __future__ import annotations

import triton
import triton.language as tl

from .sparse_tile import SPARSE_COUNTS, pairs_seen, part_of_tile
from .tile import kept, load_rows


@triton.jit(do_not_specialize=SPARSE_COUNTS)
def sparse_forward_kernel(
    query, key, value, hidden, out, lse, query_tiles, key_tiles, row_pointer, columns, whole, row_bits, dilated,
    num_query_tiles, head_step, num_branches, num_heads, group, query_rows_total, first_query,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, hidden_batch,
    scale_log2, seed, drop_below, keep_scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, DROPOUT: tl.constexpr, PARTLY: tl.constexpr, WORDS: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out (B, Nq, H, DV) and lse (B, Nq, H), both contiguous, of BLOCK rows of one query tile of SIZE rows."""
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
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
    accumulator = tl.zeros([BLOCK, PADDED_V], tl.float32)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
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
            new = tl.maximum(largest, tl.max(s, 1) * scale_log2)
            shift = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(s * scale_log2 - shift[:, None])
            decay = tl.exp2(largest - shift)
            total = total * decay + tl.sum(p, 1)
            if DROPOUT:
                survives = kept(
                    seed, drop_below, (key_row + columns_of)[None, :], (first_query + row + steps)[:, None],
                    batch.to(tl.int32) * num_heads + head, 0,
                )  # fmt: skip
                p = tl.where(survives, p * keep_scale, 0.0)
            v = load_rows(
                value + batch * v_batch + wide_kv_head * v_head + key_rows[:, None] * v_row + value_dims[None, :],
                seen, DV,
            )  # fmt: skip
            accumulator = tl.dot(p.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
            largest = new
    share = tl.where(total == 0, 0.0, 1.0 / total)
    target = (batch * query_rows_total + rows) * num_heads + head
    tl.store(
        out + target[:, None] * DV + value_dims[None, :],
        (accumulator * share[:, None]).to(out.dtype.element_ty),
        mask=in_tile[:, None] & (value_dims < DV)[None, :],
    )
    natural = tl.where(total == 0, -float("inf"), (largest + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + target, natural, mask=in_tile)
