# mypy: disable-error-code="possibly-undefined"
"""Which key blocks rows choose by their summaries, in plain Triton: scores and the best of them in one kernel.

A program takes ROWS rows and walks the blocks that they may choose, COLUMNS at a time. A score and its block are one
integer in the order of the scores, whose last bits are the block, so no two are equal: of n blocks a score keeps
32 - log2(n) bits, 23 of 512. The best so far are sorted lists, which a sorting network joins with the sorted scores of
the next blocks. A matrix product leaves every row to a QUAD of neighbouring threads, a quarter of its columns each; so
each thread has a list of its own, a network is nothing but minima and maxima of its registers, and the lists of a row
are joined at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHOICE_COUNTS = [
    "query_tiles", "heads", "group", "summary_tiles", "places", "query_rows_total", "parts", "keep", "near", "q_batch",
    "q_row", "q_head",
]  # fmt: skip
"""Integers that change from call to call: no kernel is compiled anew for a value of these."""

POOLINGS = {"mean": 0, "min_max": 1, "moments": 2, "sub_means": 3}
"""How scores come from summaries: see `score`."""


@triton.jit
def product(table, rest, at, q, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Rows (rows, D) times summaries; ``SPLIT``: what a summary loses in half precision is in ``rest``."""
    found = tl.dot(q, tl.trans(tl.load(table + at)), input_precision=PRECISION)
    if SPLIT:
        found = tl.dot(q, tl.trans(tl.load(rest + at)), found, input_precision=PRECISION)
    return found


@triton.jit
def score(
    q, table, rest, columns, real, parts, half_scale, PADDED: tl.constexpr, POOLING: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, columns) scores, but for a positive factor: of means the largest, of bounds or moments their sum."""
    dims = tl.arange(0, PADDED)
    at = (tl.where(real, columns, 0).to(tl.int64) * parts * PADDED)[:, None] + dims[None, :]
    if POOLING == 0:
        found = product(table, rest, at, q, SPLIT, PRECISION)
    elif POOLING == 3:
        found = product(table, rest, at, q, SPLIT, PRECISION)
        for part in range(1, parts):
            found = tl.maximum(found, product(table, rest, at + part * PADDED, q, SPLIT, PRECISION))
    elif POOLING == 1:
        zero = tl.zeros_like(q)
        found = product(table, rest, at, tl.where(q < 0, q, zero), SPLIT, PRECISION)
        found += product(table, rest, at + PADDED, tl.where(q > 0, q, zero), SPLIT, PRECISION)
    else:
        found = product(table, rest, at, q, SPLIT, PRECISION)
        found += product(table, rest, at + PADDED, q * q, SPLIT, PRECISION) * half_scale
    return found


@triton.jit
def ordered(scores):
    """Integers in the order of float32 numbers; its own inverse but for the type."""
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


QUAD = tl.constexpr(4)
"""Threads that share a row of a product: of every 8 columns each has 2."""


@triton.jit
def halves(x, BIT: tl.constexpr):
    """The last axis as numbers at places without ``BIT`` and those with it, each (..., N >> BIT + 1, 1 << BIT)."""
    places: tl.constexpr = x.shape[2] >> (BIT + 1)
    return tl.split(tl.permute(x.reshape(x.shape[0], x.shape[1], places, 2, 1 << BIT), (0, 1, 2, 4, 3)))


@triton.jit
def united(low, high, BIT: tl.constexpr):
    """What `halves` has parted."""
    width: tl.constexpr = low.shape[2] * low.shape[3] * 2
    return tl.permute(tl.join(low, high), (0, 1, 2, 4, 3)).reshape(low.shape[0], low.shape[1], width)


@triton.jit
def turned(x, BITS: tl.constexpr):
    """The last axis of (..., 1 << BITS) the other way round."""
    y = x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3])
    for bit in tl.static_range(0, BITS):
        low, high = halves(y, bit)
        y = united(high, low, bit)
    return y.reshape(x.shape[0], x.shape[1], x.shape[2], x.shape[3])


@triton.jit
def in_order(x, BITS: tl.constexpr, FALLING: tl.constexpr):
    """Runs of 1 << BITS that rise and fall, or fall and rise, sorted."""
    for step in tl.static_range(0, BITS):
        low, high = halves(x, BITS - 1 - step)
        least, most = tl.minimum(low, high), tl.maximum(low, high)
        if FALLING:  # noqa: SIM108
            x = united(most, least, BITS - 1 - step)
        else:
            x = united(least, most, BITS - 1 - step)
    return x


@triton.jit
def rising(x, BITS: tl.constexpr):
    """Runs of 1 << BITS sorted, the least first."""
    for bit in tl.static_range(0, BITS):
        low, high = halves(x, bit)
        high = turned(high, bit)
        x = in_order(united(tl.minimum(low, high), tl.maximum(low, high), bit), bit, False)
    return x


@triton.jit
def best_of_two(low, high, BITS: tl.constexpr):
    """The larger half of two falling lists (rows, lists, 1 << BITS), falling."""
    other = turned(high.reshape(high.shape[0], high.shape[1], 1, high.shape[2]), BITS)
    return in_order(tl.maximum(low, other.reshape(high.shape[0], high.shape[1], high.shape[2])), BITS, True)


@triton.jit
def best_of_quad(x, BITS: tl.constexpr):
    """(rows, 1 << BITS) of the falling lists (rows, QUAD, 1 << BITS) of every row."""
    rows: tl.constexpr = x.shape[0]
    low, high = tl.split(tl.permute(x.reshape(rows, 2, 2, 1 << BITS), (0, 1, 3, 2)))
    low, high = tl.split(tl.permute(best_of_two(low, high, BITS), (0, 2, 1)))
    found = best_of_two(low.reshape(rows, 1, 1 << BITS), high.reshape(rows, 1, 1 << BITS), BITS)
    return found.reshape(rows, 1 << BITS)


@triton.jit(do_not_specialize=CHOICE_COUNTS)
def block_choice_kernel(
    query, table, rest, filled, rows_of_places, low, high, shift, own, targets, chosen,
    query_tiles, heads, group, summary_tiles, places, query_rows_total, parts, keep, near, q_batch, q_row, q_head,
    half_scale,
    ROWS: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BITS: tl.constexpr, KEEP: tl.constexpr,
    KEEP_BITS: tl.constexpr, ROUNDS: tl.constexpr, MASKED: tl.constexpr, POOLED: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr, POOLING: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """chosen (B, H, Nq, keep): the best blocks of every row, the best first; -1 where there are fewer.

    Args:
        table, rest: (G, summary_tiles, parts, PADDED) summaries, and what they lose in half precision.
        filled: (summary_tiles,) uint8, which of them may be chosen; read if ``MASKED``.
        rows_of_places: (places,) int32: row of the query, counted over the batch; -1 where there is none.
        low, high: for each SPAN places int32: the tiles that may be chosen; ``shift``: what makes a block of a tile.
        own, targets: if ``POOLED``, (places,) int32: the key tile around which ``near`` tiles on each side are not
            chosen, and the row of ``chosen``, counted over the batch.
    """
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    nothing: tl.constexpr = -(1 << 31)
    least: tl.constexpr = -2139095041  # the number of minus infinity
    head = tl.program_id(0) % heads
    tile = query_tiles - 1 - tl.program_id(0) // heads  # later rows have more to choose from
    lines, best_first, dims = tl.arange(0, ROWS), tl.arange(0, KEEP), tl.arange(0, PADDED)
    place = tile * ROWS + lines
    row = tl.load(rows_of_places + place, mask=place < places, other=-1)
    there = row >= 0
    row = tl.where(there, row, 0)
    batch, row = row // query_rows_total, row % query_rows_total
    q = tl.load(
        query + (batch.to(tl.int64) * q_batch + row.to(tl.int64) * q_row + head.to(tl.int64) * q_head)[:, None]
        + dims[None, :],
        mask=there[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    if WIDE:
        q = q.to(tl.float32)
    if SPAN == ROWS:
        first_tile, last_tile, of_block = tl.load(low + tile), tl.load(high + tile), tl.load(shift + tile)
    else:
        lowest = tl.load(low + place // SPAN, mask=there, other=0x7FFFFFFF)
        highest = tl.load(high + place // SPAN, mask=there, other=0)
        of_block = tl.load(shift + place // SPAN, mask=there, other=0)[:, None]
        first_tile, last_tile = tl.min(lowest, 0), tl.max(highest, 0)
    mask = tl.maximum(last_tile - first_tile - 1, 0)  # the last bits of a number
    for power in tl.static_range(0, 5):
        mask = mask | (mask >> (1 << power))
    summaries = (head // group).to(tl.int64) * summary_tiles * parts * PADDED
    if POOLED:
        around = tl.load(own + place, mask=there, other=0)
        to = tl.load(targets + place, mask=there, other=0)
        batch, row = to // query_rows_total, to % query_rows_total
    target = ((batch.to(tl.int64) * heads + head) * query_rows_total + row) * keep
    bound = tl.full([ROWS], 0x7FFFFFFF, tl.int32)
    for turn in range(ROUNDS):
        best = tl.full([ROWS, QUAD, KEEP], nothing, tl.int32)
        for first in range(first_tile, last_tile, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            real = columns < last_tile
            s = score(q, table + summaries, rest + summaries, columns, real, parts, half_scale, PADDED, POOLING, SPLIT,
                      PRECISION)  # fmt: skip
            if MASKED:
                real = real & (tl.load(filled + columns, mask=real, other=0) != 0)
            real = real[None, :]
            if SPAN < ROWS:
                real = real & (columns[None, :] >= lowest[:, None]) & (columns[None, :] < highest[:, None])
            if POOLED:
                real = real & (tl.abs(columns[None, :] - around[:, None]) > near)
            found = (ordered(s) & ~mask) | (mask - (columns - first_tile))[None, :]
            if ROUNDS > 1:
                real = real & (found < bound[:, None])
            found = tl.where(real, found, nothing)
            found = tl.permute(found.reshape(ROWS, COLUMNS // (2 * QUAD), QUAD, 2), (0, 2, 1, 3))
            found = rising(found.reshape(ROWS, QUAD, COLUMNS // QUAD), COLUMN_BITS)
            for bit in tl.static_range(COLUMN_BITS, KEEP_BITS):
                found = found.reshape(ROWS, QUAD, 1, 1 << bit)
                found = united(tl.full([ROWS, QUAD, 1, 1 << bit], nothing, tl.int32), found, bit)
            best = in_order(tl.maximum(best, found), KEEP_BITS, True)
        top = best_of_quad(best, KEEP_BITS)
        index = tl.where(top > least, first_tile + mask - (top & mask) - of_block, -1)
        number = turn * KEEP + best_first
        tl.store(
            chosen + (target[:, None] + number[None, :]), index, mask=there[:, None] & (number < keep)[None, :]
        )  # fmt: skip
        bound = tl.min(top, 1)
