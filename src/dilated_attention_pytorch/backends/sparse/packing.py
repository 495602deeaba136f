"""Rows by the key block that they have chosen: what the kernels over packed rows read, made on the device.

An entry is one choice of one row: (head of its group * rows + row) * keep + choice, within the list of one key head
of one batch entry. Nothing here waits for the device.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...patterns.blocks import BlockPlan, Tiles
from ...types import Shape

_SHORT = 2**15 - 1
"""What 16 bits count, which sort in half the time."""


class Pieces(NamedTuple):
    """Entries of a tile in pieces."""

    table: Tensor
    """(lists, pieces, 3) int32: key tile, first entry in the order, entries; 0 entries behind the last piece."""
    per_list: int


class Packed:
    """The choices of all rows, sorted by key tile.

    Args:
        chosen: (lists, entries) int16 or int32: key tiles, -1 for none.
        keep: choices of a row.
        tiles: key tiles.
    """

    def __init__(self, chosen: Tensor, keep: int, tiles: int) -> None:
        self.chosen, self.keep, self.tiles = chosen, keep, tiles

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        lists, entries = self.chosen.shape
        if lists * (self.tiles + 1) > _SHORT:
            return self._sorted_by_list()
        # All lists in one sort, each behind the one before; with what chose nothing in front of it.
        kind, device = torch.int16, self.chosen.device
        base = torch.arange(1, lists * (self.tiles + 1) + 1, self.tiles + 1, device=device, dtype=kind)[:, None]
        keys = self.chosen.to(kind) + base
        found, order = torch.sort(keys.view(-1), stable=True)
        before = torch.arange(lists, device=device)[:, None] * entries
        asked = base + torch.arange(self.tiles + 1, device=device, dtype=kind)
        edges = torch.searchsorted(found, asked, out_int32=True) - before.int()
        return (order.view(lists, entries) - before).int(), edges[:, :-1].contiguous(), edges.diff(dim=1)

    def _sorted_by_list(self) -> tuple[Tensor, Tensor, Tensor]:
        found, order = torch.sort(self.chosen, dim=1, stable=True)
        order = order.int()
        asked = torch.arange(self.tiles + 1, device=found.device, dtype=found.dtype).expand(len(found), -1).contiguous()
        edges = torch.searchsorted(found, asked, out_int32=True)
        return order, edges[:, :-1].contiguous(), edges.diff(dim=1)

    @property
    def order(self) -> Tensor:
        """(lists, entries) int32: entries, those without a key tile first, then by key tile."""
        return self._sorted[0]

    @cached_property
    def order_rows(self) -> Tensor:
        """(lists, entries) int32: head of its group * rows + row of the entries in that order."""
        return self.order // self.keep

    @property
    def first(self) -> Tensor:
        """(lists, tiles) int32: where the entries of a key tile begin in the order."""
        return self._sorted[1]

    @property
    def counts(self) -> Tensor:
        """(lists, tiles) int32: entries of a key tile."""
        return self._sorted[2]

    def pieces(self, size: int) -> Pieces:
        """Every tile's entries in pieces of at most ``size``."""
        entries = self.chosen.shape[1]
        number = (self.counts + (size - 1)) // size
        after = number.cumsum(1, dtype=torch.int32)
        per_list = -(-entries // size) + self.tiles
        index = torch.arange(per_list, device=after.device, dtype=torch.int32).expand(len(after), -1).contiguous()
        tile = torch.searchsorted(after, index, right=True)
        real = tile < self.tiles
        tile = tile.clamp(max=self.tiles - 1)
        skipped = (index - (after - number).gather(1, tile)) * size
        count = (self.counts.gather(1, tile) - skipped).clamp(max=size).masked_fill(~real, 0)
        return Pieces(torch.stack([tile.int(), self.first.gather(1, tile) + skipped, count], 2), per_list)


def pack(selection: Tensor, shape: Shape, tiles: Tiles, listed: BlockPlan | None) -> Packed:
    """What rows have chosen, by key tile.

    Args:
        selection: (B, H, Nq, keep) int32 blocks of a row's document, -1 for none.
        shape: of the call.
        tiles: of the query, and of all keys.
        listed: whole blocks that rows see anyhow, which may be among the chosen ones; None: which cannot.
    """
    batch, heads, _, keep = selection.shape
    key_tiles = len(tiles.keys)
    shift, tile_of_row = row_tables(shape, tiles)
    found = selection
    if shift is not None:
        found = torch.where(selection >= 0, selection + shift[:, None, :, None], -1)
    if listed is not None:
        head = torch.arange(heads if listed.per_head else 1, device=found.device)[None, :, None, None]
        asked = (head * len(listed.query_tiles) + tile_of_row[:, None, :, None]) * key_tiles + found
        known = listed.entry_rows * key_tiles + listed.columns
        if len(known):
            place = torch.searchsorted(known, asked.contiguous()).clamp(max=len(known) - 1)
            found = found.masked_fill((known[place] == asked) & (found >= 0), -1)
    kind = torch.int16 if key_tiles < _SHORT else torch.int32
    return Packed(found.to(kind).view(batch * shape.kv_heads, -1), keep, key_tiles)


@lru_cache(maxsize=4)
def row_tables(shape: Shape, tiles: Tiles) -> tuple[Tensor | None, Tensor]:
    """(B, Nq) each: what turns a block of a row's document into a key tile, None for nothing, and the query tile that
    a row is in; equal calls share them.
    """
    total = shape.batch * shape.query_rows
    if not len(tiles.queries.block):
        return None, torch.zeros(shape.batch, shape.query_rows, dtype=torch.int32, device=tiles.keys.device)
    batch, first = tiles.queries.tiles[:, :2].long().unbind(1)
    place = torch.arange(total, device=first.device)
    starts = batch * shape.query_rows + first
    tile = (torch.searchsorted(starts, place, right=True) - 1).clamp(min=0).view(shape.batch, shape.query_rows)
    shift = (tiles.first_tile - tiles.first_block).int()
    return shift[tile] if bool(shift.any()) else None, tile
