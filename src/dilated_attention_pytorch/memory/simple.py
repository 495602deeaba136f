"""A pool that reuses buffers of exactly the size asked for: what recurs step after step is allocated once."""

from __future__ import annotations

from functools import partial

import torch

from .backing import Backing, TorchBacking
from .blocks import ExactStore
from .leasing import LeasePool


class SimplePool(LeasePool):
    """Exact-size reuse within a byte budget.

    Args:
        budget: most bytes held, leased and idle together; None for no limit.
        pinned: allocate memory of the CPU page-locked, for copies that overlap with work on a GPU.
        device: the device that it serves, besides the CPU; None for any.
        debug: remember where leases are taken, for `close`; costs some 40 microseconds a lease.
        backing: where memory comes from; by default PyTorch's allocators.

    Raises:
        ValueError: a budget that is no number of bytes.

    A buffer that was used on a GPU is handed out again at once: the next user's stream waits for the last user's work.

    >>> pool = SimplePool()
    >>> with pool.acquire((2, 3), torch.float32, "cpu") as lease:
    ...     _ = lease.tensor.zero_()
    >>> with pool.acquire((6,), torch.float32, "cpu") as lease:
    ...     pass
    >>> pool.stats().hits, pool.stats().held
    (1, 24)
    """

    def __init__(
        self,
        *,
        budget: int | None = None,
        pinned: bool = False,
        device: torch.device | None = None,
        debug: bool = False,
        backing: Backing | None = None,
    ) -> None:
        backing = backing or TorchBacking(pinned=pinned)
        super().__init__(partial(ExactStore, backing=backing), backing, budget=budget, device=device, debug=debug)
