"""Gradients of keys and values that chunks have for rows outside themselves: sums in host memory.

A key of a segment that chunks cut gets a share from its own chunk, with all else that the chunk has for it, and one
from every other chunk of the segment. The others are few: one row in r of a head. So they are summed apart, in the
accumulators' dtype, and join the chunks' own once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .streaming_plan import Block, Tile, block_rows


class _Place(NamedTuple):
    """Active rows of a key head in a segment: from key row ``row``, ``rate`` apart."""

    batch: int
    kv_head: int
    row: int
    rate: int
    rows: int
    branch: int


class KeySums:
    """Sums of (dK, dV) of the segments that chunks cut, made when the first share comes.

    Args:
        dims: head dims of key and value.
        dtype: of the sums.
    """

    def __init__(self, dims: Sequence[int], dtype: torch.dtype) -> None:
        self._dims, self._dtype = tuple(dims), dtype
        self._sums: dict[_Place, list[Tensor]] = {}

    def rows(self, tile: Tile, block: Block) -> list[Tensor]:
        """Where shares of a block's rows are added, hidden rows too: one (rows, dim) each for key and value."""
        begin, stop = tile.segment
        row = begin + (block.row - begin) % block.rate
        place = _Place(tile.batch, block.kv_head, row, block.rate, -(-(stop - row) // block.rate), tile.branch)
        found = self._sums.get(place)
        if found is None:
            found = self._sums[place] = [torch.zeros(place.rows, dim, dtype=self._dtype) for dim in self._dims]
        first = (block.row - row) // block.rate
        count = block.rows if block.shown is None else int(block.shown[-1]) + 1
        return [one[first : first + count] for one in found]

    def join(self, totals: Sequence[Tensor]) -> None:
        """Add all to the gradients (B, N, G, dim) of key and value."""
        for place, sums in self._sums.items():
            block = Block(place.kv_head, place.row, place.rows, place.rate, 0)
            for total, one in zip(totals, sums, strict=True):
                block_rows(total, place.batch, block).add_(one)
        self._sums.clear()
