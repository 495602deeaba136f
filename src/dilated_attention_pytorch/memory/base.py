"""The protocol of a memory pool: leases of tensors over buffers that the pool keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor


class LeaseError(RuntimeError):
    """A lease was returned twice, or its tensor asked for after its return."""


class MemoryBudgetExceeded(RuntimeError):
    """A pool cannot hold another buffer within its budget, not even after trimming."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool holds and has done, in bytes and counts."""

    held: int
    """Bytes of all buffers, leased or idle."""
    leased: int
    """Bytes of the buffers that are leased now."""
    peak: int
    """Most bytes ever held."""
    requests: int
    hits: int
    """Requests that an idle buffer served."""
    trims: int
    """Idle buffers that were given up."""

    @property
    def misses(self) -> int:
        """Requests that took a new buffer."""
        return self.requests - self.hits


class Lease:
    """A tensor on loan; return it once, by `release` or at the end of a ``with`` block.

    The pool may hand its memory to somebody else from then on, so views of the tensor must not outlive it.
    """

    def __init__(self, tensor: Tensor, give_back: Callable[[], None]) -> None:
        self._tensor: Tensor | None = tensor
        self._give_back = give_back

    @property
    def tensor(self) -> Tensor:
        """The tensor, while the lease lasts.

        Raises:
            LeaseError: after the return.
        """
        if self._tensor is None:
            raise LeaseError("the lease was returned; acquire another one")
        return self._tensor

    def release(self) -> None:
        """Return the tensor to its pool.

        Raises:
            LeaseError: the second time.
        """
        if self._tensor is None:
            raise LeaseError("the lease was returned before; return it once")
        self._tensor = None
        self._give_back()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensor is not None:
            self.release()


class MemoryPool(Protocol):
    """What context parallel and streaming ask of a pool; every method may be called from any thread."""

    def acquire(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> Lease: ...

    def stats(self) -> PoolStats: ...

    def trim(self, to_bytes: int = 0) -> int: ...

    def close(self) -> None: ...


def bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize
