"""Copies between host memory and the device that computes: on the CPU at once, on a GPU beside the computation.

Uploads fill a slot (bytes leased for a whole pass) with the rows of several tensors; `Feed` keeps one slot ahead of
the computation. Host memory that is page-locked and contiguous is copied from and to directly, everything else goes
through page-locked staging.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..memory.base import bytes_of

ALIGNMENT = 256

Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass
class Moved:
    """What streaming has done so far."""

    bytes_in: int = 0
    """From host memory to the device."""
    bytes_out: int = 0
    """From the device to host memory."""
    chunks: int = 0
    tiles: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows in host memory, and the contiguous tensor on the device that they go to or come from.

    ``index`` picks entries of the host tensor's first axis; ``add`` adds what comes to what is there.
    """

    host: Tensor
    near: Tensor
    index: Tensor | None = None
    add: bool = False

    def gather(self, place: Tensor) -> None:
        """Host rows to a contiguous tensor on the CPU."""
        if self.index is None:
            place.copy_(self.host)
        else:
            torch.index_select(self.host, 0, self.index, out=place)

    def scatter(self, rows: Tensor) -> None:
        """A tensor on the CPU to the host rows."""
        if self.index is not None:
            self.host.index_add_(0, self.index, rows.to(self.host.dtype))
        elif self.add:
            self.host.add_(rows)
        else:
            self.host.copy_(rows)

    def parts(self, limit: int) -> Iterator[Copy]:
        """The same in pieces of at most ``limit`` bytes, which hold one row of an index."""
        if self.near.nbytes <= limit:
            yield self
        elif len(self.near) == 1:
            yield from Copy(self.host[0], self.near[0], add=self.add).parts(limit)
        else:
            step = max(1, len(self.near) * limit // self.near.nbytes)
            for i in range(0, len(self.near), step):
                part = slice(i, i + step)
                near = self.near[part]
                if self.index is None:
                    yield from Copy(self.host[part], near, add=self.add).parts(limit)
                else:
                    yield from Copy(self.host, near, self.index[part], self.add).parts(limit)


def slot_bytes(specs: Sequence[Spec]) -> int:
    """Bytes of a slot that holds tensors of these shapes and dtypes."""
    return sum(-(-bytes_of(shape, dtype) // ALIGNMENT) * ALIGNMENT for shape, dtype in specs)


def carve(memory: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """Tensors of these shapes and dtypes in a slot."""
    found, start = [], 0
    for shape, dtype in specs:
        size = bytes_of(shape, dtype)
        found.append(memory[start : start + size].view(dtype).view(shape))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return found


@dataclass
class Slot:
    """Bytes on the device, and when the computation that used them last is over."""

    memory: Tensor
    feed: int = 0
    """The number of the feed that fills it; feeds do not wait for each other's copies."""
    free: torch.cuda.Event | None = None

    def give_up(self) -> None:
        """Let go of the bytes, whoever still knows the slot: a feed and what loads its items refer to each other."""
        self.memory = torch.empty(0, dtype=torch.uint8)


class Mover(Protocol):
    """Copies and their order; tokens are None where everything happens at once."""

    depth: int
    """Slots of a feed: 2 where a copy and the computation go on at the same time."""

    def upload(self, copies: Sequence[Copy], slot: Slot) -> torch.cuda.Event | None:
        """Start filling a slot, once it is free."""

    def arrived(self, token: torch.cuda.Event | None) -> None:
        """What is computed from here on may use the upload."""

    def mark(self) -> torch.cuda.Event | None:
        """What has been computed up to here."""

    def download(self, copies: Sequence[Copy]) -> Callable[[], None]:
        """Start copying results to the host; the function that is returned finishes it and is called once."""

    def close(self) -> None:
        """Leave nothing under way."""


class DirectMover:
    """The device is the CPU: copies happen when they are asked for."""

    depth = 1

    def __init__(self, moved: Moved) -> None:
        self.moved = moved

    def upload(self, copies: Sequence[Copy], slot: Slot) -> None:
        for copy in copies:
            copy.gather(copy.near)
            self.moved.bytes_in += copy.near.nbytes

    def arrived(self, token: torch.cuda.Event | None) -> None:
        """It has."""

    def mark(self) -> None:
        return None

    def download(self, copies: Sequence[Copy]) -> Callable[[], None]:
        for copy in copies:
            copy.scatter(copy.near)
            self.moved.bytes_out += copy.near.nbytes
        return lambda: None

    def close(self) -> None:
        """Nothing is under way."""


Item = TypeVar("Item")
Load = Callable[[Item, Tensor], tuple[list[Tensor], list[Copy]]]


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Item]):
    """An item of a feed: its tensors on the device, in a slot that `Feed.done` gives back."""

    item: Item
    tensors: list[Tensor]
    slot: Slot


class Feed(Generic[Item]):
    """Items in order, each uploaded ahead of its use as long as there are free slots.

    ``load`` says for an item and the memory of a slot which tensors it has there, and the copies that fill them.
    """

    def __init__(self, mover: Mover, slots: Sequence[Slot], items: Iterator[Item], load: Load[Item]) -> None:
        self._mover, self._idle, self._items, self._load = mover, deque(slots), items, load
        self._ready: deque[tuple[Loaded[Item], torch.cuda.Event | None]] = deque()
        self._next = next(items, None)

    def peek(self) -> Item | None:
        """The item that `take` gives next, or None."""
        return self._ready[0][0].item if self._ready else self._next

    def ahead(self) -> None:
        """Start what free slots can hold."""
        while self._idle and self._next is not None:
            item, slot = self._next, self._idle.popleft()
            tensors, copies = self._load(item, slot.memory)
            token = self._mover.upload(copies, slot)
            self._ready.append((Loaded(item, tensors, slot), token))
            self._next = next(self._items, None)

    def take(self) -> Loaded[Item]:
        """The next item, ready for what is computed from here on."""
        if not self._ready:
            self.ahead()
        loaded, token = self._ready.popleft()
        self._mover.arrived(token)
        return loaded

    def done(self, loaded: Loaded[Item]) -> None:
        """Nothing that is computed from here on uses the item."""
        loaded.slot.free = self._mover.mark()
        self._idle.append(loaded.slot)
