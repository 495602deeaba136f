"""A pool that reuses buffers of exactly the size asked for: what recurs step after step is allocated once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Lease, MemoryBudgetExceeded, PoolStats, bytes_of


@dataclass(slots=True)
class _Buffer:
    memory: Tensor
    """(bytes,) uint8."""
    done: torch.cuda.Event | None = None
    """When the last user's work on it ends."""


class SimplePool:
    """Exact-size reuse within a byte budget.

    Args:
        budget: most bytes held, leased and idle together; None for no limit.
        pinned: allocate memory of the CPU page-locked, for copies that overlap with work on a GPU.

    A buffer that was used on a GPU is handed out again at once: the next user's stream waits for the last user's work.

    >>> pool = SimplePool()
    >>> with pool.acquire((2, 3), torch.float32, "cpu") as lease:
    ...     _ = lease.tensor.zero_()
    >>> with pool.acquire((6,), torch.float32, "cpu") as lease:
    ...     pass
    >>> pool.stats().hits, pool.stats().held
    (1, 24)
    """

    def __init__(self, *, budget: int | None = None, pinned: bool = False) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"budget is {budget!r}; give a number of bytes, or None for no limit")
        self.budget, self.pinned = budget, pinned
        self._lock = threading.Lock()
        # Oldest first, so that trimming gives up what has not been used for longest.
        self._idle: OrderedDict[int, tuple[tuple[torch.device, int], _Buffer]] = OrderedDict()
        self._serial = 0
        self._held = self._leased = self._peak = self._requests = self._hits = self._trims = 0
        self._closed = False

    def acquire(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> Lease:
        """Lease a contiguous tensor of undefined content.

        Args:
            shape, dtype, device: of the tensor.
            stream: on which it is used (default: the current one of its device); no effect on the CPU.

        Raises:
            MemoryBudgetExceeded: it does not fit, also after every idle buffer was given up.
            RuntimeError: the pool is closed.
        """
        where, size = _indexed(torch.device(device)), bytes_of(shape, dtype)
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed; make another one")
            self._requests += 1
            buffer = self._take_idle(where, size)
            if buffer is None:
                self._make_room(size)
                self._held += size
            else:
                self._hits += 1
            self._leased += size
            self._peak = max(self._peak, self._held)
        if buffer is None:
            try:
                pinned = self.pinned and where.type == "cpu" and torch.cuda.is_available()
                buffer = _Buffer(torch.empty(size, dtype=torch.uint8, device=where, pin_memory=pinned))
            except BaseException:
                with self._lock:
                    self._held, self._leased = self._held - size, self._leased - size
                raise
        elif buffer.done is not None:
            (stream or torch.cuda.current_stream(where)).wait_event(buffer.done)
        taken = buffer
        return Lease(buffer.memory.view(dtype).view(tuple(shape)), lambda: self._give_back(where, size, taken, stream))

    def _take_idle(self, device: torch.device, size: int) -> _Buffer | None:
        for serial, (kind, buffer) in self._idle.items():
            if kind == (device, size):
                del self._idle[serial]
                return buffer
        return None

    def _make_room(self, size: int) -> None:
        if self.budget is None:
            return
        while self._held + size > self.budget and self._idle:
            self._drop_oldest()
        if self._held + size > self.budget:
            raise MemoryBudgetExceeded(
                f"{size:,} bytes asked for, {self._leased:,} of {self.budget:,} are on loan; return leases first, or "
                "give the pool a larger budget"
            )

    def _drop_oldest(self) -> None:
        _, ((_, size), _) = self._idle.popitem(last=False)
        self._held -= size
        self._trims += 1

    def _give_back(self, device: torch.device, size: int, buffer: _Buffer, stream: torch.cuda.Stream | None) -> None:
        if device.type == "cuda":
            buffer.done = (stream or torch.cuda.current_stream(device)).record_event()
        with self._lock:
            self._leased -= size
            if self._closed:
                self._held -= size
                return
            self._idle[self._serial] = ((device, size), buffer)
            self._serial += 1

    def stats(self) -> PoolStats:
        """What the pool holds and has done."""
        with self._lock:
            return PoolStats(self._held, self._leased, self._peak, self._requests, self._hits, self._trims)

    def trim(self, to_bytes: int = 0) -> int:
        """Give up idle buffers, the oldest first, until at most ``to_bytes`` are held; the bytes given up."""
        with self._lock:
            before = self._held
            while self._held > to_bytes and self._idle:
                self._drop_oldest()
            return before - self._held

    def close(self) -> None:
        """Give up every idle buffer now and the leased ones when they come back; acquire raises from here on."""
        self.trim()
        with self._lock:
            self._closed = True


def _indexed(device: torch.device) -> torch.device:
    """cuda as cuda:0, so that both find the same buffers."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
