"""What every kernel asks about a tile: its rows, the runs of keys it meets, which pairs count, what dropout keeps.

A tile is up to BLOCK rows of one head and one residue class: positions ``first + stride * i``. In one segment of one
branch it meets a run: positions ``start + rate * j``. See `patterns.tiles` for the table of cells.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = [
    "num_cells", "stride", "interleaved", "num_branches", "first_branch", "num_heads", "group", "query_rows_total",
    "key_rows_total", "first_query", "hidden_batch", "delta_branch", "seed", "drop_below", "rows", "per_batch",
]  # fmt: skip
"""Integers that change from call to call: no kernel is compiled anew for a value of these."""


@triton.jit
def locate(cells, num_cells, stride):
    """(head, class, fields of the cell) of this program; classes of one cell are neighbours, and share their keys."""
    program = tl.program_id(0)
    residue = program % stride
    rest = program // stride
    cell = cells + (rest % num_cells) * 8
    return rest // num_cells, residue, cell


@triton.jit
def head_offset(head, rate, num_heads, interleaved):
    """The residue of its segment that a query head keeps."""
    return tl.where(interleaved != 0, head % rate, head // ((num_heads + rate - 1) // rate))


@triton.jit
def ceil_div(a, b):
    """Ceiling of a / b for b > 0 and any a: integer division truncates toward zero here."""
    return tl.where(a > 0, (a + b - 1) // b, -((-a) // b))


@triton.jit
def rows_of(positions, in_tile, segment, length, rate, offset):
    """Which rows of a tile are active in this segment of this branch."""
    return in_tile & (positions // length == segment) & ((positions % length) % rate == offset)


@triton.jit
def run_of(start, length, rate, offset, begin, end):
    """(first position, number) of the active rows of a segment that exist, those in [begin, end)."""
    skipped = tl.maximum(ceil_div(begin - start - offset, rate), 0)
    stop = ceil_div(tl.minimum(start + length, end) - start - offset, rate)
    return start + offset + rate * skipped, tl.maximum(stop - skipped, 0)


@triton.jit
def zero_keys_of(start, length, rate, offset, document):
    """Zero keys that padding="zeros" adds to a segment of a document of ``document`` rows."""
    slots = (tl.minimum(length, document) + rate - 1) // rate
    real = tl.maximum(ceil_div(tl.minimum(start + length, document) - start - offset, rate), 0)
    return tl.where(start < document, slots - real, 0)


@triton.jit
def kept(seed, threshold, key_rows, query_rows, batch_head, branch):
    """Which pairs survive dropout; the same function of the same counter as `backends.philox`."""
    keys = key_rows + tl.zeros_like(query_rows)
    queries = query_rows + tl.zeros_like(key_rows)
    word, _, _, _ = tl.philox(seed, keys, queries, tl.zeros_like(keys) + batch_head, tl.zeros_like(keys) + branch)
    return word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def load_rows(pointers, seen, D: tl.constexpr):
    """A (rows, padded head dim) block, zero in rows not ``seen`` and in columns from D on."""
    if pointers.shape[1] == D:
        return tl.load(pointers, mask=seen[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=seen[:, None] & (tl.arange(0, pointers.shape[1]) < D)[None, :], other=0.0)
