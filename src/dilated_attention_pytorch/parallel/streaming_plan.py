"""How a sequence is cut for one device: chunks of rows, and tiles of the keys that a chunk needs from outside it.

A chunk is to streaming what a shard is to context parallel: its own pairs are one call of a backend on the chunk
alone. What is left of a branch lies in the segments that the chunk's two edges cut: before the first row, and, unless
causal, behind the last. There every active query row of the chunk meets every active key, so tiles are rectangles,
without a mask, and only active rows are fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import NamedTuple

from torch import Tensor

from ..patterns import DilatedPattern
from ..patterns.plan import count_active
from ..types import Document, Shape


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``row`` to ``row + rows`` of the key, and the query rows that stand there, in ``batches`` batch rows."""

    batch: int
    batches: int
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Block:
    """Active rows of one key head: from key row ``row``, ``rate`` apart; they begin ``start`` rows into the tile."""

    kv_head: int
    row: int
    rows: int
    rate: int
    start: int
    shown: Tensor | None = None
    """Which of the active rows are there, where a mask hides some: (rows,) int64."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Query rows of ``heads`` heads against as many blocks, every pair attended.

    Head i of them is ``head + i * head_step``; its queries begin at row ``row + i * row_step`` of the chunk and lie
    ``rate`` apart; its block begins ``start + i * start_step`` rows into the tile.
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
class Tile:
    """Keys from outside the chunk with this index, and what the chunk does with them."""

    chunk: int
    batch: int
    branch: int
    blocks: tuple[Block, ...]
    rectangles: tuple[Rectangle, ...]
    segment: tuple[int, int] = (0, 0)
    """First key row of the segment, and the one behind its last."""

    @property
    def rows(self) -> int:
        """Rows of one key head each."""
        return self.blocks[-1].start + self.blocks[-1].rows if self.blocks else 0


def documents_of(documents: Iterable[Document], batch: int) -> tuple[Document, ...]:
    """The documents in one batch row."""
    return tuple(d for d in documents if d.batch <= batch < d.batch + d.batches)


def cut(pattern: DilatedPattern, shape: Shape, documents: tuple[Document, ...], rows: int) -> tuple[Chunk, ...]:
    """Chunks of at most ``rows`` rows that hold every query row: whole batch rows where they fit, else parts of one.

    A part ends where a document ends or where the longest segment that fits ends, unless that halves it.
    """
    if rows >= shape.key_rows == shape.query_rows:
        step = min(rows // shape.key_rows, shape.batch)
        return tuple(Chunk(b, min(step, shape.batch - b), 0, shape.key_rows) for b in range(0, shape.batch, step))
    found, known = [], dict[tuple[Document, ...], list[tuple[int, int]]]()
    lengths = sorted({w for w in pattern.segment_lengths if w <= rows}, reverse=True)
    for batch in range(shape.batch):
        alike = tuple(replace(d, batch=0, batches=1) for d in documents_of(documents, batch))
        if alike not in known:
            known[alike] = list(_ranges(alike, lengths, shape.key_rows - shape.query_rows, shape.key_rows, rows))
        found += [Chunk(batch, 1, start, stop - start) for start, stop in known[alike]]
    return tuple(found)


def _ranges(
    documents: tuple[Document, ...], lengths: Sequence[int], start: int, end: int, rows: int
) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = _end(documents, lengths, start, rows) if start + rows < end else end
        yield start, stop
        start = stop


def _end(documents: tuple[Document, ...], lengths: Sequence[int], start: int, rows: int) -> int:
    stop, least = start + rows, start + (rows + 1) // 2
    for d in documents:
        if d.row < stop < d.row + d.rows:
            position = d.position + stop - d.row
            ends = [max(d.row, stop - position % w) for w in lengths]
            return next((row for row in [*ends, d.row] if row >= least), stop)
    return stop


def own_documents(
    documents: tuple[Document, ...], chunk: Chunk, pattern: DilatedPattern, *, zeros: bool
) -> tuple[Document, ...]:
    """The documents of a chunk, as a call on the chunk alone sees them."""
    found, period = [], lcm(*pattern.segment_lengths)
    for d in documents:
        batch, last = max(d.batch, chunk.batch), min(d.batch + d.batches, chunk.batch + chunk.batches)
        row, end = max(d.row, chunk.row), min(d.row + d.rows, chunk.row + chunk.rows)
        if batch < last and row < end:
            position = d.position + row - d.row
            # Chunks that lie alike in their segments are equal problems, planned once. Zero keys need the true place.
            shift = 0 if zeros else position // period * period
            place = batch - chunk.batch, last - batch, row - chunk.row
            found.append(Document(*place, end - row, position - shift, d.length - shift))
    return tuple(found)


def blocks_of_branch(pattern: DilatedPattern, branch: int, shape: Shape) -> int:
    """How many pairs of a key head and an offset the query heads of a branch make."""
    rate = pattern.dilation_rates[branch]
    return len({
        (h * shape.kv_heads // shape.heads, pattern.head_offset(h, rate, shape.heads)) for h in range(shape.heads)
    })  # fmt: skip


def tiles(
    index: int,
    chunk: Chunk,
    pattern: DilatedPattern,
    shape: Shape,
    documents: tuple[Document, ...],
    rows: int,
    *,
    is_causal: bool,
) -> Iterator[Tile]:
    """The tiles of a chunk, of at most ``rows`` rows each; every key and head occurs once in each branch."""
    if chunk.batches > 1 or (chunk.rows == shape.key_rows == shape.query_rows):
        return
    for d in documents_of(documents, chunk.batch):
        row, end = max(d.row, chunk.row), min(d.row + d.rows, chunk.row + chunk.rows)
        if row >= end:
            continue
        low, high = d.position + row - d.row, d.position + end - d.row
        for branch, (w, r) in enumerate(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)):
            first, last = low // w * w, (high - 1) // w * w
            spans = [(first, max(first, d.position), low)]
            if not is_causal:
                spans.append((last, high, min(last + w, d.position + d.rows)))
            span = r * max(1, rows // blocks_of_branch(pattern, branch, shape))
            for segment, begin, stop in spans:
                queries = max(low, segment), min(high, segment + w)
                for a in range(begin, stop, span):
                    keys = a, min(stop, a + span)
                    found = _tile(pattern, shape, segment, r, queries, keys)
                    if found.rectangles:
                        whole = max(segment, d.position), min(segment + w, d.position + d.rows)
                        yield _moved(found, index, branch, chunk, d.row - d.position, whole)


def _moved(tile: Tile, index: int, branch: int, chunk: Chunk, origin: int, segment: tuple[int, int]) -> Tile:
    """From positions to rows: of the chunk for queries, of the whole for keys."""
    blocks = tuple(replace(block, row=block.row + origin) for block in tile.blocks)
    rectangles = tuple(replace(r, row=r.row + origin - chunk.row) for r in tile.rectangles)
    return Tile(index, chunk.batch, branch, blocks, rectangles, (segment[0] + origin, segment[1] + origin))


class _Item(NamedTuple):
    head: int
    row: int
    start: int
    rows: int
    keys: int


def _tile(
    pattern: DilatedPattern, shape: Shape, segment: int, rate: int, queries: tuple[int, int], keys: tuple[int, int]
) -> Tile:
    """Active queries of one range of positions against active keys of another, in one segment."""
    blocks: dict[tuple[int, int], Block] = {}
    items: list[_Item] = []
    start = 0
    for head in range(shape.heads):
        residue = (segment + pattern.head_offset(head, rate, shape.heads)) % rate
        rows, count = count_active(*queries, residue, rate), count_active(*keys, residue, rate)
        if not rows or not count:
            continue
        kv_head = head * shape.kv_heads // shape.heads
        if (kv_head, residue) not in blocks:
            first = keys[0] + (residue - keys[0]) % rate
            blocks[kv_head, residue] = Block(kv_head, first, count, rate, start)
            start += count
        row = queries[0] + (residue - queries[0]) % rate
        items.append(_Item(head, row, blocks[kv_head, residue].start, rows, count))
    # All heads of one offset share their rows; one head of every offset begins one row after the other: both are runs.
    seen: dict[int, int] = {}
    rank: dict[int, int] = {}
    for item in items:
        rank[item.head] = seen.get(item.row, 0)
        seen[item.row] = rank[item.head] + 1
    orders = (items, sorted(items, key=lambda item: (rank[item.head], item.head)))
    runs = min((list(_runs(order, rate)) for order in orders), key=len)
    return Tile(0, 0, 0, tuple(blocks.values()), tuple(runs))


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


def without_hidden(tile: Tile, hidden: Tensor) -> Tile:
    """The tile without the keys that ``hidden`` (N,) bool marks; blocks then differ in length, so heads part."""
    kept: dict[int, Block] = {}
    start, changed = 0, False
    for block in tile.blocks:
        stop = block.row + block.rate * (block.rows - 1) + 1
        shown = (~hidden[block.row : stop : block.rate]).nonzero()[:, 0]
        changed |= len(shown) < block.rows
        kept[block.start] = replace(block, rows=len(shown), start=start, shown=shown)
        start += len(shown)
    if not changed:
        return tile
    found = []
    for r in tile.rectangles:
        alone = [r] if r.start_step == 0 else list(split(r, r.rows, heads=1))
        found += [replace(part, start=kept[part.start].start, keys=kept[part.start].rows) for part in alone]
    blocks = tuple(block for block in kept.values() if block.rows)
    return replace(tile, blocks=blocks, rectangles=tuple(r for r in found if r.keys))


def split(r: Rectangle, rows: int, *, heads: int | None = None) -> Iterator[Rectangle]:
    """Rectangles of at most ``rows`` (query row, head) pairs, but one, and at most ``heads`` heads."""
    heads = max(1, min(heads or r.heads, r.heads, rows // r.rows))
    most = max(1, min(r.rows, rows // heads))
    for i in range(0, r.heads, heads):
        for j in range(0, r.rows, most):
            yield replace(
                r,
                heads=min(heads, r.heads - i),
                head=r.head + i * r.head_step,
                row=r.row + i * r.row_step + j * r.rate,
                rows=min(most, r.rows - j),
                start=r.start + i * r.start_step,
            )


def query_rows(tensor: Tensor, r: Rectangle) -> Tensor:
    """The query rows of a rectangle, of a chunk's tensor (1, n, H, D), as (1, heads, rows, D)."""
    _, sn, sh, sd = tensor.stride()
    return tensor.as_strided(
        (1, r.heads, r.rows, tensor.shape[3]),
        (0, r.row_step * sn + r.head_step * sh, r.rate * sn, sd),
        tensor.storage_offset() + r.row * sn + r.head * sh,
    )


def key_rows(tile: Tensor, r: Rectangle) -> Tensor:
    """The blocks of a rectangle, of a tile (rows, D), as (1, heads, keys, D)."""
    dim = tile.shape[1]
    return tile.as_strided(
        (1, r.heads, r.keys, dim), (0, r.start_step * dim, dim, 1), tile.storage_offset() + r.start * dim
    )


class BlockRun(NamedTuple):
    """Blocks of as many rows that follow each other in a tile, each ``head_step`` heads and ``row_step`` rows on.

    In their segment they begin as many periods of the rate after its first row. A block with hidden rows is alone.
    """

    first: Block
    blocks: int
    head_step: int
    row_step: int


def block_runs(tile: Tile) -> Iterator[BlockRun]:
    """The blocks of a tile in runs, each of which one strided copy moves."""
    begin, rest = tile.segment[0], list(tile.blocks)
    while rest:
        first, count, step = rest[0], 1, (0, 0)
        for block in rest[1:]:
            delta = (
                block.kv_head - first.kv_head - (count - 1) * step[0],
                block.row - first.row - (count - 1) * step[1],
            )
            alike = (block.rows, block.rate) == (first.rows, first.rate) and block.shown is None is first.shown
            level = (block.row - begin) // block.rate == (first.row - begin) // first.rate
            if not (alike and level) or min(delta) < 0 or (count > 1 and delta != step):
                break
            count, step = count + 1, delta
        yield BlockRun(first, count, *step)
        rest = rest[count:]


def rows_of_run(tensor: Tensor, batch: int, run: BlockRun) -> Tensor:
    """The rows of a run, of a tensor (B, N, G, D), as (blocks, rows, D); of one block, hidden ones too: (rows, D)."""
    first = run.first
    if run.blocks == 1:
        active = first.rows if first.shown is None else int(first.shown[-1]) + 1
        return tensor[batch, first.row : first.row + first.rate * (active - 1) + 1 : first.rate, first.kv_head]
    sb, sn, sh, sd = tensor.stride()
    return tensor.as_strided(
        (run.blocks, first.rows, tensor.shape[3]),
        (run.row_step * sn + run.head_step * sh, first.rate * sn, sd),
        tensor.storage_offset() + batch * sb + first.row * sn + first.kv_head * sh,
    )


def part_of_run(tile: Tensor, run: BlockRun) -> Tensor:
    """The rows of a run in a tile (rows, D), shown ones alone, as `rows_of_run`."""
    first = run.first
    rows = tile[first.start : first.start + run.blocks * first.rows]
    return rows if run.blocks == 1 else rows.view(run.blocks, first.rows, tile.shape[1])
