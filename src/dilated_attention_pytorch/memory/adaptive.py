"""A pool that rounds, keeps and places memory as its strategies say, watches what recurs, and gives way to pressure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .backing import Backing, TorchBacking
from .blocks import ExactStore, Store
from .leasing import LeasePool, Shop
from .pressure import Room, room
from .strategies import Arena, Bucketing, Fragmentation

CHECK_EVERY = 512
"""Requests of a device between two looks at its pressure; every growth looks too."""


class AdaptivePool(LeasePool):
    """Memory by strategies, given up before a device runs out and taken again when it has room.

    Args:
        budget: most bytes held, leased and idle together; None for no limit.
        bucketing: round sizes up to classes; None for exact sizes.
        fragmentation: cut blocks out of large regions; None for a buffer for each block.
        headroom: share of a device's memory that others shall find free: idle memory is given up, what was not used
            for longest first, when less is left.
        pinned, device, debug, backing: as of `SimplePool`.
        watch: the free and the total bytes of a device; by default what the driver or the system says.

    Raises:
        ValueError: a budget that is no number of bytes, a headroom outside 0 to 1.

    What recurs is what was asked for again after it came back. When memory of that kind was given up under pressure,
    and there is twice the headroom again, it is taken before it is asked for. To start warm, `replay` a trace.

    >>> pool = AdaptivePool(bucketing=Bucketing())
    >>> for rows in (100, 101, 102):
    ...     with pool.acquire((rows,), torch.float32, "cpu") as lease:
    ...         pass
    >>> pool.stats().hits, pool.stats().held
    (2, 448)
    """

    def __init__(
        self,
        *,
        budget: int | None = None,
        bucketing: Bucketing | None = None,
        fragmentation: Fragmentation | None = None,
        headroom: float = 0.05,
        pinned: bool = False,
        device: torch.device | None = None,
        debug: bool = False,
        backing: Backing | None = None,
        watch: Callable[[torch.device], Room | None] = room,
    ) -> None:
        if not 0 <= headroom < 1:
            raise ValueError(f"headroom is {headroom}; give a share from 0 to below 1")
        self.bucketing, self.fragmentation, self.headroom = bucketing, fragmentation, headroom
        self._watch = watch
        self._given_up: dict[torch.device, dict[int, int]] = {}
        """How many blocks of which size were given up under pressure, of sizes that recur."""
        backing = backing or TorchBacking(pinned=pinned)
        make: Callable[[torch.device], Store] = partial(ExactStore, backing=backing)
        if fragmentation is not None:
            make = partial(Arena, backing=backing, options=fragmentation)
        super().__init__(make, backing, budget=budget, device=device, debug=debug, granted=self._round)
        self._requests = 0

    def _round(self, asked: int) -> int:
        self._requests += 1
        if not self._requests % CHECK_EVERY:
            for shop in self._shops.values():
                self._look(shop)
        size = asked if self.bucketing is None else self.bucketing.size(asked)
        return size if self.fragmentation is None else self.fragmentation.size(size)

    def _before_growth(self, shop: Shop, size: int, growth: int) -> None:
        given_up = self._given_up.get(shop.device, {})
        if given_up.get(size):  # it is taken again now
            given_up[size] -= 1
        self._look(shop, growth)

    def _look(self, shop: Shop, growth: int = 0) -> None:
        """Give up idle memory of a device with too little room for ``growth``; take it again where there is much."""
        found = self._watch(shop.device)
        if found is None:
            return
        least, free = self.headroom * found.total, found.free - growth
        given_up = self._given_up.setdefault(shop.device, {})
        while free < least:
            size, reused = self._drop(shop)
            if not size:
                return
            free += size
            if reused:
                given_up[size] = given_up.get(size, 0) + 1
        if growth:
            return
        for size in [size for size, count in given_up.items() for _ in range(count)]:
            room = None if self.budget is None else self.budget - self._held()
            growth = shop.store.growth(size, room)
            if free - growth < 2 * least or (room is not None and growth > room):
                continue
            given_up[size] -= 1
            stream = None if shop.plain else self._backing.stream(shop.device, None)
            try:
                shop.store.put(shop.store.grow(size, growth, stream))
            except (RuntimeError, MemoryError):  # somebody else was quicker; requests will find out for themselves
                return
            free -= growth
            self._note_peak(shop)

    def compact(self) -> int:
        """Join idle regions of every device into one each, with ``fragmentation``; how many were joined."""
        with self._lock:
            stores = [shop.store for shop in self._shops.values()]
            return sum(store.compact() for store in stores if isinstance(store, Arena))
