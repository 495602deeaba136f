"""Which rows a rank holds, and which pairs of ranks share a segment: integers only.

Pieces of two ranks are disjoint intervals of a document, so of every branch they share at most one segment: the one
that holds the last row of the earlier piece and the first row of the later one. Whatever else a row attends to lies in
its own piece. So a rank needs from another nothing but that segment's active rows, and what it computes with them is
a full rectangle: with a causal mask the earlier piece's keys are all visible, the later one's none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    batch: int
    batches: int
    row: int
    rows: int
    position: int
    whole_row: int
    """The first row's place in the whole sequence."""

    @property
    def end(self) -> int:
        """The position behind the last row."""
        return self.position + self.rows


@dataclass(frozen=True, slots=True)
class Block:
    """Active rows of one key head that travel together: from local row ``row`` of the source, ``rate`` apart."""

    batch: int
    batches: int
    kv_head: int
    row: int
    rows: int
    rate: int
    start: int
    """Rows of the buffer before it, those of every batch entry counted."""

    @property
    def end(self) -> int:
        """Rows of the buffer up to its end."""
        return self.start + self.batches * self.rows


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Query rows of ``heads`` heads against as many blocks of received keys, every pair attended.

    Head i of them is ``head + i * head_step``; its queries begin at local row ``row + i * row_step`` and lie ``rate``
    apart; its block begins ``start + i * start_step`` rows into the buffer.
    """

    batch: int
    batches: int
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
    branch: int
    whole_row: int
    """The first head's first query row in the whole sequence."""
    whole_key: int
    """The first head's first key row in the whole sequence."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """What one rank sends to another, and what that one computes with it."""

    blocks: tuple[Block, ...]
    rectangles: tuple[Rectangle, ...]

    @property
    def rows(self) -> int:
        """Rows in the buffer: those of one key head and one batch entry count one each."""
        return self.blocks[-1].end if self.blocks else 0


def split(rows: int, parts: int) -> list[tuple[int, int]]:
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
        return tuple((part,) for part in split(rows, world))
    parts = split(rows, 2 * world)
    return tuple((parts[i], parts[2 * world - 1 - i]) for i in range(world))


@lru_cache(maxsize=256)
def nested_ranges(rows: int, ring: int, heads: int, layout: Layout) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The same for a mesh of ``ring`` x ``heads`` ranks, one row of the mesh after the other.

    The ranks of a row of the mesh share, in order, what one rank of a ring of ``ring`` would hold.

    >>> nested_ranges(10, 2, 2, "zigzag")
    (((0, 3),), ((8, 10),), ((3, 6),), ((6, 8),))
    """
    found = []
    for held in ranges(rows, ring, layout):
        for low, high in split(sum(stop - start for start, stop in held), heads):
            part, before = [], 0
            for start, stop in held:
                cut = start + max(0, low - before), min(stop, start + high - before)
                before += stop - start
                if cut[0] < cut[1]:
                    part.append(cut)
            found.append(tuple(part))
    return tuple(found)


def joined(parts: Iterable[tuple[tuple[int, int], ...]]) -> tuple[tuple[int, int], ...]:
    """All ranges of ``parts`` in ascending order, adjacent ones as one.

    >>> joined([((0, 3), (8, 10)), ((3, 6), (6, 8))])
    ((0, 10),)
    """
    found: list[tuple[int, int]] = []
    for start, stop in sorted(held for part in parts for held in part if held[0] < held[1]):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


@lru_cache(maxsize=1024)
def pieces(documents: tuple[Document, ...], held: tuple[tuple[int, int], ...]) -> tuple[Piece, ...]:
    """The pieces of documents in the ranges of rows that one rank holds."""
    found, row = [], 0
    for start, stop in held:
        for index, document in enumerate(documents):
            low, high = max(start, document.row), min(stop, document.row + document.rows)
            if low < high:
                place, position = row + low - start, document.position + low - document.row
                found.append(Piece(index, document.batch, document.batches, place, high - low, position, low))
        row += stop - start
    return tuple(found)


class _Item(NamedTuple):
    head: int
    row: int
    start: int
    rows: int
    keys: int
    key_row: int


@lru_cache(maxsize=4096)
def pairing(
    pattern: DilatedPattern,
    heads: int,
    kv_heads: int,
    target: tuple[Piece, ...],
    source: tuple[Piece, ...],
    *,
    is_causal: bool,
    apart: bool = False,
) -> Pairing:
    """What the rank with the pieces ``target`` needs of the rank with the pieces ``source``, possibly itself.

    ``apart`` gives every head a rectangle of its own, so that the place of all its rows is known.
    """
    blocks: list[Block] = []
    rectangles: list[Rectangle] = []
    placed: dict[tuple[int, ...], Block] = {}
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
                    items = _items(pattern, heads, kv_heads, own, other, segment * w, branch, blocks, placed)
                    rectangles += _rectangles(own, other, items, branch, pattern.dilation_rates[branch], apart)
    return Pairing(tuple(blocks), tuple(rectangles))


def _items(
    pattern: DilatedPattern,
    heads: int,
    kv_heads: int,
    own: Piece,
    other: Piece,
    start: int,
    branch: int,
    blocks: list[Block],
    placed: dict[tuple[int, ...], Block],
) -> list[_Item]:
    """Heads with pairs in one segment; the blocks they need join ``blocks``, each once for all pieces of the target."""
    w, r = pattern.segment_lengths[branch], pattern.dilation_rates[branch]
    items: list[_Item] = []
    for head in range(heads):
        residue = (start + pattern.head_offset(head, r, heads)) % r
        row, rows = active_rows(own, start, w, residue, r)
        key_row, keys = active_rows(other, start, w, residue, r)
        if not rows or not keys:
            continue
        kv_head = head * kv_heads // heads
        name = (branch, other.batch, kv_head, key_row, keys)
        if name not in placed:
            before = blocks[-1].end if blocks else 0
            placed[name] = Block(other.batch, other.batches, kv_head, key_row, keys, r, before)
            blocks.append(placed[name])
        items.append(_Item(head, row, placed[name].start, rows, keys, key_row))
    return items


def _rectangles(
    own: Piece, other: Piece, items: list[_Item], branch: int, rate: int, apart: bool
) -> Iterator[Rectangle]:
    """As few rectangles as hold the items of one segment, or one for each."""
    # All heads of one offset share their rows; one head of every offset begins one row after the other: both are runs.
    seen: dict[int, int] = {}
    rank: dict[int, int] = {}
    for item in items:
        rank[item.head] = seen.get(item.row, 0)
        seen[item.row] = rank[item.head] + 1
    orders = (items, sorted(items, key=lambda item: (rank[item.head], item.head)))
    alone = [(item, 1, (0, 0, 0)) for item in items]
    for first, count, step in alone if apart else min((list(_runs(order)) for order in orders), key=len):
        yield Rectangle(
            own.batch, own.batches, count, first.head, step[0], first.row, step[1], first.rows, rate, first.start,
            step[2], first.keys, branch, first.row - own.row + own.whole_row,
            first.key_row - other.row + other.whole_row,
        )  # fmt: skip


def _runs(items: list[_Item]) -> Iterator[tuple[_Item, int, tuple[int, int, int]]]:
    """Cut items, in the order given, into runs whose heads, rows and blocks advance by constant steps."""
    while items:
        first, count, step = items[0], 1, (0, 0, 0)
        for item in items[1:]:
            last = [a + (count - 1) * b for a, b in zip(first[:3], step, strict=True)]
            delta = (item.head - last[0], item.row - last[1], item.start - last[2])
            same = (item.rows, item.keys) == (first.rows, first.keys)
            if not same or min(delta) < 0 or (count > 1 and delta != step):
                break
            count, step = count + 1, delta
        yield first, count, step
        items = items[count:]


def active_rows(piece: Piece, start: int, w: int, residue: int, r: int) -> tuple[int, int]:
    """(first local row, number) of the active rows of a piece in the segment from ``start``."""
    low, high = max(start, piece.position), min(start + w, piece.end)
    return piece.row + low + (residue - low) % r - piece.position, count_active(low, high, residue, r)
