"""Old memory pools: tensors handed out and taken back, over the leases of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..memory import Lease, MemoryPool, create_memory_pool
from .arguments import bind
from .table import OldName

_MEBIBYTE = 1 << 20


class OldPool:
    """An old pool over `create_memory_pool`, one for each device: a tensor is on loan until it is given back."""

    entry: ClassVar[OldName]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bind(self.entry, args, kwargs)
        size = given.take("max_pool_size_mb")
        self.budget = size * _MEBIBYTE if size else None
        self.device = torch.device(given.take("device", "cpu"))
        self.replacements: dict[str, MemoryPool] = {}
        self._leases: dict[int, Lease] = {}

    def get_buffer(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """A tensor of undefined content; further old arguments (names, pinning) have no meaning."""
        where = str(self.device if device is None else torch.device(device))
        if where not in self.replacements:
            self.replacements[where] = create_memory_pool("simple", device=where, budget=self.budget)
        lease = self.replacements[where].acquire(tuple(shape), dtype, where)
        self._leases[id(lease.tensor)] = lease
        return lease.tensor

    allocate = get_buffer

    def return_buffer(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        """Give a tensor back.

        Raises:
            ValueError: a tensor that is not on loan from this pool.
        """
        lease = self._leases.pop(id(tensor), None)
        if lease is None:
            raise ValueError("the tensor is not on loan from this pool; give back the very tensor that it handed out")
        lease.release()

    deallocate = return_buffer

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Give up what is not on loan."""
        for pool in self.replacements.values():
            pool.trim()

    clear_pool = clear_unused_buffers = reset = defragment_all = clear

    def get_stats(self) -> dict[str, Any]:
        """The `PoolStats` of every device."""
        return {where: pool.stats() for where, pool in self.replacements.items()}
