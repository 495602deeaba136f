"""Attention of rows to the key blocks that each has chosen for itself, in plain Triton.

The rows that chose a block are packed: a program keeps one block of keys and values and meets its rows a tile at a
time, wherever they lie, so that products are dense whatever neighbours chose. An *entry* is one choice of one row. Its
share of the result goes into memory once, and a second kernel joins the entries of a row: no atomics, so repeats are
equal bit by bit, and a row's result depends on its own choices alone. A *list* is one key head of one batch entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import kept, load_rows

CHOSEN_COUNTS = [
    "entries_of_list", "keep", "first_list", "kv_heads", "group", "query_rows_total", "key_rows_total", "first_query",
    "hidden_batch", "seed", "drop_below", "key_tiles_total", "programs_of_list",
]  # fmt: skip
"""Integers that change from call to call: no kernel is compiled anew for a value of these."""


@triton.jit
def rows_of_entries(order_rows, begin, steps, there, query_rows_total, ALONE: tl.constexpr):
    """(head within its group, query row) of packed rows; ``ALONE``: one head is the group."""
    row = tl.load(order_rows + begin + steps, mask=there, other=0)
    if ALONE:
        return tl.zeros_like(row), row
    else:
        return row // query_rows_total, row % query_rows_total


@triton.jit
def block_of_keys(
    keys_at, values_at, hidden, key_row, key_count, columns, k_row, v_row, dims, value_dims,
    D: tl.constexpr, DV: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Keys and values of the rows from ``key_row`` on, and which of them count."""
    rows, seen = (key_row + columns).to(tl.int64), columns < key_count
    if HIDDEN:
        seen = seen & (tl.load(hidden + rows, mask=seen, other=1) == 0)
    k = load_rows(keys_at + rows[:, None] * k_row + dims[None, :], seen, D)
    v = load_rows(values_at + rows[:, None] * v_row + value_dims[None, :], seen, DV)
    return k, v, seen


@triton.jit(do_not_specialize=CHOSEN_COUNTS)
def chosen_forward_kernel(
    query, key, value, hidden, part_out, part_lse, pieces, order, order_rows, key_tiles,
    entries_of_list, keep, first_list, programs_of_list, kv_heads, group, query_rows_total, first_query,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, hidden_batch,
    scale_log2, seed, drop_below, keep_scale,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
    HIDDEN: tl.constexpr, DROPOUT: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """part_out (lists, entries, DV) and part_lse (lists, entries) of the entries of one piece of one key tile.

    ``pieces`` (lists, programs, 3): key tile, first entry in ``order``, entries. ``order``, ``order_rows`` (lists,
    entries) int32: an entry is (head * rows + row) * keep + choice, and its (head * rows + row).
    """
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    place = tl.program_id(0) // programs_of_list
    chosen_list = first_list + place
    piece = pieces + (chosen_list.to(tl.int64) * programs_of_list + tl.program_id(0) % programs_of_list) * 3
    tile, first, count = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    if count <= 0:
        return
    batch, kv_head = (chosen_list // kv_heads).to(tl.int64), chosen_list % kv_heads
    begin = chosen_list.to(tl.int64) * entries_of_list + first
    key_row, key_count = tl.load(key_tiles + tile * 4 + 1), tl.load(key_tiles + tile * 4 + 3)
    columns, dims, value_dims = tl.arange(0, KEYS), tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    keys_at = key + batch * k_batch + kv_head.to(tl.int64) * k_head
    values_at = value + batch * v_batch + kv_head.to(tl.int64) * v_head
    # The first part of a block; where that is all of it, it stays where it is for all tiles of rows.
    k, v, seen = block_of_keys(
        keys_at, values_at, hidden + batch * hidden_batch, key_row, key_count, columns, k_row, v_row, dims, value_dims,
        D, DV, HIDDEN,
    )  # fmt: skip
    for start in range(0, count, BLOCK):
        steps = start + tl.arange(0, BLOCK)
        there = steps < count
        member, row = rows_of_entries(order_rows, begin, steps, there, query_rows_total, ALONE)
        head = kv_head * group + member
        q = load_rows(
            query + batch * q_batch + (head.to(tl.int64) * q_head + row.to(tl.int64) * q_row)[:, None] + dims[None, :],
            there, D,
        )  # fmt: skip
        accumulator = tl.zeros([BLOCK, PADDED_V], tl.float32)
        largest = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for skipped in tl.static_range(0, SIZE, KEYS):
            if SIZE == KEYS:
                part_k, part_v, part_seen = k, v, seen
            else:
                part_k, part_v, part_seen = block_of_keys(
                    keys_at, values_at, hidden + batch * hidden_batch, key_row + skipped, key_count - skipped, columns,
                    k_row, v_row, dims, value_dims, D, DV, HIDDEN,
                )  # fmt: skip
            s = tl.dot(q, tl.trans(part_k), input_precision=PRECISION)
            s = tl.where(part_seen[None, :], s, -float("inf"))
            new = tl.maximum(largest, tl.max(s, 1) * scale_log2)
            shift = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(s * scale_log2 - shift[:, None])
            decay = tl.exp2(largest - shift)
            total = total * decay + tl.sum(p, 1)
            if DROPOUT:
                survives = kept(
                    seed, drop_below, (key_row + skipped + columns)[None, :], (first_query + row)[:, None],
                    (batch.to(tl.int32) * (kv_heads * group) + head)[:, None], 0,
                )  # fmt: skip
                p = tl.where(survives, p * keep_scale, 0.0)
            if SIZE > KEYS:
                accumulator = accumulator * decay[:, None]
            accumulator = tl.dot(p.to(part_v.dtype), part_v, accumulator, input_precision=PRECISION)
            largest = new
        share = tl.where(total == 0, 0.0, 1.0 / total)
        natural = tl.where(total == 0, -float("inf"), (largest + tl.log2(total)) * 0.6931471805599453)
        slot = place.to(tl.int64) * entries_of_list + tl.load(order + begin + steps, mask=there, other=0)
        tl.store(
            part_out + slot[:, None] * DV + value_dims[None, :],
            (accumulator * share[:, None]).to(part_out.dtype.element_ty),
            mask=there[:, None] & (value_dims < DV)[None, :],
        )
        tl.store(part_lse + slot, natural, mask=there)


@triton.jit
def rows_to_join(
    chosen, entries_of_list, keep, first_list, kv_heads, group, query_rows_total, BLOCK: tl.constexpr
):  # fmt: skip
    """(batch, head, rows, their first entries in ``chosen``, and in partial results) of a program of BLOCK rows."""
    tiles = (query_rows_total + BLOCK - 1) // BLOCK
    member = tl.program_id(0) // tiles % group
    place = tl.program_id(0) // tiles // group
    chosen_list = first_list + place
    rows = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    entry = (member * query_rows_total + rows).to(tl.int64) * keep
    batch, head = (chosen_list // kv_heads).to(tl.int64), chosen_list % kv_heads * group + member
    mine = chosen + chosen_list.to(tl.int64) * entries_of_list + entry
    return batch, head, rows, mine, place.to(tl.int64) * entries_of_list + entry


@triton.jit(do_not_specialize=CHOSEN_COUNTS)
def chosen_join_kernel(
    chosen, part_out, part_lse, out, lse, entries_of_list, keep, first_list, kv_heads, group, query_rows_total,
    out_batch, out_row, out_head,
    BLOCK: tl.constexpr, KEEP: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
):  # fmt: skip
    """Merge the entries of BLOCK rows of one head into out and lse (B, Nq, H), which hold what all rows see.

    ``chosen`` (lists, entries) int: negative where there is none.
    """
    batch, head, rows, mine, slot = rows_to_join(chosen, entries_of_list, keep, first_list, kv_heads, group,
                                                 query_rows_total, BLOCK)  # fmt: skip
    inside, choice, value_dims = rows < query_rows_total, tl.arange(0, KEEP), tl.arange(0, PADDED_V)
    real = inside[:, None] & (choice < keep)[None, :]
    real = real & (tl.load(mine[:, None] + choice[None, :], mask=real, other=-1) >= 0)
    parts = tl.load(part_lse + slot[:, None] + choice[None, :], mask=real, other=-float("inf"))
    at_lse = lse + (batch * query_rows_total + rows) * (kv_heads * group) + head
    own = tl.load(at_lse, mask=inside, other=-float("inf"))
    largest = tl.maximum(own, tl.max(parts, 1))
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.exp(own - shift) + tl.sum(tl.exp(parts - shift[:, None]), 1)
    share = tl.where(total == 0, 0.0, 1.0 / total)
    at = out + batch * out_batch + head.to(tl.int64) * out_head + rows.to(tl.int64)[:, None] * out_row
    shown = inside[:, None] & (value_dims < DV)[None, :]
    sums = tl.load(at + value_dims[None, :], mask=shown, other=0.0).to(tl.float32)
    sums = sums * (tl.exp(own - shift) * share)[:, None]
    for number in range(keep):
        there = inside & (tl.load(mine + number, mask=inside, other=-1) >= 0)
        part = tl.load(part_lse + slot + number, mask=there, other=-float("inf"))
        piece = tl.load(
            part_out + (slot + number)[:, None] * DV + value_dims[None, :], mask=shown & there[:, None], other=0.0
        )
        sums += piece.to(tl.float32) * (tl.exp(part - shift) * share)[:, None]
    tl.store(at + value_dims[None, :], sums.to(out.dtype.element_ty), mask=shown)
    tl.store(at_lse, tl.where(total == 0, -float("inf"), shift + tl.log(total)), mask=inside)


@triton.jit(do_not_specialize=CHOSEN_COUNTS)
def chosen_backward_kernel(
    query, key, value, hidden, grad_out, lse, delta, part_grad, grad_key, grad_value, heavy, first_entry, counts,
    order, order_rows, key_tiles, entries_of_list, keep, first_list, key_tiles_total, kv_heads, group, query_rows_total,
    first_query, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, hidden_batch, scale, scale_log2, seed, drop_below,
    keep_scale,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, DV: tl.constexpr, PADDED_V: tl.constexpr,
    HIDDEN: tl.constexpr, DROPOUT: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """dQ of every entry of BLOCK keys of one key tile, part_grad (lists, entries, D); their dK and dV are added.

    ``heavy`` (lists of this launch * key tiles,) int64: the tiles with most entries first; ``first_entry`` and
    ``counts`` (lists, key tiles): where a tile's entries begin in ``order``, and how many there are. Where a tile is
    several parts of BLOCK keys (``SIZE > BLOCK``), one program takes all of them and adds their dQ.
    """
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    k_batch, k_row, k_head = k_batch * UNIT, k_row * UNIT, k_head * UNIT
    v_batch, v_row, v_head = v_batch * UNIT, v_row * UNIT, v_head * UNIT
    g_batch, g_row, g_head = g_batch * UNIT, g_row * UNIT, g_head * UNIT
    taken = tl.load(heavy + tl.program_id(0)).to(tl.int32)
    place, tile = taken // key_tiles_total, taken % key_tiles_total
    chosen_list = first_list + place
    at = chosen_list * key_tiles_total + tile
    count = tl.load(counts + at)
    if count <= 0:
        return
    batch, kv_head = (chosen_list // kv_heads).to(tl.int64), (chosen_list % kv_heads).to(tl.int64)
    begin = chosen_list.to(tl.int64) * entries_of_list + tl.load(first_entry + at)
    steps, dims, value_dims = tl.arange(0, BLOCK), tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    heads = kv_heads * group
    for skipped in range(0, SIZE, BLOCK):
        key_row = tl.load(key_tiles + tile * 4 + 1) + skipped
        in_tile = steps < tl.load(key_tiles + tile * 4 + 3) - skipped
        rows = (key_row + steps).to(tl.int64)
        shown = in_tile
        if HIDDEN:
            shown = shown & (tl.load(hidden + batch * hidden_batch + rows, mask=in_tile, other=1) == 0)
        k = load_rows(key + batch * k_batch + kv_head * k_head + rows[:, None] * k_row + dims[None, :], shown, D)
        v = load_rows(
            value + batch * v_batch + kv_head * v_head + rows[:, None] * v_row + value_dims[None, :], shown, DV
        )
        dk = tl.zeros([BLOCK, PADDED], tl.float32)
        dv = tl.zeros([BLOCK, PADDED_V], tl.float32)
        for start in range(0, count, QUERIES):
            listed = start + tl.arange(0, QUERIES)
            there = listed < count
            member, query_row = rows_of_entries(order_rows, begin, listed, there, query_rows_total, ALONE)
            head = kv_head * group + member
            wide_row = query_row.to(tl.int64)
            flat = (batch * query_rows_total + wide_row) * heads + head
            column_lse = tl.load(lse + flat, mask=there, other=float("inf")) * 1.4426950408889634
            column_lse = tl.where(column_lse == -float("inf"), float("inf"), column_lse)
            column_delta = tl.load(delta + flat, mask=there, other=0.0)
            q = load_rows(query + batch * q_batch + (head * q_head + wide_row * q_row)[:, None] + dims[None, :],
                          there, D)  # fmt: skip
            g = load_rows(
                grad_out + batch * g_batch + (head * g_head + wide_row * g_row)[:, None] + value_dims[None, :],
                there, DV,
            )  # fmt: skip
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            s = tl.where(shown[:, None], s, -float("inf"))
            p = tl.exp2(s * scale_log2 - column_lse[None, :])
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            weights = p
            if DROPOUT:
                survives = kept(
                    seed, drop_below, (key_row + steps)[:, None], (first_query + query_row)[None, :],
                    (batch * heads + head).to(tl.int32)[None, :], 0,
                )  # fmt: skip
                weights = tl.where(survives, p * keep_scale, 0.0)
                dp = tl.where(survives, dp * keep_scale, 0.0)
            dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
            ds = (p * (dp - column_delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            dq = tl.dot(tl.trans(k), ds, input_precision=PRECISION) * scale  # transposed, as the matrix unit wants it
            slot = place.to(tl.int64) * entries_of_list + tl.load(order + begin + listed, mask=there, other=0)
            to = part_grad + slot[None, :] * D + dims[:, None]
            real = there[None, :] & (dims < D)[:, None]
            if SIZE > BLOCK:
                dq += tl.load(to, mask=real & (skipped > 0), other=0.0).to(tl.float32)
            tl.store(to, dq.to(part_grad.dtype.element_ty), mask=real)
        to = grad_key + batch * dk_batch + kv_head * dk_head + rows[:, None] * dk_row + dims[None, :]
        real = in_tile[:, None] & (dims < D)[None, :]
        dk = dk * scale + tl.load(to, mask=real, other=0.0).to(tl.float32)
        tl.store(to, dk.to(grad_key.dtype.element_ty), mask=real)
        to = grad_value + batch * dv_batch + kv_head * dv_head + rows[:, None] * dv_row + value_dims[None, :]
        real = in_tile[:, None] & (value_dims < DV)[None, :]
        dv += tl.load(to, mask=real, other=0.0).to(tl.float32)
        tl.store(to, dv.to(grad_value.dtype.element_ty), mask=real)
        if SIZE > BLOCK:
            tl.debug_barrier()  # the next part reads the sums of dQ that other threads have written


@triton.jit(do_not_specialize=CHOSEN_COUNTS)
def chosen_sum_kernel(
    chosen, part_grad, grad_query, entries_of_list, keep, first_list, kv_heads, group, query_rows_total,
    dq_batch, dq_row, dq_head, BLOCK: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Add dQ of the entries of BLOCK rows of one head to that of what all rows see."""
    batch, head, rows, mine, slot = rows_to_join(chosen, entries_of_list, keep, first_list, kv_heads, group,
                                                 query_rows_total, BLOCK)  # fmt: skip
    inside, dims = rows < query_rows_total, tl.arange(0, PADDED)
    at = grad_query + batch * dq_batch + head.to(tl.int64) * dq_head + rows.to(tl.int64)[:, None] * dq_row
    shown = inside[:, None] & (dims < D)[None, :]
    sums = tl.load(at + dims[None, :], mask=shown, other=0.0).to(tl.float32)
    for number in range(keep):
        there = inside & (tl.load(mine + number, mask=inside, other=-1) >= 0)
        sums += tl.load(
            part_grad + (slot + number)[:, None] * D + dims[None, :], mask=shown & there[:, None], other=0.0
        ).to(tl.float32)
    tl.store(at + dims[None, :], sums.to(grad_query.dtype.element_ty), mask=shown)
