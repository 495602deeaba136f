"""The protocol of a memory pool: leases of tensors over memory that the pool keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from .stats import PoolStats

RETURNED_BEFORE = "the lease was returned before; return it once"


class LeaseError(RuntimeError):
    """A lease was returned twice, or its tensor asked for after its return."""


class MemoryBudgetExceeded(RuntimeError):
    """A pool cannot hold what was asked for within its budget, not even after trimming."""


class LeakedLeaseWarning(UserWarning):
    """A pool was closed while leases were out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """A lease that was out when its pool was closed."""

    bytes: int
    device: str
    taken_at: str | None
    """The stack of the call to `acquire`, of a pool with ``debug=True``."""


class Lease:
    """A tensor on loan; return it once, by `release` or at the end of a ``with`` block.

    The pool may hand its memory to somebody else from then on, so views of the tensor must not outlive it.
    """

    __slots__ = ("_give_back", "_tensor")

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
            LeaseError: the second time, from whichever thread.
        """
        if self._tensor is None:
            raise LeaseError(RETURNED_BEFORE)
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
    ) -> Lease:
        """Lease a contiguous tensor of undefined content, to be used on ``stream``."""

    def stats(self) -> PoolStats:
        """What the pool holds and has done."""

    def trim(self, to_bytes: int = 0) -> int:
        """Give up idle memory until at most ``to_bytes`` are held; the bytes given up."""

    def close(self) -> tuple[Leak, ...]:
        """Give up idle memory now and leased memory when it comes back; the leases that are out."""


def bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor.

    >>> bytes_of((2, 3), torch.float32)
    24
    """
    return math.prod(shape) * dtype.itemsize
