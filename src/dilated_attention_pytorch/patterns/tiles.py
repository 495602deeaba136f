"""Where a fused kernel's tiles lie: integers in, one small table of integers out.

All rows of one residue class (modulo the class stride) inside one segment of the shortest branch take part in the
same branches, but where a longer segment ends between them. So one tile of such rows meets the keys of all its
branches in one kernel, and no partial result is ever written.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..types import Document, Shape
from .dilated import DilatedPattern

CELL_FIELDS = ("batch", "row", "position", "rows", "other_row0", "begin", "end", "length")
"""Columns of the cell table, see `cells`."""


_LARGEST_STRIDE = 1024
"""A larger stride would separate rows of rates that nobody uses, and takes long to look for."""


def _divisors(number: int, largest: int) -> list[int]:
    return [d for d in range(1, min(number, largest, _LARGEST_STRIDE) + 1) if number % d == 0]


@lru_cache(maxsize=256)
def class_stride(pattern: DilatedPattern, block_rows: int, longest: int) -> int:
    """The stride of residue classes that costs the fewest blocks, for documents of up to ``longest`` rows.

    A larger stride separates rows with different branches; a smaller one fills the ``block_rows`` rows of a tile
    where the shortest segment has fewer rows in a class.

    >>> class_stride(DilatedPattern((2048, 4096, 8192), (1, 2, 4)), 128, 65536)
    4
    >>> class_stride(DilatedPattern((256, 4096, 8192), (1, 4, 16)), 128, 65536)
    2
    """
    longest = max(1, longest)
    shortest = min(longest, *pattern.segment_lengths)

    def cost(stride: int) -> float:
        tiles = stride * math.ceil(math.ceil(shortest / stride) / block_rows)
        keys = sum(
            min(branch.segment_length, longest) / branch.dilation_rate / math.gcd(branch.dilation_rate, stride)
            for branch in pattern.branches
        )
        return tiles * keys

    return min(_divisors(math.lcm(*pattern.dilation_rates), shortest), key=lambda stride: (cost(stride), stride))


@lru_cache(maxsize=64)
def cells(
    pattern: DilatedPattern, shape: Shape, documents: tuple[Document, ...], span: int, side: Literal["query", "key"]
) -> NDArray[np.int32]:
    """Runs of at most ``span`` rows, each inside one segment of the shortest branch of one document.

    ``side`` says whose rows they are; the other side's rows are what a tile meets. Columns (`CELL_FIELDS`): batch
    entry, first row, its position in the document, number of rows, the row of position 0 on the other side (may be
    negative), first and last + 1 position that exist on the other side, the document's length for zero padding.
    """
    shortest = min(pattern.segment_lengths)
    shift = shape.query_rows - shape.key_rows  # key row -> query row
    tables: list[NDArray[np.int64]] = []
    for document in documents:
        key_row0 = document.row - document.position
        query_row0 = key_row0 + shift
        end = document.position + document.rows
        first_query = max(document.position, -query_row0)
        if first_query >= end:
            continue
        begin, own_row0, other_row0, other_begin = (
            (first_query, query_row0, key_row0, document.position)
            if side == "query"
            else (document.position, key_row0, query_row0, first_query)
        )
        segments = np.arange(begin // shortest, -(-end // shortest), dtype=np.int64) * shortest
        # Where all rows lie in one segment, however long, only their part of it is cut.
        low, high = (begin % shortest // span * span, end - segments[0]) if len(segments) == 1 else (0, shortest)
        starts = (segments[:, None] + np.arange(low, min(shortest, high), span)).ravel()
        stops = np.minimum(starts + span, np.minimum(starts // shortest * shortest + shortest, end))
        starts = np.maximum(starts, begin)
        starts, stops = starts[starts < stops], stops[starts < stops]
        one = np.empty((len(starts), len(CELL_FIELDS)), dtype=np.int64)
        one[:] = (0, own_row0, 0, 0, other_row0, other_begin, end, document.length)
        one[:, 1] += starts
        one[:, 2] = starts
        one[:, 3] = stops - starts
        whole = np.tile(one, (document.batches, 1))
        whole[:, 0] = np.repeat(np.arange(document.batch, document.batch + document.batches), len(one))
        tables.append(whole)
    if not tables:
        return np.empty((0, len(CELL_FIELDS)), dtype=np.int32)
    table = np.concatenate(tables)
    if len(table) and int(np.abs(table).max()) >= 2**31:
        raise ValueError(f"positions reach {int(np.abs(table).max())}; fused kernels count rows in 32 bits")
    return table.astype(np.int32)
