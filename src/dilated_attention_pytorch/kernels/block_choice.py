"""Which key blocks rows choose by their summaries, in plain Triton: scores and the best of them in one kernel.

A program takes rows of one query tile and walks the blocks that they may choose, WIDTH - KEEP at a time. Scores of
these, and the best so far, are one tile of WIDTH numbers a row, whose `keep` largest are found by bisection over the
bits of the numbers: no sort. The tile goes through memory (a few KiB a program, which stay in the cache) because
products give it in parts. Rows lie along the lanes of a warp, so that counting along a row needs no other lane.
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


@triton.jit(do_not_specialize=CHOICE_COUNTS)
def block_choice_kernel(
    query, table, rest, filled, rows_of_tiles, low, high, shift, chosen, values, indices,
    total, query_tiles, heads, group, summary_tiles, query_rows_total, parts, keep, q_batch, q_row, q_head, half_scale,
    ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr, COLUMNS: tl.constexpr,
    BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, POOLING: tl.constexpr, SPLIT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """chosen (B, H, Nq, keep): the best blocks of every row, in ascending order; other places stay as they are.

    Args:
        table, rest: (G, summary_tiles, parts, PADDED) summaries, and what they lose in half precision.
        filled: (summary_tiles,) uint8, which of them may be chosen.
        rows_of_tiles: (query_tiles, SIZE) int32: row of the query, counted over the batch; -1 where there is none.
        low, high: (query_tiles,) int32: the tiles that may be chosen; ``shift``: what makes a block of a tile.
        values, indices: (programs, WIDTH, ROWS) float32 and (programs, KEEP, ROWS) int32, scratch.
    """
    q_batch, q_row, q_head = q_batch * UNIT, q_row * UNIT, q_head * UNIT
    program = tl.program_id(0)
    lines, slots, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, PADDED)
    mine = values + program.to(tl.int64) * (WIDTH * ROWS) + lines[None, :]
    kept = indices + program.to(tl.int64) * (KEEP * ROWS) + lines[None, :]
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
        number = tl.zeros([ROWS], tl.int32)
        for first in range(first_tile, last_tile, WIDTH - KEEP):
            for skipped in range(0, tl.minimum(WIDTH - KEEP, last_tile - first), COLUMNS):
                inner = skipped + tl.arange(0, COLUMNS)
                columns = first + inner
                real = columns < last_tile
                s = score(q, table + own, rest + own, columns, real, parts, half_scale, PADDED, POOLING, SPLIT,
                          PRECISION)  # fmt: skip
                shown = real & (tl.load(filled + columns, mask=real, other=0) != 0)
                tl.store(mine + (KEEP + inner)[:, None] * ROWS, tl.where(shown[:, None], s, -float("inf")))
            tl.debug_barrier()
            older, fresh = slots < KEEP, first + slots - KEEP
            valid = tl.where(older[:, None], slots[:, None] < number[None, :], (fresh < last_tile)[:, None])
            found = tl.load(mine + slots[:, None] * ROWS, mask=valid, other=-float("inf"))
            # Numbers in the order of the scores, 0 where there is none to choose.
            bits = found.to(tl.uint32, bitcast=True)
            bits = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
            bits = tl.where(valid & (found != -float("inf")), bits, 0)
            available = tl.sum((bits > 0).to(tl.int32), 0)
            # The largest number that at least `keep` reach; where there are no more than that, 1.
            least = tl.zeros([ROWS], tl.uint32)
            reached = tl.where(available > keep, WIDTH + 1, keep)
            step = tl.full([1], 0x80000000, tl.uint32)
            todo = 32 // BITS
            while todo > 0:
                for _ in tl.static_range(BITS):
                    tried = least + step
                    count = tl.sum((bits >= tried[None, :]).to(tl.int32), 0)
                    taken = (count >= keep) & (reached != keep)
                    least = tl.where(taken, tried, least)
                    reached = tl.where(taken, count, reached)
                    step = step >> 1
                todo = tl.where(tl.max((reached != keep).to(tl.int32), 0) > 0, todo - 1, 0)
            least = tl.where(available > keep, least, 1)
            above = bits > least[None, :]
            level = bits == least[None, :]
            room = keep - tl.sum(above.to(tl.int32), 0)
            best = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room[None, :]))
            place = tl.cumsum(best.to(tl.int32), 0) - 1
            index = tl.load(kept + slots[:, None] * ROWS, mask=best & older[:, None], other=0)
            index = tl.where(older[:, None], index, fresh[:, None])
            number = tl.sum(best.to(tl.int32), 0)
            tl.debug_barrier()
            if first + (WIDTH - KEEP) < last_tile:
                found = tl.where((bits >> 31) != 0, bits & 0x7FFFFFFF, ~bits).to(tl.float32, bitcast=True)
                tl.store(mine + place * ROWS, found, mask=best)
                tl.store(kept + place * ROWS, index, mask=best)
            else:
                tl.store(chosen + target[None, :] + place, index - of_block, mask=best & there[None, :])
