"""Lists of key blocks: what a block-sparse pattern becomes on one shape, as compressed rows of integers.

Positions count from the start of a document and block j holds the positions [j * b, (j + 1) * b). Rows of the tensors
need not lie at multiples of b (packed documents, left padding, evicted keys), so a *tile* is the rows of one block of
one document of one batch entry: a query tile those of the query, a key tile those of the key. A plan lists for every
query tile the key tiles it meets. Nothing of size N x N exists, nor of (N / b) x (N / b) unless the lists are dense.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..types import Document, Shape
from .dilated import DilatedPattern
from .tiles import cells

BLOCK_SIZES = (16, 32, 64, 128)
MOST_ENTRIES = 1 << 30
"""More listed blocks than this take over 8 GB while they are sorted; a pattern that large is dense."""


class QueryBlocks(NamedTuple):
    """The query tiles of a call, as a pattern sees them."""

    tiles: Tensor
    """(T, 4) int32: batch entry, first row of the query, its position in the document, number of rows."""
    block: Tensor
    """(T,) int64: the block of its document that a tile lies in."""
    total: Tensor
    """(T,) int64: blocks of that document, up to its last key."""
    heads: int
    is_causal: bool

    @property
    def limit(self) -> Tensor:
        """(T,) int64: how many blocks, from the first, a tile may look at."""
        return self.block + 1 if self.is_causal else self.total


class Run(NamedTuple):
    """Key blocks first, first + step, ... of every query tile: each (T,) or (H, T), or an int that all share."""

    first: Tensor
    step: int
    number: Tensor | int


class Entries(NamedTuple):
    """Listed blocks: row ``row[e]`` (head * T + tile; head 0 where all share the lists) sees block ``column[e]``."""

    row: Tensor
    column: Tensor
    whole: Tensor | None = None
    """(entries,) bool: whether every row of the tile sees the block; None: everywhere."""
    bits: Tensor | None = None
    """(entries, words) int32: which rows of the tile see it, see `BlockPlan.row_bits`."""
    dilated: tuple[DilatedPattern, ...] = ()
    """Patterns whose pairs count where a block is not seen whole."""


class BlockPattern(Protocol):
    """What a block-sparse pattern is to everything that computes it."""

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        ...

    @property
    def per_head(self) -> bool:
        """Whether heads have lists of their own."""
        ...

    @property
    def code(self) -> str:
        """Text from which `codes.decode` makes the pattern."""
        ...

    def entries(self, query: QueryBlocks) -> Entries:
        """Blocks that every tile sees, in any order, repeats and blocks that do not exist allowed."""
        ...


def spread(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the item, value) for the values first, first + 1, ..., of which item i has ``count[i]``."""
    item = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    before = count.cumsum(0) - count
    value = torch.arange(len(item), device=count.device)
    value += (first - before)[item]
    return item, value


def entries_of_runs(query: QueryBlocks, runs: Iterable[Run]) -> Entries:
    """The blocks of arithmetic progressions that exist, tile by tile in the order of the runs."""
    found, steps = [], []
    for first, step, number in runs:
        length = torch.as_tensor(number, device=query.block.device)
        first, length, limit = torch.broadcast_tensors(first, length, query.limit)
        skipped = (-first).clamp(min=0).add(step - 1).div(step, rounding_mode="floor")
        inside = (limit - first + step - 1).div(step, rounding_mode="floor")
        last = torch.minimum(length, inside)
        found.append((first.reshape(-1), skipped.reshape(-1), (last - skipped).clamp(min=0).reshape(-1)))
        steps.append(step)
    first, skipped, count = (torch.stack(columns, 1).reshape(-1) for columns in zip(*found, strict=True))
    # In place where it can be: of a million rows every copy counts.
    row, column = spread(skipped, count)
    if len(set(steps)) == 1:
        column *= steps[0]
    else:
        column *= torch.tensor(steps, device=row.device)[row % len(steps)]
    column += first[row]
    row //= len(steps)
    return Entries(row, column)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The compressed rows of a pattern on one shape; tensors on the device that computes it.

    Tile tables have the columns batch entry, first row, its position in the document, number of rows.
    """

    block_size: int
    query_tiles: Tensor
    """(T, 4) int32; rows count in the query."""
    key_tiles: Tensor
    """(S, 4) int32; rows count in the key."""
    row_pointer: Tensor
    """(P, T + 1) int32: query tile t of head h has the entries row_pointer[h, t] to row_pointer[h, t + 1]; P is H, or
    1 where all heads share the lists."""
    columns: Tensor
    """(entries,) int32: key tiles, ascending in each row."""
    whole: Tensor | None = None
    """(entries,) bool: whether every row of the query tile sees the block (but for causality). None: all do."""
    row_bits: Tensor | None = None
    """(entries, ceil(b / 32)) int32: bit i of an entry that is not whole says that row i of the query tile sees it."""
    dilated: tuple[DilatedPattern, ...] = ()
    """Patterns whose pairs count in entries that are not whole."""

    @property
    def per_head(self) -> bool:
        """Whether heads have lists of their own."""
        return self.row_pointer.shape[0] > 1

    @cached_property
    def counts(self) -> Tensor:
        """(P, T) int32: entries of every row."""
        return self.row_pointer.diff(dim=1)

    @cached_property
    def entry_rows(self) -> Tensor:
        """(entries,) int64: the row (head * T + tile) of every entry."""
        return torch.repeat_interleave(
            torch.arange(self.counts.numel(), device=self.columns.device), self.counts.reshape(-1)
        )

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lists by key tile: row pointer (P, S + 1), query tiles, and the entry that each is here; all int32."""
        tiles, keys = self.query_tiles.shape[0], self.key_tiles.shape[0]
        head, tile = self.entry_rows // tiles, self.entry_rows % tiles
        by_key = head * keys + self.columns
        order = torch.argsort(by_key, stable=True)
        pointer = _pointer(by_key, self.row_pointer.shape[0], keys)
        return pointer, tile[order].int(), order.int()

    @cached_property
    def pairs(self) -> int:
        """(query, key) pairs of the listed tiles, over the heads that lists are kept for; causality left out."""
        tile = self.entry_rows % self.query_tiles.shape[0]
        return int((self.query_tiles[tile, 3].long() * self.key_tiles[self.columns.long(), 3]).sum())


def _pointer(row: Tensor, heads: int, rows: int) -> Tensor:
    """(heads, rows + 1) int32 offsets of sorted ``row`` (head * rows + row)."""
    edges = torch.bincount(row, minlength=heads * rows).cumsum(0)
    edges = torch.cat([edges.new_zeros(1), edges])
    index = torch.arange(heads, device=row.device)[:, None] * rows + torch.arange(rows + 1, device=row.device)
    return edges[index].int()


class Tiles(NamedTuple):
    """Tile tables and what the lists of each query tile refer to, all on one device."""

    keys: Tensor
    """(S, 4) int32: batch entry, first row, its position, number of rows of every key tile."""
    queries: QueryBlocks
    first_block: Tensor
    """(T,) int64: the first block with a key in a query tile's document."""
    first_tile: Tensor
    """(T,) int64: the key tile of that block."""


@lru_cache(maxsize=32)
def tiles_of(
    shape: Shape, documents: tuple[Document, ...], block_size: int, *, is_causal: bool, device: torch.device | str
) -> Tiles:
    """The tiles of a call; equal calls share them."""
    lone = DilatedPattern((block_size,), (1,))
    query, key = (cells(lone, shape, documents, block_size, side) for side in ("query", "key"))
    wide = query.astype(np.int64)
    begin, end = wide[:, 5], wide[:, 6]
    place = key[:, 0].astype(np.int64) * shape.key_rows + key[:, 1]
    first_tile = np.searchsorted(place, wide[:, 0] * shape.key_rows + wide[:, 4] + begin)

    def move(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    index, count = move(wide[:, 2] // block_size), move(-(-end // block_size))
    queries = QueryBlocks(move(query[:, :4]), index, count, shape.heads, is_causal)
    return Tiles(move(key[:, :4]), queries, move(begin // block_size), move(first_tile))


def plan_of(tiles: Tiles, entries: Entries, *, heads: int, block_size: int) -> BlockPlan:
    """The plan that lists every entry once, those without keys left out."""
    query, (row, column, whole, bits, dilated) = tiles.queries, entries
    if len(row) > MOST_ENTRIES:
        raise ValueError(f"the pattern lists {len(row)} blocks; at most {MOST_ENTRIES} fit, use larger blocks")
    count, keys = len(query.block), max(len(tiles.keys), 1)
    tile = row if heads == 1 else row % max(count, 1)
    exists = column < query.limit[tile]
    if bool(tiles.first_block.any()):  # older keys were dropped
        exists &= column >= tiles.first_block[tile]
    flat = row * keys
    flat += column
    shift = tiles.first_tile - tiles.first_block
    if bool(shift.any()):  # documents, or dropped keys: blocks are no tiles
        flat += shift[tile]
    if not bool(exists.all()):
        flat = flat[exists]
        whole, bits = (None if given is None else given[exists] for given in (whole, bits))
    place = None
    if whole is None:
        if not bool((flat[1:] > flat[:-1]).all()):
            flat = torch.unique(flat)
    else:
        flat, place = torch.unique(flat, return_inverse=True)
    starts = torch.arange(heads * count + 1, device=flat.device) * keys
    edges = torch.searchsorted(flat, starts)
    index = torch.arange(heads, device=flat.device)[:, None] * count + torch.arange(count + 1, device=flat.device)
    plan = BlockPlan(block_size, query.tiles, tiles.keys, edges[index].int(), (flat % keys).int())
    if whole is None or place is None:
        return plan
    merged = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    merged[place[whole]] = True
    row_bits = None
    if bits is not None:  # a block is selected at most once, so a sum of bits is their union
        row_bits = bits.new_zeros(len(flat), bits.shape[1]).index_add_(0, place, bits)
    return replace(plan, whole=merged, row_bits=row_bits, dilated=dilated)


def block_plan(
    pattern: BlockPattern, shape: Shape, documents: tuple[Document, ...], *, is_causal: bool, device: str
) -> BlockPlan:
    """The lists of ``pattern`` on ``documents``."""
    tiles = tiles_of(shape, documents, pattern.block_size, is_causal=is_causal, device=device)
    heads = shape.heads if pattern.per_head else 1
    return plan_of(tiles, pattern.entries(tiles.queries), heads=heads, block_size=pattern.block_size)
