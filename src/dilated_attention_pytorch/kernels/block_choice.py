"""Which key blocks rows choose by their summaries, in plain Triton: scores and the best of them in one kernel.

A program takes rows of one query tile and walks the blocks that they may choose, WIDTH - KEEP at a time. Scores of
these, and the best so far, are one tile of WIDTH numbers a row. A number is an integer in the order of the scores whose
last bits are its place, so no two are equal, and the largest are taken out one by one: no sort, no scan. Scores are
compared to 24 bits, which is what summaries in two parts of half precision give. The tile goes through memory (some KiB
a program, which stay in the cache) because products give it in parts. Rows lie along the lanes of a warp, so that a
maximum needs few other lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHOICE_COUNTS = [
    "total", "query_tiles", "heads", "group", "summary_tiles", "query_rows_total", "parts", "keep", "q_batch", "q_row",
    "q_head",
]  # fmt: skip
"""Integers that change from call to call: no kernel is compiled anew for a value of these."""

POOLINGS = {"mean": 0, "sub_means": 0, "min_max": 1, "moments": 2}
"""How scores come from summaries: see `score`."""


@triton.jit
def product(table, rest, at, q, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Summaries (columns, D) times rows; ``SPLIT``: what a summary loses in half precision is in ``rest``."""
    across = tl.trans(q)
    found = tl.dot(tl.load(table + at), across, input_precision=PRECISION)
    if SPLIT:
        found = tl.dot(tl.load(rest + at), across, found, input_precision=PRECISION)
    return found


@triton.jit
def score(
    q, table, rest, columns, real, parts, half_scale, PADDED: tl.constexpr, POOLING: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(columns, rows) scores, but for a positive factor: of means the largest, of bounds or moments their sum."""
    dims = tl.arange(0, PADDED)
    at = (tl.where(real, columns, 0).to(tl.int64) * parts * PADDED)[:, None] + dims[None, :]
    if POOLING == 0:
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


@triton.jit(do_not_specialize=CHOICE_COUNTS)
def block_choice_kernel(
    query, table, rest, filled, rows_of_tiles, low, high, shift, chosen, numbers, indices,
    total, query_tiles, heads, group, summary_tiles, query_rows_total, parts, keep, q_batch, q_row, q_head, half_scale,
    ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr, COLUMNS: tl.constexpr,
    D: tl.constexpr, PADDED: tl.constexpr, POOLING: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """chosen (B, H, Nq, keep): the best blocks of every row, the best first; other places stay as they are.

    Args:
        table, rest: (G, summary_tiles, parts, PADDED) summaries, and what they lose in half precision.
        filled: (summary_tiles,) uint8, which of them may be chosen.
        rows_of_tiles: (query_tiles, SIZE) int32: row of the query, counted over the batch; -1 where there is none.
        low, high: (query_tiles,) int32: the tiles that may be chosen; ``shift``: what makes a block of a tile.
        numbers, indices: (programs, WIDTH, ROWS) and (programs, 2 * KEEP, ROWS) int32, scratch.
    """
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    nothing: tl.constexpr = -(1 << 31)
    least: tl.constexpr = -2139095041  # the number of minus infinity
    program = tl.program_id(0)
    lines, slots, places, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, KEEP), tl.arange(0, PADDED)
    mine = numbers + program.to(tl.int64) * (WIDTH * ROWS)
    known = indices + program.to(tl.int64) * (2 * KEEP * ROWS)
    for turn in range(program, total, tl.num_programs(0)):
        part = turn % (SIZE // ROWS)
        tile = turn // (SIZE // ROWS) % query_tiles
        head = turn // (SIZE // ROWS) // query_tiles
        row = tl.load(rows_of_tiles + tile * SIZE + part * ROWS + lines)
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
        first_tile, last_tile, of_block = tl.load(low + tile), tl.load(high + tile), tl.load(shift + tile)
        own = (head // group).to(tl.int64) * summary_tiles * parts * PADDED
        target = ((batch.to(tl.int64) * heads + head) * query_rows_total + row) * keep
        side = 0
        for first in range(first_tile, last_tile, WIDTH - KEEP):
            for skipped in range(0, tl.minimum(WIDTH - KEEP, last_tile - first), COLUMNS):
                inner = skipped + tl.arange(0, COLUMNS)
                columns = first + inner
                real = columns < last_tile
                s = score(q, table + own, rest + own, columns, real, parts, half_scale, PADDED, POOLING, SPLIT,
                          PRECISION)  # fmt: skip
                shown = real & (tl.load(filled + columns, mask=real, other=0) != 0)
                tl.store(
                    mine + ((KEEP + inner)[:, None] * ROWS + lines[None, :]),
                    tl.where(shown[:, None], ordered(s), nothing),
                )
            tl.debug_barrier()
            older = slots < KEEP
            # Of the first piece of blocks there is nothing older.
            inside = tl.where(first > first_tile, keep, 0)
            real = (older & (slots < inside)) | ((slots >= KEEP) & (first + slots - KEEP < last_tile))
            found = tl.load(mine + (slots[:, None] * ROWS + lines[None, :]), mask=real[:, None], other=nothing)
            found = tl.where(found > least, (found & -WIDTH) | (WIDTH - 1 - slots)[:, None], nothing)
            tl.debug_barrier()
            for place in range(keep):
                top = tl.max(found, 0)
                found = tl.where(found == top[None, :], nothing, found)
                tl.store(mine + place * ROWS + lines, top)
            tl.debug_barrier()
            at = places[:, None] * ROWS + lines[None, :]
            top = tl.load(mine + at, mask=(places < keep)[:, None], other=nothing)
            slot = WIDTH - 1 - (top & (WIDTH - 1))
            index = tl.load(known + side * (KEEP * ROWS) + slot * ROWS + lines[None, :],
                            mask=(top != nothing) & (slot < KEEP), other=0)  # fmt: skip
            index = tl.where(slot < KEEP, index, first + slot - KEEP)
            side = 1 - side
            if first + (WIDTH - KEEP) < last_tile:
                tl.store(known + side * (KEEP * ROWS) + at, index)
            else:
                tl.store(
                    chosen + (target[None, :] + places[:, None]), index - of_block,
                    mask=(top != nothing) & there[None, :],
                )  # fmt: skip
