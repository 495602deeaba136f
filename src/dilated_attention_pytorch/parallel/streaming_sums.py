"""Gradients of keys and values that chunks have for rows outside themselves: sums in host memory.

A key of a segment that chunks cut gets a share from its own chunk, with all else that the chunk has for it, and one
from every other chunk of the segment. The others are few: one row in r of a head. So they are summed apart, in the
accumulators' dtype, and join the chunks' own once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .streaming_plan import Block, BlockRun, Tile, rows_of_run


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

    def runs(self) -> Iterator[tuple[range, int]]:
        """Blocks of as many rows, and how many these are."""
        first = 0
        for block in range(1, self.blocks + 1):
            if block == self.blocks or self.rows(block) != self.rows(first):
                yield range(first, block), self.rows(first)
                first = block


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

    def join(self, totals: Sequence[Tensor], before: tuple[int, int] | None = None) -> None:
        """Add sums to the gradients (B, N, G, dim) of key and value, and forget them.

        All, or those of segments that end in an earlier batch row than ``before`` says, or at its row at the latest:
        then the host adds them while the device computes what follows.
        """
        done = [place for place in self._sums if before is None or (place.batch, place.stop) <= before]
        for place in done:
            for total, one in zip(totals, self._sums.pop(place), strict=True):
                for blocks, rows in place.runs():
                    first = blocks.start
                    row, head = place.row + first * place.row_step, place.kv_head + first * place.head_step
                    run = BlockRun(Block(head, row, rows, place.rate, 0), len(blocks), place.head_step, place.row_step)
                    shares = one[first : blocks.stop, :rows]
                    rows_of_run(total, place.batch, run).add_(shares if run.blocks > 1 else shares[0])
