"""Lists for the Hopper kernels of blocks of 128 that content has chosen for whole tiles, without waiting for the GPU.

What content chooses is new on every call, so the way through `patterns.blocks.plan_of` and `rectangles`, which wait for
the device a dozen times and deal tiles on the host, would take longer than short attention. Here every tile has room
for as many blocks as it can list, lists are sorted on the device, and tiles are dealt by their place in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.spread_work import SpreadWork
from ...patterns.blocks import Tiles
from ...patterns.content import SelectedBlocks
from ...types import Shape
from .rectangles import COLUMNS, FOREIGN, QUERIES, TILE, BackwardLists, ForwardLists, _packed


class Columns:
    """The key tiles that every query tile lists: (H, T, most) int64, ascending, ``len(tiles.keys)`` behind the last."""

    def __init__(self, chosen: SelectedBlocks, tiles: Tiles) -> None:
        query, content = tiles.queries, chosen.pattern
        block, total, first = query.block[:, None], query.total[:, None], tiles.first_block[:, None]
        device = block.device
        around = block + torch.arange(-content.always_local, content.always_local + 1, device=device)
        start = torch.arange(content.always_first, device=device).expand(len(block), -1)
        start = start.masked_fill((start - block).abs() <= content.always_local, -1)
        always = torch.cat([around, start], 1).expand(query.heads, -1, -1)
        batch, row = query.tiles[:, :2].long().unbind(1)
        picked = chosen.selection[batch, :, row].transpose(0, 1).long()  # (H, T, keep)
        found = torch.cat([always, picked], 2)
        real = (found >= first) & (found >= 0) & (found < total)
        shift = (tiles.first_tile - tiles.first_block)[:, None]
        self.none, self.has_first = len(tiles.keys), content.always_first > 0
        self.tile = (found + shift).masked_fill(~real, self.none).int().sort(2).values.long()
        self.number = real.sum(2)


def _flat(tiles: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row counted over the batch, position and rows of every tile, and of none behind the last."""
    batch, first, position, count = torch.nn.functional.pad(tiles.long(), (0, 0, 0, 1)).unbind(1)
    return batch * rows + first, position, count


def forward_lists(columns: Columns, shape: Shape, tiles: Tiles) -> ForwardLists:
    """`rectangles.forward_lists` of what content has chosen, not causal."""
    row, position, rows = (column[:-1] for column in _flat(tiles.queries.tiles, shape.query_rows))
    key_row, key_position, key_rows = _flat(tiles.keys, shape.key_rows)
    heads, count, most = columns.tile.shape
    tile = columns.tile
    short = key_rows[tile] < TILE
    flags = short * (COLUMNS + FOREIGN)
    ahead = position[:, None] - key_position[tile]
    members = (256 * rows)[:, None].expand_as(tile)
    records = _packed(*(
        column.reshape(-1) for column in (key_row[tile], ahead, 256 * (key_rows[tile] - 1) + 65536 * flags, members)
    ))  # fmt: skip
    head = torch.arange(heads, device=row.device).repeat_interleave(count)
    first = torch.arange(heads * count, device=row.device) * most
    packed = _packed(row.repeat(heads), rows.repeat(heads) + 256 * head, first, columns.number.reshape(-1))
    return ForwardLists(packed, records, SpreadWork(columns.number, by_weight=False), 1.0)


def backward_lists(columns: Columns, shape: Shape, tiles: Tiles) -> BackwardLists:
    """`rectangles.backward_lists` of what content has chosen, not causal."""
    row, position, rows = (column[:-1] for column in _flat(tiles.queries.tiles, shape.query_rows))
    key_row, key_position, key_rows = _flat(tiles.keys, shape.key_rows)
    heads = len(columns.tile)
    halves = torch.arange(TILE // QUERIES, device=row.device) * QUERIES
    high = (rows[:, None] - halves).clamp(max=QUERIES)  # (T, halves): rows of each half, none or fewer
    tile = columns.tile[..., None]
    exists = (high[:, None] > 0) & (tile < columns.none)
    masked = (high[:, None] < QUERIES) | (key_rows[tile] < TILE)
    head = torch.arange(heads, device=row.device)[:, None, None, None]
    place = torch.where(exists, head * columns.none + tile, heads * columns.none) * 2 + ~masked
    found, order = place.reshape(-1).int().sort(stable=True)
    edges = torch.searchsorted(
        found, torch.arange(2 * heads * columns.none + 1, device=row.device, dtype=torch.int32), out_int32=True
    )
    numbers = edges.diff().view(-1, 2)
    segments = torch.cat([edges[:-1:2, None], numbers, torch.zeros_like(numbers[:, :1])], 1)
    records = torch.stack([
        (row[:, None] + halves)[:, None].expand_as(place[0]).expand_as(place),
        (position[:, None] + halves)[:, None].expand_as(place),
        high[:, None] + 65536 * key_rows[tile],
        torch.zeros_like(place),
    ], -1)  # fmt: skip
    work = numbers.sum(1).view(heads, columns.none).unflatten(0, (shape.kv_heads, -1)).sum(1)
    # What all tiles list is the heaviest key tile that is known without asking the device.
    heaviest = heads // shape.kv_heads * len(row) * len(halves) if columns.has_first else 0
    spread = SpreadWork(work, by_weight=True, total=len(found), heaviest=heaviest)
    own = _packed(key_row[:-1], key_rows[:-1], key_position[:-1], torch.zeros_like(key_row[:-1]))
    return BackwardLists(own, segments, records.view(-1, 4)[order].int(), spread)
