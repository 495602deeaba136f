"""Where pools get memory from, and the order of work on GPU streams that reuse has to keep."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Fence(NamedTuple):
    """The end of somebody's work on a piece of memory."""

    stream: Any
    event: Any


class Backing(Protocol):
    """What pools ask of the machine; tests give one without a GPU."""

    notes: tuple[str, ...]
    """What it cannot do as asked, and why."""

    def allocate(self, size: int, device: torch.device, stream: Any) -> Tensor:
        """(size,) uint8 for use on ``stream``."""

    def ordered(self, device: torch.device) -> bool:
        """Whether work on memory of a device goes on after a call returned, so that the next user has to wait."""

    def stream(self, device: torch.device, given: Any) -> Any:
        """The stream that a lease is used on: the given one, or the current one."""

    def fence(self, stream: Any) -> Fence:
        """The end of the work that ``stream`` has now."""

    def wait(self, fence: Fence, device: torch.device, stream: Any) -> None:
        """Hold the next user, who works on ``stream``, back until the fence is reached."""

    def reached(self, fence: Fence) -> bool:
        """Whether that work is over."""

    def discard(self, memory: Tensor, fences: tuple[Fence, ...]) -> None:
        """Give memory up; PyTorch may hand it out again only after the fences."""


class TorchBacking:
    """Memory from PyTorch's allocators: ordinary, page-locked, or of a `torch.cuda.MemPool`.

    Args:
        pinned: allocate memory of the CPU page-locked; without a CUDA device it is ordinary, which `notes` say.
        mem_pool: take memory of GPUs from this pool. `torch.cuda.use_mem_pool` affects the calling thread alone, so
            that nothing but this pool's memory comes from it.
    """

    def __init__(self, *, pinned: bool = False, mem_pool: Any = None) -> None:
        self.pinned = pinned and torch.cuda.is_available()
        self.mem_pool = mem_pool
        self.notes: tuple[str, ...] = ()
        if pinned and not self.pinned:
            self.notes = ("host memory is pageable: page-locked memory needs a CUDA device",)

    def allocate(self, size: int, device: torch.device, stream: Any) -> Tensor:
        """(size,) uint8 for use on ``stream``; the same in and outside of inference mode."""
        with torch.inference_mode(False):
            if device.type != "cuda":
                return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=self.pinned)
            taken: AbstractContextManager[Any] = nullcontext()
            if self.mem_pool is not None:
                taken = torch.cuda.use_mem_pool(self.mem_pool, device)
            # On the stream of its user: the allocator reuses memory in the order of the stream that it is taken on.
            with torch.cuda.stream(stream), taken:
                return torch.empty(size, dtype=torch.uint8, device=device)

    def ordered(self, device: torch.device) -> bool:
        """On a GPU, and where a GPU reads and writes."""
        return device.type == "cuda" or self.pinned

    def stream(self, device: torch.device, given: Any) -> Any:
        """The given stream, or the current one."""
        if given is not None:
            return given
        return torch.cuda.current_stream(device if device.type == "cuda" else None)

    def fence(self, stream: Any) -> Fence:
        """An event on the stream."""
        return Fence(stream, stream.record_event())

    def wait(self, fence: Fence, device: torch.device, stream: Any) -> None:
        """A GPU's stream waits; for memory of the CPU, which the next user may write at once, the caller does."""
        if device.type != "cuda":
            fence.event.synchronize()
        elif fence.stream != stream:  # work of one stream is in order already
            stream.wait_event(fence.event)

    def reached(self, fence: Fence) -> bool:
        """Whether the event is over."""
        return bool(fence.event.query())

    def discard(self, memory: Tensor, fences: tuple[Fence, ...]) -> None:
        """Tell the allocator of the streams that used the memory (page-locked memory: wait for them)."""
        for fence in fences:
            if memory.is_cuda:
                memory.record_stream(fence.stream)
            else:
                fence.event.synchronize()


def registered_mem_pool(group: Any) -> Any:
    """A `torch.cuda.MemPool` of NCCL's allocator, registered with a process group.

    Messages in registered memory need no copy through NCCL's own buffers. The group must have a communicator already:
    make it with ``device_id=``, or let it communicate once.

    Raises:
        ValueError: the group has no NCCL backend, or one that registers no memory.
    """
    backend = group
    if not hasattr(group, "register_mem_pool"):
        try:
            backend = group._get_backend(torch.device("cuda"))
        except RuntimeError as error:
            raise ValueError(f"the process group has no backend for GPUs ({error}); give one of NCCL") from None
    if not (hasattr(backend, "register_mem_pool") and hasattr(backend, "mem_allocator")):
        raise ValueError(
            f"the backend {type(backend).__name__} registers no memory; give a process group of NCCL, or none"
        )
    mem_pool = torch.cuda.MemPool(backend.mem_allocator)
    backend.register_mem_pool(mem_pool)
    return mem_pool
