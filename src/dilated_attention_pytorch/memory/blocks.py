"""Blocks of memory, and the store that keeps idle ones by exact size."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from .backing import Backing, Fence

_VIEWS = 1024
"""Views kept of one piece of memory: what recurs is found, what varies does not pile up."""


class Memory:
    """A piece of memory from PyTorch."""

    __slots__ = ("bytes", "size", "views")

    def __init__(self, memory: Tensor) -> None:
        self.bytes = memory
        """(size,) uint8."""
        self.size = memory.numel()
        self.views: dict[Any, Tensor] = {}

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor over bytes from ``offset`` on, which must suit the dtype.

        It is detached, so that writing a tensor that requires gradients into it leaves no trace on the memory.
        """
        key = offset, shape, dtype
        if (found := self.views.get(key)) is None:
            with torch.inference_mode(False):  # what inference mode makes cannot be used outside of it
                found = self._view(offset, shape, dtype)
            if len(self.views) >= _VIEWS:
                self.views.clear()
            self.views[key] = found
        return found.detach()

    def _view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = self.views.get(dtype)
        if whole is None:
            whole = self.views[dtype] = self.bytes[: self.size // dtype.itemsize * dtype.itemsize].view(dtype)
        strides = tuple(accumulate(shape[:0:-1], lambda step, n: step * n, initial=1))[::-1] if shape else ()
        return whole.as_strided(shape, strides, offset // dtype.itemsize)


class Block:
    """A part of a piece of memory, leased or idle."""

    __slots__ = ("asked", "fences", "home", "memory", "offset", "returned", "reused", "size", "stack", "stream")

    def __init__(
        self, memory: Memory, offset: int, size: int, fences: tuple[Fence, ...] = (), *, home: int = 0
    ) -> None:
        self.memory, self.offset, self.size, self.home = memory, offset, size, home
        self.fences = fences
        """What the next user has to wait for."""
        self.returned = 0
        """When it came back last: a number that grows with every return to the pool."""
        self.reused = False
        # Of the lease that it is on:
        self.asked = 0
        self.stream: Any = None
        self.stack: str | None = None


class Store(Protocol):
    """Keeps memory of one device; the pool calls it under its lock."""

    held: int
    """Bytes kept or on loan."""

    def take(self, size: int) -> Block | None:
        """An idle block of ``size`` bytes, if new memory is not the better answer."""

    def growth(self, size: int, room: int | None) -> int:
        """Bytes by which `grow` would grow for a request, given that ``room`` more may be held."""

    def grow(self, size: int, growth: int, stream: Any) -> Block:
        """A block of ``size`` bytes in new memory; ``growth`` more bytes are held after."""

    def put(self, block: Block) -> None:
        """Take a block back."""

    def oldest(self) -> int | None:
        """When the memory that `drop` would give up came back; None if there is none."""

    def drop(self) -> tuple[int, bool]:
        """Give up the piece of idle memory that was not used for longest.

        Returns:
            its bytes, 0 for none, and whether it was used more than once.
        """

    def idle(self) -> Iterator[int]:
        """Bytes of every idle block."""


class ExactStore:
    """A piece of memory for every block, found again by exactly its size."""

    def __init__(self, device: torch.device, backing: Backing) -> None:
        self.device, self.backing = device, backing
        self.held = 0
        # Oldest first; a size whose blocks are all on loan has an empty shelf.
        self._shelves: dict[int, deque[Block]] = {}

    def take(self, size: int) -> Block | None:
        """The oldest idle block of the size: its last user's work is the likeliest to be over."""
        shelf = self._shelves.get(size)
        if not shelf:
            return None
        block = shelf.popleft()
        block.reused = True
        return block

    def growth(self, size: int, room: int | None) -> int:
        """As many as asked for."""
        return size

    def grow(self, size: int, growth: int, stream: Any) -> Block:
        """New memory of exactly the size."""
        block = Block(Memory(self.backing.allocate(size, self.device, stream)), 0, size)
        self.held += size
        return block

    def put(self, block: Block) -> None:
        """Onto its shelf."""
        shelf = self._shelves.get(block.size)
        if shelf is None:
            shelf = self._shelves[block.size] = deque()
        shelf.append(block)

    def _oldest(self) -> Block | None:
        return min((shelf[0] for shelf in self._shelves.values() if shelf), key=lambda b: b.returned, default=None)

    def oldest(self) -> int | None:
        """When the block came back that nobody has used for longest."""
        block = self._oldest()
        return None if block is None else block.returned

    def drop(self) -> tuple[int, bool]:
        """The block that nobody has used for longest."""
        block = self._oldest()
        if block is None:
            return 0, False
        shelf = self._shelves[block.size]
        shelf.popleft()
        if not shelf:
            del self._shelves[block.size]
        self.held -= block.size
        self.backing.discard(block.memory.bytes, block.fences)
        return block.size, block.reused

    def idle(self) -> Iterator[int]:
        """Blocks on shelves."""
        for shelf in self._shelves.values():
            for block in shelf:
                yield block.size
