"""Blocks of a sharded sequence: which rank holds which rows of them, and which of them a rank's query blocks list.

A block whose rows lie on several ranks has a *fragment* on each. A rank lists the key blocks of its query fragments as
one device does; what it needs of another rank is that one's fragments of the listed blocks. Two fragments of one block
are disjoint intervals, so a causal mask shows all of the earlier one to the later one, and nothing the other way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..patterns.blocks import BlockPattern, BlockPlan, Entries, Tiles, plan_of, spread, tiles_of
from ..types import Document, Shape
from .hybrid import Ranges, total


@dataclass(frozen=True, eq=False)
class Fragments:
    """The fragments of all blocks of all documents: each column (F,) int64, ascending by (batch entry, row)."""

    tile: Tensor
    """The block's tile of the whole sequence."""
    rank: Tensor
    batch: Tensor
    row: Tensor
    """First row among those that the rank holds."""
    position: Tensor
    """Position of that row in its document."""
    rows: Tensor

    def take(self, index: Tensor) -> Fragments:
        """Some of them."""
        return Fragments(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.tile)

    @cached_property
    def of_tiles(self) -> tuple[Tensor, Tensor]:
        """(first fragment, number of fragments) of every tile."""
        count = torch.bincount(self.tile)
        return count.cumsum(0) - count, count


def fragments_of(tiles: Tensor, held: Sequence[Ranges]) -> Fragments:
    """Cut a tile table (batch entry, first row, position, rows) at the ranges of rows that ranks hold."""
    batch, first, position, count = tiles.long().unbind(1)
    number = torch.arange(len(tiles), device=tiles.device)
    parts = []
    for rank, ranges in enumerate(held):
        before = 0
        for start, stop in ranges:
            low, high = first.clamp(min=start), (first + count).clamp(max=stop)
            mine = low < high
            row = low - start + before
            columns = (number, torch.full_like(number, rank), batch, row, position + low - first, high - low)
            parts.append([column[mine] for column in columns])
            before += stop - start
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = torch.argsort(joined[0] * (1 << 32) + joined[4], stable=True)
    return Fragments(*(column[order] for column in joined))


@dataclass(frozen=True, eq=False)
class Listed:
    """The key fragments that one rank's query fragments list.

    ``owner`` is the key head (0 where all heads share the lists) and ``query`` the query fragment of an entry, among
    those of the rank; ``member`` is the query head among those of the key head.
    """

    queries: Fragments
    keys: Fragments
    owners: int
    members: int
    owner: Tensor
    member: Tensor
    query: Tensor
    key: Tensor
    whole: Tensor | None
    bits: Tensor | None
    block_size: int

    @cached_property
    def wanted(self) -> Tensor:
        """(owners, fragments) bool: the key fragments that the rank needs."""
        found = torch.zeros(self.owners, len(self.keys), dtype=torch.bool, device=self.key.device)
        found[self.owner, self.key] = True
        return found

    def plan(self, place: Tensor, flat: Flat) -> BlockPlan:
        """The lists over the key fragments that have a ``place`` (owners, fragments): a row of keys, or -1.

        Rows are those of one batch entry, as `Flat` lays them out.
        """
        known = place.reshape(-1)
        every = self.owner * len(self.keys) + self.key
        mine = known[every] >= 0
        tiles, column = torch.unique(every[mine], return_inverse=True)  # ascending by owner and position
        fragment = self.keys.take(tiles % max(len(self.keys), 1))
        zero = torch.zeros_like(tiles)
        key_tiles = torch.stack([zero, known[tiles], fragment.position, fragment.rows], 1).int()
        owner = torch.arange(self.owners, device=zero.device).repeat_interleave(len(self.queries))
        query = self.queries.take(torch.arange(len(self.queries), device=zero.device).repeat(self.owners))
        query_tiles = torch.stack(
            [torch.zeros_like(owner), flat.place(owner, query), query.position, query.rows], 1
        ).int()  # fmt: skip
        count = len(owner)
        row = self.member[mine] * count + self.owner[mine] * len(self.queries) + self.query[mine]
        order = torch.argsort(row * max(len(tiles), 1) + column)
        edges = torch.cat([zero.new_zeros(1), torch.bincount(row, minlength=self.members * count).cumsum(0)])
        index = torch.arange(self.members, device=zero.device)[:, None] * count
        pointer = edges[index + torch.arange(count + 1, device=zero.device)]
        plan = BlockPlan(self.block_size, query_tiles, key_tiles, pointer.int(), column[order].int())
        if self.whole is None:
            return plan
        bits = None if self.bits is None else self.bits[mine][order]
        return replace(plan, whole=self.whole[mine][order], row_bits=bits)

    def own(self, rank: int, flat: Flat) -> Tensor:
        """The place of every fragment that this rank holds itself, for `plan`."""
        place = torch.full((self.owners, len(self.keys)), -1, dtype=torch.int64, device=self.key.device)
        held = (self.keys.rank == rank).nonzero()[:, 0]
        for owner in range(self.owners):
            place[owner, held] = flat.place(torch.full_like(held, owner), self.keys.take(held))
        return place

    def sent(self, shipments: Iterable[Shipped]) -> Tensor:
        """The place of every fragment in what several ranks have sent, one after the other, for `plan`."""
        place = torch.full((self.owners, len(self.keys)), -1, dtype=torch.int64, device=self.key.device)
        before = 0
        for one in shipments:
            place[one.owner, one.fragment] = one.start + before
            before += one.rows
        return place


@dataclass(frozen=True)
class Flat:
    """Rows of all batch entries, and for lists of their own of all key heads, as rows of one batch entry.

    Problems of different ``owners`` (key heads, or 1 where all heads share the lists) lie one after the other.
    """

    batch: int
    rows: int
    owners: int

    def place(self, owner: Tensor, fragment: Fragments) -> Tensor:
        """The flat row of the first row of each fragment."""
        return (owner * self.batch + fragment.batch) * self.rows + fragment.row

    def of(self, tensor: Tensor) -> Tensor:
        """(1, owners * B * n, H / owners, D) of a (B, n, H, D) tensor."""
        if self.owners == 1:
            return tensor.reshape(1, -1, *tensor.shape[2:])
        return tensor.unflatten(2, (self.owners, -1)).permute(2, 0, 1, 3, 4).flatten(0, 2).unsqueeze(0)

    def back(self, tensor: Tensor) -> Tensor:
        """The inverse of `of`."""
        parts = tensor[0].unflatten(0, (self.owners, self.batch, self.rows))
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


@dataclass(frozen=True, eq=False)
class Shipped:
    """Fragments that travel from one rank to another, ascending by owner and place."""

    owner: Tensor
    fragment: Tensor
    start: Tensor
    """Rows of the shipment before each."""
    source: Tensor
    """(rows,) the row (batch entry * rows of the rank + row) of each row that travels."""
    source_owner: Tensor
    """(rows,) its owner."""

    @property
    def rows(self) -> int:
        """Rows of the shipment: one of all key heads where they share the lists, else one of one key head."""
        return len(self.source)


def shipped(wanted: Tensor, keys: Fragments, source: int, rows: int) -> Shipped:
    """What rank ``source``, which holds ``rows`` rows, sends to one that wants (owners, fragments)."""
    owner, fragment = (wanted & (keys.rank == source)).nonzero(as_tuple=True)
    count = keys.rows[fragment]
    item, row = spread((keys.batch * rows + keys.row)[fragment], count)
    return Shipped(owner, fragment, count.cumsum(0) - count, row, owner[item])


def tiles_of_rank(tiles: Tiles, fragments: Fragments, rank: int) -> tuple[Tiles, Fragments]:
    """The whole sequence's key tiles, with this rank's query fragments, which have rows of the rank."""
    mine = fragments.take((fragments.rank == rank).nonzero()[:, 0])
    table = torch.stack([mine.batch, mine.row, mine.position, mine.rows], 1).int()
    queries = tiles.queries._replace(
        tiles=table, block=tiles.queries.block[mine.tile], total=tiles.queries.total[mine.tile]
    )
    return Tiles(tiles.keys, queries, tiles.first_block[mine.tile], tiles.first_tile[mine.tile]), mine


def listed(
    pattern: BlockPattern, entries: Entries, local: Tiles, mine: Fragments, fragments: Fragments, kv_heads: int
) -> Listed:
    """The fragments behind the entries of a rank's query fragments; ``local`` is `tiles_of_rank`'s."""
    heads = local.queries.heads if pattern.per_head else 1
    plan = plan_of(local, entries, heads=heads, block_size=pattern.block_size)
    owners = kv_heads if pattern.per_head else 1
    first, count = fragments.of_tiles
    column = plan.columns.long()
    entry, key = spread(first[column], count[column])
    row = plan.entry_rows[entry]
    head, query = row // max(len(mine), 1), row % max(len(mine), 1)
    if local.queries.is_causal:  # of a block of its own, what other ranks hold of it may be in the future
        past = fragments.position[key] < mine.position[query] + mine.rows[query]
        entry, key, head, query = entry[past], key[past], head[past], query[past]
    members = heads // owners
    return Listed(
        mine, fragments, owners, members, head // members, head % members, query, key,
        None if plan.whole is None else plan.whole[entry],
        None if plan.row_bits is None else plan.row_bits[entry],
        pattern.block_size,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layout:
    """Blocks of the whole sequence, and where their rows are."""

    tiles: Tiles
    fragments: Fragments
    held: tuple[Ranges, ...]
    rank: int

    @classmethod
    def of(
        cls,
        shape: Shape,
        documents: tuple[Document, ...],
        block_size: int,
        held: Sequence[Ranges],
        rank: int,
        *,
        is_causal: bool,
        device: torch.device,
    ) -> Layout:
        """The layout of a call whose ranks hold ``held``."""
        tiles = tiles_of(shape, documents, block_size, is_causal=is_causal, device=device)
        return cls(tiles, fragments_of(tiles.keys, held), tuple(held), rank)

    def rows(self, rank: int) -> int:
        """Rows that a rank holds, of each batch entry."""
        return total(self.held[rank])

    def listed(self, pattern: BlockPattern, rank: int, kv_heads: int) -> Listed:
        """The key fragments that the query fragments of ``rank`` list."""
        local, mine = tiles_of_rank(self.tiles, self.fragments, rank)
        return listed(pattern, pattern.entries(local.queries), local, mine, self.fragments, kv_heads)

    def shipped(self, wanted: Tensor, source: int) -> Shipped:
        """What ``source`` sends to a rank that wants (owners, fragments)."""
        return shipped(wanted, self.fragments, source, self.rows(source))
