"""Lists of blocks for kernels whose tiles are 128 rows by 128 (or 64) keys: rectangles, one record each.

Neighbouring tiles of one run of positions that lie in the same 128 are one tile of the kernel; what a smaller block
lists becomes a rectangle of such a pair of tiles, and rectangles that touch become one. Blocks of 128 are their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.schedule import Work
from ...kernels.spread_work import SpreadWork
from ...patterns.blocks import BlockPlan, spread

TILE = 128
"""Positions that one tile of a kernel spans at most."""
QUERIES = 64
"""Query rows of a block of the backward kernel."""

# Bits of a forward record, as `kernels.hopper_producer` has them.
COLUMNS, ROWS, FOREIGN = 1, 2, 4


class _Groups(NamedTuple):
    """Tiles of a kernel: the one that each tile of the plan is in, its first row there, and where they lie."""

    group: Tensor
    offset: Tensor
    row: Tensor
    position: Tensor
    rows: Tensor


def _grouped(tiles: Tensor, rows: int) -> _Groups:
    """``tiles`` of a tensor of ``rows`` rows a batch entry; rows count through all entries."""
    batch, first, position, count = tiles.long().unbind(1)
    flat = batch * rows + first
    starts = torch.ones(len(tiles), dtype=torch.bool, device=tiles.device)
    starts[1:] = (
        (flat[1:] != flat[:-1] + count[:-1])
        | (position[1:] != position[:-1] + count[:-1])
        | (position[1:] // TILE != position[:-1] // TILE)
    )
    group, heads = starts.cumsum(0) - 1, starts.nonzero()[:, 0]
    total = torch.zeros_like(heads).index_add_(0, group, count)
    return _Groups(group, flat - flat[heads][group], flat[heads], position[heads], total)


class _Rectangles(NamedTuple):
    """(entries,) each: list, query tile, key tile, first and last + 1 row of the one and key of the other."""

    owner: Tensor
    query: Tensor
    key: Tensor
    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor


def _joined(found: _Rectangles, same: tuple[Tensor, ...], first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """(order, starts): rectangles sorted so that those equal in ``same`` which touch in [first, last) follow, and
    which of them begin a run of such.
    """
    order = torch.arange(len(first), device=first.device)
    for column in (first, *reversed(same)):
        order = order[torch.argsort(column[order], stable=True)]
    starts = torch.ones(len(order), dtype=torch.bool, device=order.device)
    starts[1:] = first[order][1:] != last[order][:-1]
    for column in same:
        starts[1:] |= column[order][1:] != column[order][:-1]
    return order, starts


def _merged(found: _Rectangles) -> _Rectangles:
    """Rectangles of the same rows that touch become one, then those of the same keys."""
    for by_rows in (False, True):
        owner, query, key, top, bottom, left, right = found
        same = (owner, query, key, left, right) if by_rows else (owner, query, key, top, bottom)
        first, last = (top, bottom) if by_rows else (left, right)
        order, starts = _joined(found, same, first, last)
        begin = starts.nonzero()[:, 0]
        end = torch.cat([begin[1:], begin.new_tensor([len(order)])]) - 1
        taken = _Rectangles(*(column[order[begin]] for column in found))
        stop = last[order[end]]
        found = taken._replace(bottom=stop) if by_rows else taken._replace(right=stop)
    return found


class ForwardLists(NamedTuple):
    """What the forward kernel reads; int32."""

    tiles: Tensor
    """(heads * tiles, 4): first row, rows + 256 * head, first record, records."""
    records: Tensor
    """(records, 4): first key row, how far ahead of it the tile's first row is, first key + 256 * last key + 65536 *
    flags, first row + 256 * (last row + 1)."""
    work: Work | SpreadWork
    """Records of every tile, (heads, tiles)."""
    fill: float
    """Pairs that the plan lists over pairs of the products."""


class BackwardLists(NamedTuple):
    """What the backward kernel reads; int32."""

    tiles: Tensor
    """(key tiles, 4): first row, rows, its position, 0."""
    segments: Tensor
    """(lists * key tiles, 4): first record, records with a mask, those without (behind), 0."""
    records: Tensor
    """(records, 4): first query row, its position, rows + 256 * first key + 65536 * (last key + 1), 0."""
    work: Work | SpreadWork
    """Records of every tile of a key head, of all its query heads: (key heads, key tiles)."""


def _entries(plan: BlockPlan, query: _Groups, key: _Groups) -> _Rectangles:
    tiles, column = max(len(plan.query_tiles), 1), plan.columns.long()
    tile = plan.entry_rows % tiles
    top, left = query.offset[tile], key.offset[column]
    return _Rectangles(
        plan.entry_rows // tiles, query.group[tile], key.group[column], top,
        top + plan.query_tiles[tile, 3].long(), left, left + plan.key_tiles[column, 3].long(),
    )  # fmt: skip


def _packed(*columns: Tensor) -> Tensor:
    return torch.stack(columns, 1).int().contiguous()


def forward_lists(plan: BlockPlan, heads: int, query_rows: int, key_rows: int, *, is_causal: bool) -> ForwardLists:
    """The lists of a plan of whole blocks of 64 or 128."""
    query, key = _grouped(plan.query_tiles, query_rows), _grouped(plan.key_tiles, key_rows)
    found = _entries(plan, query, key)
    if plan.block_size < TILE:
        found = _merged(found)
    owner, own, other, top, bottom, left, right = found
    ahead = query.position[own] - key.position[other]
    columns = (left > 0) | (right < TILE)
    if is_causal:
        columns |= ahead + top < right - 1
    rows = (top > 0) | (bottom < query.rows[own])
    flags = columns * COLUMNS + rows * ROWS + (key.rows[other] < TILE) * FOREIGN
    records = _packed(key.row[other], ahead, left + 256 * (right - 1) + 65536 * flags, top + 256 * bottom)
    count, lists = len(query.row), plan.row_pointer.shape[0]
    by_tile = owner * count + own
    number = torch.bincount(by_tile, minlength=lists * count)
    first = number.cumsum(0) - number
    head = torch.arange(heads, device=own.device).repeat_interleave(count)
    tile = torch.arange(count, device=own.device).repeat(heads)
    listed = tile if lists == 1 else head * count + tile
    packed = _packed(query.row[tile], query.rows[tile] + 256 * head, first[listed], number[listed])
    pairs = int(((bottom - top) * (right - left)).sum()) if len(own) else 1
    work = Work(number[listed].view(heads, count).cpu().numpy())
    return ForwardLists(packed, records, work, pairs / max(len(own) * TILE * TILE, 1))


def backward_lists(
    plan: BlockPlan, heads: int, kv_heads: int, query_rows: int, key_rows: int, *, is_causal: bool
) -> BackwardLists:
    """The transposed lists of a plan of whole blocks of 64 or 128: `QUERIES` query rows against a key tile."""
    query, key = _grouped(plan.query_tiles, query_rows), _grouped(plan.key_tiles, key_rows)
    found = _entries(plan, query, key)
    # Each entry as pieces of at most `QUERIES` rows of the query's tile.
    low, high = found.top // QUERIES, -(-found.bottom // QUERIES)
    item, piece = spread(low, high - low)
    top = torch.maximum(found.top[item], piece * QUERIES)
    bottom = torch.minimum(found.bottom[item], piece * QUERIES + QUERIES)
    found = _Rectangles(*(column[item] for column in found))._replace(top=top, bottom=bottom)
    if plan.block_size < TILE:
        found = _merged(found._replace(query=found.query * TILE + top))
        found = found._replace(query=found.query // TILE)
    owner, own, other, top, bottom, left, right = found
    position = query.position[own] + top
    masked = (bottom - top < QUERIES) | (left > 0) | (right < TILE)
    if is_causal:
        masked |= key.position[other] + right - 1 > position
    count, lists = len(key.row), plan.row_pointer.shape[0]
    place = owner * count + other
    order = torch.argsort(place * 2 + ~masked, stable=True)
    records = _packed(query.row[own] + top, position, bottom - top + 256 * left + 65536 * right, torch.zeros_like(top))
    with_mask = torch.bincount(place[masked], minlength=lists * count)
    number = torch.bincount(place, minlength=lists * count)
    segments = _packed(number.cumsum(0) - number, with_mask, number - with_mask, torch.zeros_like(number))
    work = number.view(lists, count)
    work = work.unflatten(0, (kv_heads, -1)).sum(1) if lists > 1 else work.expand(kv_heads, count) * (heads // kv_heads)
    tiles = _packed(key.row, key.rows, key.position, torch.zeros_like(key.row))
    return BackwardLists(tiles, segments, records[order], Work(work.cpu().numpy()))
