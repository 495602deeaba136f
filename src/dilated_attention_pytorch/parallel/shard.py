"""Which rows a rank holds, and which pairs of ranks share a segment: integers only.

Pieces of two ranks are disjoint intervals of a document, so of every branch they share at most one segment: the one
that holds the last row of the earlier piece and the first row of the later one. Whatever else a row attends to lies in
its own piece. So a rank needs from another nothing but that segment's active rows, and what it computes with them is
a full rectangle: with a causal mask the earlier piece's keys are all visible, the later one's none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from ..patterns import DilatedPattern
from ..patterns.plan import count_active
from ..types import Document

Layout = Literal["contiguous", "zigzag"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of one document on one rank: ``rows`` from local row ``row``, the first at ``position``."""

    document: int
    row: int
    rows: int
    position: int

    @property
    def end(self) -> int:
        """The position behind the last row."""
        return self.position + self.rows


@dataclass(frozen=True, slots=True)
class Block:
    """Active rows of one key head that travel together: from local row ``row`` of the source, ``rate`` apart."""

    kv_head: int
    row: int
    rows: int
    rate: int
    start: int
    """Rows of the buffer before it."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Query rows of ``heads`` heads against as many blocks of received keys, every pair attended.

    Head i of them is ``head + i * head_step``; its queries begin at local row ``row + i * row_step`` and lie ``rate``
    apart; its block begins ``start + i * start_step`` rows into the buffer.
    """

    heads: int
    head: int
    head_step: int
    row: int
    row_step: int
    rows: int
    rate: int
    start: int
    start_step: int
    keys: int


@dataclass(frozen=True, slots=True)
class Pairing:
    """What one rank sends to another, and what that one computes with it."""

    blocks: tuple[Block, ...]
    rectangles: tuple[Rectangle, ...]

    @property
    def rows(self) -> int:
        """Rows of one key head in the buffer."""
        return self.blocks[-1].start + self.blocks[-1].rows if self.blocks else 0


def _split(rows: int, parts: int) -> list[tuple[int, int]]:
    """``parts`` ranges of rows, of lengths that differ by one at most, the longer ones first."""
    short, longer = divmod(rows, parts)
    bounds = [i * short + min(i, longer) for i in range(parts + 1)]
    return list(pairwise(bounds))


@lru_cache(maxsize=256)
def ranges(rows: int, world: int, layout: Layout) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The ranges of global rows that each rank holds, in the order in which it holds them.

    "contiguous": one range a rank. "zigzag": the i-th range from the start and the i-th from the end, so that under a
    causal mask every rank has as much to do.

    >>> ranges(10, 2, "contiguous")
    (((0, 5),), ((5, 10),))
    >>> ranges(10, 2, "zigzag")
    (((0, 3), (8, 10)), ((3, 6), (6, 8)))
    """
    if layout == "contiguous":
        return tuple((part,) for part in _split(rows, world))
    parts = _split(rows, 2 * world)
    return tuple((parts[i], parts[2 * world - 1 - i]) for i in range(world))


@lru_cache(maxsize=1024)
def pieces(documents: tuple[Document, ...], held: tuple[tuple[int, int], ...]) -> tuple[Piece, ...]:
    """The pieces of documents in the ranges of rows that one rank holds."""
    found, row = [], 0
    for start, stop in held:
        for index, document in enumerate(documents):
            low, high = max(start, document.row), min(stop, document.row + document.rows)
            if low < high:
                found.append(Piece(index, row + low - start, high - low, document.position + low - document.row))
        row += stop - start
    return tuple(found)


class _Item(NamedTuple):
    head: int
    row: int
    start: int
    rows: int
    keys: int


@lru_cache(maxsize=4096)
def pairing(
    pattern: DilatedPattern,
    heads: int,
    kv_heads: int,
    target: tuple[Piece, ...],
    source: tuple[Piece, ...],
    *,
    is_causal: bool,
) -> Pairing:
    """What the rank with the pieces ``target`` needs of the rank with the pieces ``source``, possibly itself."""
    blocks: list[Block] = []
    rectangles: list[Rectangle] = []
    placed: dict[tuple[int, int, int, int], Block] = {}
    for own in target:
        for other in source:
            if own.document != other.document or own.position == other.position:
                continue
            if is_causal and other.position > own.position:
                continue
            first, second = (own, other) if own.position < other.position else (other, own)
            for branch, w in enumerate(pattern.segment_lengths):
                segment = (first.end - 1) // w
                if segment == second.position // w:
                    rectangles += _rectangles(pattern, heads, kv_heads, own, other, segment * w, branch, blocks, placed)
    return Pairing(tuple(blocks), tuple(rectangles))


def _rectangles(
    pattern: DilatedPattern,
    heads: int,
    kv_heads: int,
    own: Piece,
    other: Piece,
    start: int,
    branch: int,
    blocks: list[Block],
    placed: dict[tuple[int, int, int, int], Block],
) -> Iterator[Rectangle]:
    """Rectangles of one segment; the blocks that they need join ``blocks``, each once for all pieces of the target."""
    w, r = pattern.segment_lengths[branch], pattern.dilation_rates[branch]
    items: list[_Item] = []
    for head in range(heads):
        residue = (start + pattern.head_offset(head, r, heads)) % r
        row, rows = _active(own, start, w, residue, r)
        key_row, keys = _active(other, start, w, residue, r)
        if not rows or not keys:
            continue
        kv_head = head * kv_heads // heads
        block = placed.get((branch, kv_head, key_row, keys))
        if block is None:
            before = blocks[-1].start + blocks[-1].rows if blocks else 0
            block = placed[branch, kv_head, key_row, keys] = Block(kv_head, key_row, keys, r, before)
            blocks.append(block)
        items.append(_Item(head, row, block.start, rows, keys))
    # All heads of one offset share their rows; one head of every offset begins one row after the other: both are runs.
    seen: dict[int, int] = {}
    rank: dict[int, int] = {}
    for item in items:
        rank[item.head] = seen.get(item.row, 0)
        seen[item.row] = rank[item.head] + 1
    orders = (items, sorted(items, key=lambda item: (rank[item.head], item.head)))
    yield from min((list(_runs(order, r)) for order in orders), key=len)


def _runs(items: list[_Item], rate: int) -> Iterator[Rectangle]:
    """Cut items, in the order given, into runs whose heads, rows and blocks advance by constant steps."""
    while items:
        first, count, step = items[0], 1, (0, 0, 0)
        for item in items[1:]:
            last = [a + (count - 1) * b for a, b in zip(first[:3], step, strict=True)]
            delta = (item.head - last[0], item.row - last[1], item.start - last[2])
            if item[3:] != first[3:] or min(delta) < 0 or (count > 1 and delta != step):
                break
            count, step = count + 1, delta
        yield Rectangle(
            count, first.head, step[0], first.row, step[1], first.rows, rate, first.start, step[2], first.keys
        )
        items = items[count:]


def _active(piece: Piece, start: int, w: int, residue: int, r: int) -> tuple[int, int]:
    """(first local row, number) of the active rows of a piece in the segment from ``start``."""
    low, high = max(start, piece.position), min(start + w, piece.end)
    return piece.row + low + (residue - low) % r - piece.position, count_active(low, high, residue, r)
