"""Which program of a persistent kernel computes which tiles: dealt out on the host, so that all end at the same time.

A counter in memory that programs take tiles from balances less well where few tiles are left, and it is not safe: on an
H200 whose time several processes shared, a tile in a million was taken and never computed, while lists that are
dealt beforehand lost none (docs/performance.md).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE_COST = 1.5
"""Blocks that a tile costs besides those that it meets: an estimate."""
KEPT = 512
"""Problems whose tables and launches are kept: streaming has two a chunk, one for each direction."""
_LAST = 4
"""Tiles a program, at the end, that are dealt heaviest first."""


@dataclass(frozen=True, eq=False)
class Cells:
    """A table of cells (`patterns.tiles.cells`), here and on the device; a key of caches, equal only to itself."""

    host: NDArray[np.int32]
    device: Tensor

    def __len__(self) -> int:
        return len(self.host)


class Group(NamedTuple):
    """Branches that one launch computes, and its tiles: every ``stride``-th row of a cell."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    stride: int
    cells: Cells


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tiles of program p: ``tiles[starts[p]:starts[p + 1]]``, in the order in which it computes them; int32."""

    tiles: Tensor
    starts: Tensor

    @property
    def programs(self) -> int:
        """How many programs have a tile: the first ones."""
        return min(len(self.starts) - 1, len(self.tiles))


@dataclass(frozen=True, eq=False)
class Work:
    """Blocks that tiles meet, (heads, tiles), and how these were dealt."""

    blocks: NDArray[np.int64]
    _dealt: dict[tuple[int, int, int, torch.device], Schedule | None] = field(default_factory=dict, repr=False)

    def dealt(self, head: int, count: int, programs: int, device: torch.device) -> Schedule | None:
        """The tiles of ``count`` heads from ``head`` on, numbered within these, dealt by `deal` once."""
        asked = head, count, programs, device
        if asked not in self._dealt:
            blocks = self.blocks[head : head + count]
            self._dealt[asked] = deal(blocks + TILE_COST, np.ones(blocks.shape, dtype=bool), programs, device)
        return self._dealt[asked]


def met_blocks(
    cells: NDArray[np.int32],
    *,
    side: Literal["query", "key"],
    heads: int,
    stride: int,
    segment_lengths: tuple[int, ...],
    dilation_rates: tuple[int, ...],
    interleaved: bool,
    is_causal: bool,
    tile_rows: int,
    block_rows: int,
) -> NDArray[np.int64]:
    """How many blocks of the other side's rows every tile meets: (query heads, cells, stride), -1 without own rows.

    Args:
        cells: of the side whose rows the tiles are.
        side: that side.
        heads: query heads.
        stride: distance of the rows of a tile; tile c begins at a cell's row c.
        segment_lengths, dilation_rates, interleaved: the pattern.
        is_causal: whether only pairs count whose key is not behind the query.
        tile_rows: rows of a tile.
        block_rows: rows of a block of the other side; a branch and segment begins a block of its own.
    """
    table = cells.astype(np.int64)[:, :, None]
    skipped = np.arange(stride, dtype=np.int64)
    rows = np.minimum((table[:, 3] - skipped + stride - 1) // stride, tile_rows)
    first = table[:, 2] + skipped
    last = first + stride * (rows - 1)
    begin, end = table[:, 5], table[:, 6]
    found = np.zeros((heads, *rows.shape), dtype=np.int64)
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        common = math.gcd(r, stride)
        offsets = np.arange(heads) % r if interleaved else np.arange(heads) // -(-heads // r)
        for later in (0, 1):  # a tile lies in one segment of the shortest branch, so in at most two of any other
            base = (first // w + later) * w
            low, high = np.maximum(base, begin), np.minimum(base + w, end)
            if is_causal and side == "query":
                high = np.minimum(high, last + 1)
            if is_causal and side == "key":
                low = np.maximum(low, first)
            there = (last >= base) & (rows > 0)
            for offset in np.unique(offsets):
                start = np.maximum(low - base - offset + r - 1, 0) // r
                count = np.maximum(high - base - offset + r - 1, 0) // r - start
                count = np.where(there & ((first - base - offset) % common == 0), np.maximum(count, 0), 0)
                found[offsets == offset] += -(-count // block_rows)
    found[:, rows <= 0] = -1
    return found


def deal(
    costs: NDArray[np.floating], wanted: NDArray[np.bool_], programs: int, device: torch.device
) -> Schedule | None:
    """Tiles, by their place in ``costs``, dealt to at most ``programs`` programs; None where none is wanted.

    Each tile in turn goes to the program that has the least work so far, so neighbours, which share rows in the cache,
    are computed at the same time; the last ones go heaviest first, so that all programs end together.

    >>> schedule = deal(np.array([5.0, 1, 1, 3]), np.array([True] * 4), 2, torch.device("cpu"))
    >>> schedule.tiles.tolist(), schedule.starts.tolist()
    ([0, 3, 1, 2], [0, 1, 4])
    """
    flat = costs.reshape(-1)
    tiles = np.flatnonzero(wanted.reshape(-1))
    if not len(tiles):
        return None
    work = flat[tiles]
    begin = max(len(tiles) - _LAST * programs, 0)
    dealt = np.concatenate((np.arange(begin), begin + np.argsort(-work[begin:], kind="stable")))
    owner = np.empty(len(tiles), dtype=np.int64)
    loads = [(0.0, program) for program in range(programs)]
    for tile, more in zip(dealt.tolist(), work[dealt].tolist(), strict=True):
        total, program = loads[0]
        owner[tile] = program
        heapq.heapreplace(loads, (total + more, program))
    order = dealt[np.argsort(owner[dealt], kind="stable")]
    starts = np.searchsorted(owner[order], np.arange(programs + 1))
    if tiles.max() >= 2**31:
        raise ValueError(f"there are {tiles.max() + 1} tiles; they are counted in 32 bits")
    return Schedule(
        torch.from_numpy(tiles[order].astype(np.int32)).to(device), torch.from_numpy(starts.astype(np.int32)).to(device)
    )
