"""An arena: blocks of any size are cut out of large regions, best fit first, and joined again when they come back."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..backing import Backing, Fence
from ..blocks import Block, Memory

ALIGNMENT = 512
"""Bytes: what a block's start and size are multiples of, as in PyTorch's CUDA allocator."""


@dataclass(frozen=True, kw_only=True)
class Fragmentation:
    """Keeps memory as an `Arena`.

    Args:
        region_bytes: least size of a region, where the budget allows it.
        compaction: join idle regions into one when a request fits in none of them, or when nothing is on loan.

    Raises:
        ValueError: a size below 512 bytes.
    """

    region_bytes: int = 1 << 20
    compaction: bool = True

    def __post_init__(self) -> None:
        if self.region_bytes < ALIGNMENT:
            raise ValueError(f"region_bytes is {self.region_bytes}; give at least {ALIGNMENT}")

    @staticmethod
    def size(asked: int) -> int:
        """The next multiple of 512 bytes."""
        return -(-asked // ALIGNMENT) * ALIGNMENT


class _Region:
    """A piece of memory and the idle extents in it, by start and by end."""

    __slots__ = ("ends", "leased", "memory", "number", "returned", "starts")

    def __init__(self, memory: Memory, number: int) -> None:
        self.memory, self.number = memory, number
        self.leased = self.returned = 0
        self.starts: dict[int, tuple[int, tuple[Fence, ...]]] = {}
        """Start to size, and what the next user has to wait for."""
        self.ends: dict[int, int] = {}
        """End to start."""


class Arena:
    """Memory of one device in regions: best fit by offset, joining of neighbours, compaction of idle regions.

    External fragmentation, the share of idle bytes outside the largest idle block, is what `Usage` measures. Blocks on
    loan cannot move, so compaction replaces regions that are wholly idle by one of their size together.
    """

    def __init__(self, device: torch.device, *, backing: Backing, options: Fragmentation) -> None:
        self.device, self.backing, self.options = device, backing, options
        self.held = self._leased = self._number = 0
        self._regions: dict[int, _Region] = {}
        # (size, region, start) of every idle extent, in order: the best fit is the first that is large enough.
        self._idle: list[tuple[int, int, int]] = []
        # Blocks that came back and were not joined with their neighbours yet, by size: what recurs is found here.
        self._returned: dict[int, deque[Block]] = {}

    def take(self, size: int) -> Block | None:
        """A block of the size that came back, or the smallest idle extent that is large enough, cut to ``size``."""
        if self.options.compaction and not self._leased and len(self._regions) > 1:
            return None  # nothing is in the way of one region for all
        if same := self._returned.get(size):
            block = same.popleft()
            self._regions[block.home].leased += size
            self._leased += size
            return block
        self._join_all()
        return self._take(size)

    def _take(self, size: int) -> Block | None:
        found = bisect_left(self._idle, (size,))
        if found == len(self._idle):
            return None
        extent, number, start = self._idle.pop(found)
        region = self._regions[number]
        _, fences = region.starts.pop(start)
        del region.ends[start + extent]
        if extent > size:
            self._insert(region, start + size, extent - size, fences)
        region.leased += size
        self._leased += size
        return Block(region.memory, start, size, fences, home=number)

    def _insert(self, region: _Region, start: int, size: int, fences: tuple[Fence, ...]) -> None:
        region.starts[start] = size, fences
        region.ends[start + size] = start
        insort(self._idle, (size, region.number, start))

    def _remove(self, region: _Region, start: int) -> tuple[int, tuple[Fence, ...]]:
        size, fences = region.starts.pop(start)
        del region.ends[start + size]
        del self._idle[bisect_left(self._idle, (size, region.number, start))]
        return size, fences

    def put(self, block: Block) -> None:
        """Take the block back; it is joined with idle neighbours before a request of another size is served."""
        region = self._regions[block.home]
        region.leased -= block.size
        self._leased -= block.size
        region.returned = block.returned
        same = self._returned.get(block.size)
        if same is None:
            same = self._returned[block.size] = deque()
        same.append(block)

    def _join_all(self) -> None:
        """Join every block that came back with its idle neighbours."""
        blocks = [block for same in self._returned.values() for block in same]
        self._returned.clear()
        for block in blocks:
            self._join(block)

    def _join(self, block: Block) -> None:
        region = self._regions[block.home]
        start, size, fences = block.offset, block.size, block.fences
        before, after = region.ends.get(start), start + size
        if after in region.starts:
            more, theirs = self._remove(region, after)
            size, fences = size + more, fences + theirs
        if before is not None:
            more, theirs = self._remove(region, before)
            start, size, fences = before, size + more, fences + theirs
        if len(fences) > 1:
            fences = tuple(fence for fence in dict.fromkeys(fences) if not self.backing.reached(fence))
        self._insert(region, start, size, fences)

    def _spare(self) -> list[_Region]:
        """Regions that compaction may replace."""
        return [region for region in self._regions.values() if not region.leased] if self.options.compaction else []

    def growth(self, size: int, room: int | None) -> int:
        """What the request needs beyond the idle regions; more where the regions would be small."""
        spare = sum(region.memory.size for region in self._spare())
        least = max(size - spare, 0)
        wanted = max(self.options.region_bytes - spare, 0)
        return max(least, wanted if room is None else min(wanted, room))

    def grow(self, size: int, growth: int, stream: Any) -> Block:
        """A block in a new region, which takes the place of the idle ones."""
        self._replace(self._spare(), growth, stream)
        block = self._take(size)
        assert block is not None
        return block

    def compact(self) -> int:
        """Replace the idle regions by one of their size; how many there were."""
        spare = self._spare()
        if len(spare) > 1:
            stream = self.backing.stream(self.device, None) if self.backing.ordered(self.device) else None
            self._replace(spare, 0, stream)
            return len(spare)
        return 0

    def _replace(self, regions: list[_Region], growth: int, stream: Any) -> None:
        size = growth
        self._join_all()
        for region in regions:
            size += self._discard(region)
        if not size:
            return
        memory = Memory(self.backing.allocate(size, self.device, stream))
        self._number += 1
        region = self._regions[self._number] = _Region(memory, self._number)
        region.returned = max((one.returned for one in regions), default=0)
        self.held += size
        # PyTorch gave the memory in the order of this stream; users on other streams have to wait for it.
        self._insert(region, 0, size, (self.backing.fence(stream),) if self.device.type == "cuda" else ())

    def _discard(self, region: _Region) -> int:
        _, fences = self._remove(region, 0)
        del self._regions[region.number]
        self.held -= region.memory.size
        self.backing.discard(region.memory.bytes, fences)
        return region.memory.size

    def _oldest(self) -> _Region | None:
        idle = (region for region in self._regions.values() if not region.leased)
        return min(idle, key=lambda region: region.returned, default=None)

    def oldest(self) -> int | None:
        """When the idle region was used last that nobody has used for longest."""
        region = self._oldest()
        return None if region is None else region.returned

    def drop(self) -> tuple[int, bool]:
        """The idle region that nobody has used for longest."""
        region = self._oldest()
        if region is None:
            return 0, False
        self._join_all()
        return self._discard(region), True

    def idle(self) -> Iterator[int]:
        """Idle extents, joined."""
        self._join_all()
        for size, _, _ in self._idle:
            yield size
