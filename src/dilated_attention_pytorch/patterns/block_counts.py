"""How many keys each row sees under lists of key blocks, counted from the lists, a few million pairs at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BlockPlan

_COUNTED = 1 << 22
"""Rows of entries (pairs, where a `DilatedPattern` shows parts of blocks) that exist at a time."""


def keys_of_rows(plan: BlockPlan, heads: int, *, is_causal: bool) -> Tensor:
    """(H, T, b) int64, or (1, T, b) where all heads see alike: keys of each row of every query tile.

    Keys that a key_padding_mask hides are counted. Rows that a tile does not have see 0.
    """
    apart = plan.per_head or bool(plan.dilated)
    tiles, size, device = plan.query_tiles.shape[0], plan.block_size, plan.columns.device
    groups = heads if apart else 1
    tile, column = plan.entry_rows % max(tiles, 1), plan.columns.long()
    # Most entries show all keys to all rows; only the others are looked at row by row.
    plain = torch.ones_like(column, dtype=torch.bool) if plan.whole is None else plan.whole
    if is_causal:
        plain = plain & (plan.query_tiles[tile, 2] // size != plan.key_tiles[column, 2] // size)
    keys = torch.zeros(plan.counts.numel(), dtype=torch.int64, device=device)
    keys.index_add_(0, plan.entry_rows[plain], plan.key_tiles[column[plain], 3].long())
    exists = torch.arange(size, device=device) < plan.query_tiles[:, 3:]
    total = (keys.view_as(plan.counts)[..., None] * exists).repeat(1 if plan.per_head else groups, 1, 1)
    rest, rows = (~plain).nonzero()[:, 0], total.view(-1, size)
    for head in range(1 if plan.per_head else groups):
        for entries in rest.split(max(1, _COUNTED // (size * size if plan.dilated else size))):
            row = plan.entry_rows[entries] + head * tiles
            rows.index_add_(0, row, _seen(plan, entries, row // max(tiles, 1), heads, is_causal=is_causal))
    return total


def _seen(plan: BlockPlan, entries: Tensor, head: Tensor, heads: int, *, is_causal: bool) -> Tensor:
    """(entries, b) int64: keys that each row of an entry's query tile sees in its block."""
    size, device = plan.block_size, plan.columns.device
    own = plan.query_tiles[plan.entry_rows[entries] % plan.query_tiles.shape[0]].long()
    other = plan.key_tiles[plan.columns[entries].long()].long()
    step = torch.arange(size, device=device)
    exists = step < own[:, 3:]
    query, key = own[:, 2:3] + step, other[:, 2:3] + step
    keys = other[:, 3:].expand_as(query)
    if is_causal:
        keys = torch.minimum((query - other[:, 2:3] + 1).clamp(min=0), keys)
    keys = keys * exists
    if plan.whole is None:
        return keys
    shown = plan.whole[entries, None].expand_as(exists)
    if plan.row_bits is not None:
        shown = shown | (plan.row_bits[entries][:, step // 32] >> (step % 32) & 1).bool()
    if not plan.dilated:
        return keys * shown
    pairs = shown[:, :, None].expand(-1, -1, size)
    for pattern in plan.dilated:
        for branch in pattern.branches:
            length, rate = branch.segment_length, branch.dilation_rate
            offsets = torch.tensor([pattern.head_offset(h, rate, heads) for h in range(heads)], device=device)
            offset = offsets[head][:, None]
            active = (query % length % rate == offset)[:, :, None] & (key % length % rate == offset)[:, None]
            pairs = pairs | (active & ((query // length)[:, :, None] == (key // length)[:, None]))
    pairs = pairs & exists[:, :, None] & (step < other[:, 3:])[:, None]
    if is_causal:
        pairs = pairs & (key[:, None] <= query[:, :, None])
    return pairs.sum(2)
