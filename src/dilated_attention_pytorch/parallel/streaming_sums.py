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

from .streaming_plan import BlockRun, Tile


class _Place(NamedTuple):
    """Active rows of some key heads in a segment that ends before key row ``stop``, as `BlockRun` puts it."""

    batch: int
    branch: int
    kv_head: int
    head_step: int
    row: int
    row_step: int
    rate: int
    blocks: int
    stop: int

    def rows(self, block: int) -> int:
        """Active rows of a head."""
        return -(-(self.stop - self.row - block * self.row_step) // self.rate)


class KeySums:
    """Sums of (dK, dV) of the segments that chunks cut, made when the first share comes.

    Args:
        dims: head dims of key and value.
        dtype: of the sums.
    """

    def __init__(self, dims: Sequence[int], dtype: torch.dtype) -> None:
        self._dims, self._dtype = tuple(dims), dtype
        self._sums: dict[_Place, list[Tensor]] = {}

    def rows(self, tile: Tile, run: BlockRun) -> list[Tensor]:
        """Where shares of a run are added, for key and value: (blocks, rows, dim), or as `rows_of_run` of one block."""
        (begin, stop), first = tile.segment, run.first
        before = (first.row - begin) // first.rate
        place = _Place(
            tile.batch, tile.branch, first.kv_head, run.head_step, first.row - before * first.rate, run.row_step,
            first.rate, run.blocks, stop,
        )  # fmt: skip
        found = self._sums.get(place)
        if found is None:
            found = [torch.zeros(run.blocks, place.rows(0), dim, dtype=self._dtype) for dim in self._dims]
            self._sums[place] = found
        if run.blocks > 1:
            return [one[:, before : before + first.rows] for one in found]
        count = first.rows if first.shown is None else int(first.shown[-1]) + 1
        return [one[0, before : before + count] for one in found]

    def join(self, totals: Sequence[Tensor]) -> None:
        """Add all to the gradients (B, N, G, dim) of key and value."""
        for place, sums in self._sums.items():
            for total, one in zip(totals, sums, strict=True):
                for block in range(place.blocks):
                    row, head = place.row + block * place.row_step, place.kv_head + block * place.head_step
                    total[place.batch, row : place.stop : place.rate, head].add_(one[block, : place.rows(block)])
        self._sums.clear()
