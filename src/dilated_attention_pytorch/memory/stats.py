"""What a pool holds and has done, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes and counts of a pool, of one of its devices, or of one range of sizes.

    >>> usage = Usage(held=1000, leased=600, asked=450, idle_largest=300, requests=5, hits=3)
    >>> usage.idle, usage.misses, usage.internal_fragmentation, usage.external_fragmentation
    (400, 2, 0.25, 0.25)
    """

    held: int = 0
    """Bytes that the pool has from PyTorch, leased or idle."""
    leased: int = 0
    """Bytes of the blocks that are on loan now."""
    asked: int = 0
    """Bytes that were asked for, of the blocks on loan now; blocks may be larger."""
    peak: int = 0
    """Most bytes ever held."""
    idle_largest: int = 0
    """Bytes of the largest idle block: the largest request that needs no new memory (summed over devices)."""
    requests: int = 0
    hits: int = 0
    """Requests that were served without new memory from PyTorch."""
    trims: int = 0
    """Pieces of memory that were given up."""

    @property
    def idle(self) -> int:
        """Bytes held and not on loan."""
        return self.held - self.leased

    @property
    def misses(self) -> int:
        """Requests that took new memory from PyTorch."""
        return self.requests - self.hits

    @property
    def internal_fragmentation(self) -> float:
        """Share of the bytes on loan that nobody asked for; 0 when nothing is on loan."""
        return 1 - self.asked / self.leased if self.leased else 0.0

    @property
    def external_fragmentation(self) -> float:
        """Share of the idle bytes that lie outside the largest idle block; 0 when nothing is idle."""
        return 1 - self.idle_largest / self.idle if self.idle else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats(Usage):
    """`Usage` of a whole pool, with its parts."""

    devices: Mapping[str, Usage] = field(default_factory=dict)
    """By device, ``"cpu"`` or ``"cuda:0"``."""
    buckets: Mapping[int, Usage] = field(default_factory=dict)
    """By size: the entry ``n``, a power of two, is of blocks with more than n / 2 and at most n bytes. Peak and trims
    are not kept by size."""
    notes: tuple[str, ...] = ()
    """What the pool could not do as asked, and why; for instance, that host memory is pageable."""
