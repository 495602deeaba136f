"""What every pool does: leases, budget, books. What it keeps, and how, is its stores' part."""

from __future__ import annotations

import math
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backing import Backing, Fence
from .base import RETURNED_BEFORE, Leak, LeakedLeaseWarning, Lease, LeaseError, MemoryBudgetExceeded
from .blocks import Block, Store
from .stats import PoolStats, Usage

_SIZES = 64  # powers of two


class Shop:
    """What a pool has on one device."""

    __slots__ = ("device", "hits", "leased", "loans", "peak", "plain", "requests", "store", "trims")

    def __init__(self, device: torch.device, store: Store, *, plain: bool) -> None:
        self.device, self.store = device, store
        self.plain = plain
        """Work on its memory is over when a call returns: nothing waits for streams."""
        self.loans: dict[int, Block] = {}
        self.leased = self.peak = self.trims = 0
        # By power of two of the size.
        self.requests, self.hits = [0] * _SIZES, [0] * _SIZES

    def usage(self) -> tuple[Usage, dict[int, Usage]]:
        """All of it, and by size."""
        sizes: dict[int, dict[str, int]] = {}
        for n, requests in enumerate(self.requests):
            if requests:
                sizes[n] = {"requests": requests, "hits": self.hits[n]}
        for block in self.loans.values():
            _add(sizes.setdefault(power(block.size), {}), held=block.size, leased=block.size, asked=block.asked)
        for size in self.store.idle():
            found = sizes.setdefault(power(size), {})
            _add(found, held=size)
            found["idle_largest"] = max(found.get("idle_largest", 0), size)
        total: dict[str, int] = {"peak": self.peak, "trims": self.trims}
        for found in sizes.values():
            _add(total, **{name: amount for name, amount in found.items() if name != "idle_largest"})
        total["idle_largest"] = max((found.get("idle_largest", 0) for found in sizes.values()), default=0)
        return Usage(**total), {1 << n: Usage(**found) for n, found in sizes.items()}


def _add(found: dict[str, int], **amounts: int) -> None:
    for name, amount in amounts.items():
        found[name] = found.get(name, 0) + amount


def power(size: int) -> int:
    """n for a size above 2^(n - 1) and up to 2^n bytes."""
    return (size - 1).bit_length()


def total(usages: Iterable[Usage], *, peak: int = 0) -> dict[str, int]:
    """Sums of what can be summed."""
    names = ("held", "leased", "asked", "idle_largest", "requests", "hits", "trims")
    found = dict.fromkeys(names, 0)
    for usage in usages:
        _add(found, **{name: getattr(usage, name) for name in names})
    return {**found, "peak": peak}


class PooledLease(Lease):
    """A lease that says itself where it goes back to, which is quicker than a closure."""

    __slots__ = ("_pool", "_serial", "_shop")

    def __init__(self, tensor: Tensor, pool: LeasePool, shop: Shop, serial: int) -> None:
        self._tensor = tensor
        self._pool, self._shop, self._serial = pool, shop, serial

    def release(self) -> None:
        """Return the tensor to its pool.

        Raises:
            LeaseError: the second time, from whichever thread.
        """
        if self._tensor is None:
            raise LeaseError(RETURNED_BEFORE)
        self._tensor = None
        self._pool.give_back(self._shop, self._serial)


class LeasePool:
    """Leases of blocks of stores, within a byte budget; every method may be called from any thread."""

    def __init__(
        self,
        make_store: Callable[[torch.device], Store],
        backing: Backing,
        *,
        budget: int | None,
        device: torch.device | None,
        debug: bool,
        granted: Callable[[int], int] | None = None,
    ) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"budget is {budget!r}; give a number of bytes, or None for no limit")
        self.budget, self.device, self.debug = budget, device, debug
        self._make_store, self._backing = make_store, backing
        self._granted = granted
        """Bytes of the block for a request, where that is not what is asked for."""
        self._lock = threading.Lock()
        self._shops: dict[torch.device, Shop] = {}
        self._named: dict[torch.device | str, Shop] = {}
        self._serial = self._peak = 0
        self._closed = False

    def acquire(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> Lease:
        """Lease a contiguous tensor of undefined content, without gradients.

        Args:
            shape, dtype, device: of the tensor.
            stream: on which it is used (default: the current one); no effect on ordinary memory of the CPU. The stream
                waits for the last user's work; for page-locked memory, which the caller may write, the caller waits.

        Raises:
            MemoryBudgetExceeded: it does not fit, also after idle memory was given up.
            ValueError: the pool is for another device.
            RuntimeError: the pool is closed.
        """
        shop, shape = self._named.get(device) or self._shop(device), tuple(shape)
        asked = math.prod(shape) * dtype.itemsize
        if not asked:
            return Lease(torch.empty(shape, dtype=dtype, device=shop.device), _nothing)
        used_on = None if shop.plain else self._backing.stream(shop.device, stream)
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed; make another one")
            size = asked if self._granted is None else self._granted(asked)
            kind = (size - 1).bit_length()
            shop.requests[kind] += 1
            block = shop.store.take(size)
            if block is None:
                block = self._grow(shop, size, asked, used_on)
            else:
                shop.hits[kind] += 1
            shop.leased += block.size
            self._serial = serial = self._serial + 1
            block.asked, block.stream = asked, used_on
            block.stack = "".join(traceback.format_stack(limit=12)[:-1]) if self.debug else None
            shop.loans[serial] = block
        try:
            for fence in block.fences:
                self._backing.wait(fence, shop.device, used_on)
            tensor = block.memory.view(block.offset, shape, dtype)
        except BaseException:  # nobody holds the lease, so it ends here; the next user waits for the same work
            with self._lock:
                del shop.loans[serial]
                self._take_back(shop, block)
            raise
        return PooledLease(tensor, self, shop, serial)

    def _before_growth(self, shop: Shop, size: int, growth: int) -> None:
        """``growth`` bytes of new memory are about to be taken for a block of ``size``."""

    def _shop(self, device: torch.device | str) -> Shop:
        place = torch.device(device)
        current = place.type == "cuda" and place.index is None
        if current:  # so that both names find the same memory
            place = torch.device("cuda", torch.cuda.current_device())
        if self.device is not None and place.type != "cpu" and place != self.device:
            raise ValueError(f"device is {place}; this pool is for {self.device} and cpu: make another one for {place}")
        with self._lock:
            shop = self._shops.get(place)
            if shop is None:
                shop = self._shops[place] = Shop(place, self._make_store(place), plain=not self._backing.ordered(place))
            if not current:
                self._named[device] = shop
        return shop

    def _held(self) -> int:
        return sum(shop.store.held for shop in self._shops.values())

    def _grow(self, shop: Shop, size: int, asked: int, stream: Any) -> Block:
        """New memory within the budget; a block of exactly what was asked for where a larger one does not fit."""
        for wanted in (size, asked) if size != asked else (size,):
            growth = self._growth(shop, wanted)
            if growth is None:
                continue
            self._before_growth(shop, wanted, growth)
            try:
                return shop.store.grow(wanted, self._growth(shop, wanted) or 0, stream)
            except (RuntimeError, MemoryError):
                # Idle memory of ours may be what the allocator lacks.
                if not self._drop_all(shop):
                    raise
                return shop.store.grow(wanted, self._growth(shop, wanted) or 0, stream)
            finally:
                self._note_peak(shop)
        leased, held = sum(one.leased for one in self._shops.values()), self._held()
        raise MemoryBudgetExceeded(
            f"{asked:,} bytes asked for, {leased:,} of {self.budget:,} are on loan"
            + (f" in {held:,} that cannot be given up" if held > leased else "")
            + "; return leases first, or give the pool a larger budget"
        )

    def _note_peak(self, shop: Shop) -> None:
        shop.peak = max(shop.peak, shop.store.held)
        self._peak = max(self._peak, self._held())

    def _growth(self, shop: Shop, size: int) -> int | None:
        """Bytes to grow by for a request, for which idle memory is given up; None where that is not enough."""
        while True:
            room = None if self.budget is None else self.budget - self._held()
            growth = shop.store.growth(size, room)
            if room is None or growth <= room:
                return growth
            if not self._drop()[0]:
                return None

    def _drop(self, shop: Shop | None = None) -> tuple[int, bool]:
        """Give up a piece of idle memory: of a device, or what was not used for longest of all. See `Store.drop`."""
        if shop is None:
            ages = [(age, n) for n, one in enumerate(self._shops.values()) if (age := one.store.oldest()) is not None]
            if not ages:
                return 0, False
            shop = list(self._shops.values())[min(ages)[1]]
        size, reused = shop.store.drop()
        shop.trims += size > 0
        return size, reused

    def _drop_all(self, shop: Shop | None = None) -> int:
        dropped = 0
        while size := self._drop(shop)[0]:
            dropped += size
        return dropped

    def give_back(self, shop: Shop, serial: int) -> None:
        """End a lease."""
        fences: tuple[Fence, ...] = ()
        if not shop.plain and (block := shop.loans.get(serial)) is not None:
            here, stream = self._backing.stream(shop.device, None), block.stream
            fences = tuple(map(self._backing.fence, (stream,) if here == stream else (stream, here)))
        with self._lock:
            block = shop.loans.pop(serial, None)
            if block is None:  # another thread was here first
                raise LeaseError(RETURNED_BEFORE)
            block.fences = fences  # what the last user waited for comes before what it did
            self._take_back(shop, block)

    def _take_back(self, shop: Shop, block: Block) -> None:
        self._serial = block.returned = self._serial + 1
        shop.leased -= block.size
        shop.store.put(block)
        if self._closed:
            self._drop_all()

    def stats(self) -> PoolStats:
        """What the pool holds and has done."""
        with self._lock:
            found = {str(shop.device): shop.usage() for shop in self._shops.values()}
            peak = self._peak
        sizes = sorted({size for _, buckets in found.values() for size in buckets})
        return PoolStats(
            **total((usage for usage, _ in found.values()), peak=peak),
            devices={name: usage for name, (usage, _) in found.items()},
            buckets={
                size: Usage(**total(buckets[size] for _, buckets in found.values() if size in buckets))
                for size in sizes
            },
            notes=self._backing.notes,
        )

    def trim(self, to_bytes: int = 0) -> int:
        """Give up idle memory, what was not used for longest first, until at most ``to_bytes`` are held.

        Returns:
            the bytes given up.
        """
        with self._lock:
            before = self._held()
            while self._held() > to_bytes and self._drop()[0]:
                pass
            return before - self._held()

    def close(self) -> tuple[Leak, ...]:
        """Give up idle memory now and leased memory when it comes back; `acquire` raises from here on.

        Returns:
            the leases that are out, of which it also warns; with where they were taken, if the pool has
            ``debug=True``.
        """
        with self._lock:
            self._closed = True
            self._drop_all()
            leaks = tuple(
                Leak(bytes=block.asked, device=str(shop.device), taken_at=block.stack)
                for shop in self._shops.values()
                for block in shop.loans.values()
            )
        if leaks:
            size = sum(leak.bytes for leak in leaks)
            places = "".join(f"\n{leak.bytes:,} bytes, taken at:\n{leak.taken_at}" for leak in leaks if leak.taken_at)
            hint = places or "; make the pool with debug=True to see where they were taken"
            warnings.warn(
                f"the pool was closed while {len(leaks)} leases of {size:,} bytes were out{hint}",
                LeakedLeaseWarning,
                stacklevel=2,
            )
        return leaks


def _nothing() -> None:
    """A tensor without bytes goes back to nobody."""
