"""What the block-sparse kernels ask about tiles: where one lies, and which pairs of a listed block count."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import COUNTS

SPARSE_COUNTS = [
    *(name for name in COUNTS if name in ("num_branches", "num_heads", "group", "query_rows_total", "key_rows_total")),
    "first_query", "hidden_batch", "seed", "drop_below", "num_query_tiles", "num_key_tiles", "head_step",
]  # fmt: skip
"""Integers that change from call to call: no kernel is compiled anew for a value of these."""


@triton.jit
def part_of_tile(tiles, tile, part, BLOCK: tl.constexpr):
    """(batch entry, first row, its position, rows) of ``part`` of a tile, which is at most BLOCK of its rows."""
    record = tiles + tile * 4
    skipped = part * BLOCK
    batch, row, position, count = (
        tl.load(record),
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
    )
    return batch.to(tl.int64), row + skipped, position + skipped, tl.minimum(count - skipped, BLOCK)


@triton.jit
def pairs_seen(
    row_bits, dilated, num_branches, entry, query_steps, query_positions, key_positions, head, num_heads,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Which pairs of a block that is not seen whole count; query and key tensors broadcast together.

    ``query_steps`` are rows of the query tile; ``dilated`` has (segment length, rate, interleaved) a branch.
    """
    seen = (query_positions + key_positions) < 0  # none: positions are never negative
    if WORDS > 0:
        word = tl.load(row_bits + entry * WORDS + query_steps // 32)
        seen = seen | (((word >> (query_steps % 32)) & 1) != 0)
    for branch in range(num_branches):
        length, rate = tl.load(dilated + 3 * branch), tl.load(dilated + 3 * branch + 1)
        by_turns = tl.load(dilated + 3 * branch + 2)
        offset = tl.where(by_turns != 0, head % rate, head // ((num_heads + rate - 1) // rate))
        of_query = (query_positions % length) % rate == offset
        of_key = (key_positions % length) % rate == offset
        seen = seen | (of_query & of_key & (query_positions // length == key_positions // length))
    return seen
