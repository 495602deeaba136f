"""Where a fused kernel's tiles lie: integers in, one small table of integers out.

All rows of one residue class (modulo the class stride) inside one segment of the shortest branch take part in the
same branches, but where a longer segment ends between them. So one tile of such rows meets the keys of all its
branches in one kernel, and no partial result is ever written.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
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


_MERGE = 256
"""Keys of a row that cost about as much as a later group's tile besides its keys: it reads and writes results again."""
_LAUNCH = 1 << 20
"""Rows times keys that cost about as much as another launch."""


@lru_cache(maxsize=256)
def branch_groups(
    pattern: DilatedPattern, block_rows: int, longest: int, *, is_causal: bool
) -> tuple[tuple[int, ...], ...]:
    """Branches, in the groups that cost the fewest keys if each group has tiles, and a launch, of its own.

    Tiles of few branches lie closer to the diagonal of a causal mask, and where the shortest segment has too few rows
    for a class stride that separates all branches, those of the longer segments do without it.

    >>> branch_groups(DilatedPattern((2048, 4096, 8192), (1, 2, 4)), 128, 65536, is_causal=False)
    ((0, 1, 2),)
    >>> branch_groups(DilatedPattern((1024, 4096, 65536), (1, 2, 16)), 128, 65536, is_causal=False)
    ((0, 1), (2,))
    """
    longest = max(1, longest)
    ranked = sorted(range(len(pattern.branches)), key=lambda i: (pattern.dilation_rates[i], i))

    def cost(group: tuple[int, ...], later: bool) -> float:
        stride = class_stride(part_of(pattern, group), block_rows, longest)
        span = stride * block_rows
        shortest = min(longest, *(pattern.segment_lengths[i] for i in group))
        total = seen = 0.0
        for i in group:
            length, rate = min(pattern.segment_lengths[i], longest), pattern.dilation_rates[i]
            met = float(length)
            if is_causal:
                met = (length + min(span, length)) / 2
            elif length % shortest and length < longest:
                met += span  # a tile that a boundary cuts meets two segments
            common = math.gcd(rate, stride)
            total += met / rate / common
            seen += 1 / common
        fill = stride * block_rows * math.ceil(shortest / span) / shortest
        return fill * (total + later * _MERGE * min(seen, 1.0)) + later * _LAUNCH / longest

    @cache
    def best(begin: int) -> tuple[float, tuple[tuple[int, ...], ...]]:
        if begin == len(ranked):
            return 0.0, ()
        choices = []
        for end in range(begin + 1, len(ranked) + 1):
            group = tuple(sorted(ranked[begin:end]))
            rest, groups = best(end)
            choices.append((cost(group, begin > 0) + rest, (group, *groups)))
        return min(choices)

    return best(0)[1]


def part_of(pattern: DilatedPattern, group: tuple[int, ...]) -> DilatedPattern:
    """The pattern of some branches."""
    lengths, rates = pattern.segment_lengths, pattern.dilation_rates
    return DilatedPattern(tuple(lengths[i] for i in group), tuple(rates[i] for i in group), pattern.head_offsets)


def _counted(
    items: NDArray[np.int64], first: NDArray[np.int64], count: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each item ``count`` times, and beside it ``first``, ``first + 1``, ... of its own."""
    repeated = np.repeat(np.arange(len(items)), count)
    running = np.arange(len(repeated)) - np.repeat(np.cumsum(count) - count, count)
    return items[repeated], first[repeated] + running


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
    fields = [(d.batch, d.batches, d.row - d.position, d.position, d.position + d.rows, d.length) for d in documents]
    batch, batches, key_row0, position, end, length = np.array(fields, dtype=np.int64).reshape(-1, 6).T
    query_row0 = key_row0 + shift
    first_query = np.maximum(position, -query_row0)
    begin, own_row0, other_row0, other_begin = (
        (first_query, query_row0, key_row0, position)
        if side == "query"
        else (position, key_row0, query_row0, first_query)
    )
    # Documents that no query looks at have no cells; the others have segments, and segments spans.
    which = np.flatnonzero(first_query < end)
    low = begin[which] // shortest
    which, segment = _counted(which, low, -(-end[which] // shortest) - low)
    start = np.maximum(segment * shortest, begin[which])
    stop = np.minimum(segment * shortest + shortest, end[which])
    low = (start - segment * shortest) // span
    index, step = _counted(np.arange(len(which)), low, -(-(stop - segment * shortest) // span) - low)
    which, edge = which[index], segment[index] * shortest + step * span
    start, stop = np.maximum(edge, start[index]), np.minimum(edge + span, stop[index])
    columns = (own_row0[which] + start, start, stop - start, other_row0[which], other_begin[which], end[which])
    one = np.stack([batch[which], *columns, length[which]], axis=1)
    # A document in several batch rows has its cells in each of them.
    index, copy = _counted(np.arange(len(which)), np.zeros_like(which), batches[which])
    table = one[index]
    table[:, 0] += copy
    table = table[np.lexsort((table[:, 1], table[:, 0]))]  # ascending by (batch, row)
    if len(table) and int(np.abs(table).max()) >= 2**31:
        raise ValueError(f"positions reach {int(np.abs(table).max())}; fused kernels count rows in 32 bits")
    return table.astype(np.int32)
