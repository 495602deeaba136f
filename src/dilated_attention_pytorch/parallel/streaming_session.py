"""The leases of one pass over the chunks, and the copies on a GPU, which go on beside the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import MemoryPool
from .streaming_transfer import Copy, DirectMover, Moved, Mover, Slot

STAGE_BYTES = 64 << 20


@dataclass
class _Stage:
    """Page-locked bytes, and when the copy that used them last is over."""

    memory: Tensor
    busy: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """Its memory, once no copy uses it."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None
        return self.memory


class CudaMover:
    """The device is a GPU: a stream for the uploads of each feed, one for downloads, beside the current one, which
    computes. Tiles are small and wanted at once; on one stream they would wait behind a chunk that is not.
    """

    depth = 2

    def __init__(self, device: torch.device, moved: Moved, stages: Sequence[Tensor], feeds: int) -> None:
        self.moved, self.compute = moved, torch.cuda.current_stream(device)
        self.inward, self.outward = [torch.cuda.Stream(device) for _ in range(feeds)], torch.cuda.Stream(device)
        for stream in self.inward:  # slots may hold what somebody else's work still reads
            stream.wait_stream(self.compute)
        half = len(stages) // 2
        self._up, self._down = (deque(map(_Stage, part)) for part in (stages[:half], stages[half:]))

    def upload(self, copies: Sequence[Copy], slot: Slot) -> torch.cuda.Event:
        inward = self.inward[slot.feed]
        if slot.free is not None:
            inward.wait_event(slot.free)
        base, begin, end = slot.memory.data_ptr(), 0, 0  # bytes of the slot that the current stage holds
        stage = self._up[0]

        def flush() -> None:
            nonlocal begin
            if end > begin:
                slot.memory[begin:end].copy_(stage.memory[: end - begin], non_blocking=True)
                stage.busy = inward.record_event()
                self._up.rotate(-1)
            begin = end

        with torch.cuda.stream(inward):
            for whole in copies:
                self.moved.bytes_in += whole.near.nbytes
                if whole.index is None and whole.host.is_contiguous() and whole.host.is_pinned():
                    flush()
                    whole.near.copy_(whole.host, non_blocking=True)
                    begin = end = whole.near.data_ptr() - base + whole.near.nbytes
                    continue
                for copy in whole.parts(stage.memory.numel()):
                    start, size = copy.near.data_ptr() - base, copy.near.nbytes
                    if end == begin or start + size - begin > stage.memory.numel():
                        flush()
                        begin, stage = start, self._up[0]
                        stage.wait()
                    place = stage.memory[start - begin : start - begin + size]
                    copy.gather(place.view(copy.near.dtype).view(copy.near.shape))
                    end = start + size
            flush()
        return inward.record_event()

    def arrived(self, token: torch.cuda.Event | None) -> None:
        if token is not None:
            self.compute.wait_event(token)

    def mark(self) -> torch.cuda.Event:
        return self.compute.record_event()

    def download(self, copies: Sequence[Copy]) -> Callable[[], None]:
        self.outward.wait_event(self.mark())
        staged = []
        with torch.cuda.stream(self.outward):
            for copy in copies:
                self.moved.bytes_out += copy.near.nbytes
                copy.near.record_stream(self.outward)
                direct = copy.index is None and not copy.add and copy.host.is_contiguous() and copy.host.is_pinned()
                if direct:
                    copy.host.copy_(copy.near, non_blocking=True)
                else:
                    staged.append(copy)
        done = self.outward.record_event()

        def finish() -> None:
            waiting: Callable[[], None] | None = None
            for copy in staged:
                for part in copy.parts(self._down[0].memory.numel()):
                    arriving = self._start(part)
                    if waiting is not None:
                        waiting()
                    waiting = arriving
            if waiting is not None:
                waiting()
            done.synchronize()

        return finish

    def _start(self, copy: Copy) -> Callable[[], None]:
        """Start one piece of a download; the function that is returned waits for it and puts it in its place."""
        stage = self._down[0]
        self._down.rotate(-1)
        place = stage.wait()[: copy.near.nbytes].view(copy.near.dtype).view(copy.near.shape)
        with torch.cuda.stream(self.outward):
            place.copy_(copy.near, non_blocking=True)
        stage.busy = self.outward.record_event()

        def finish() -> None:
            stage.wait()
            copy.scatter(place)

        return finish

    def close(self) -> None:
        for stream in self.inward:
            self.compute.wait_stream(stream)
            stream.synchronize()
        self.outward.synchronize()


class Session(AbstractContextManager["Session"]):
    """The leases of one pass and the mover over them; at the end, or after an error, every lease is returned."""

    def __init__(self, device: torch.device, pool: MemoryPool, staging: MemoryPool, moved: Moved) -> None:
        self.device, self.pool, self.staging, self.moved = device, pool, staging, moved
        self._stack = ExitStack()
        self._slots: list[Slot] = []
        self.mover: Mover = DirectMover(moved)

    def __enter__(self) -> Session:
        if self.device.type == "cuda":
            self._stack.enter_context(torch.cuda.device(self.device))
        return self

    def _lease(self, pool: MemoryPool, size: int, device: torch.device) -> Tensor:
        return self._stack.enter_context(pool.acquire((size,), torch.uint8, device)).tensor

    def start(self, *sizes: int, largest: int) -> list[list[Slot]]:
        """The slots of each feed, of these many bytes each; no copy is larger than ``largest`` bytes."""
        depth = slots_of_a_feed(self.device)
        rows = [[self._lease(self.pool, size, self.device) for _ in range(depth)] for size in sizes]
        self.mover = self._mover(largest, len(sizes))
        self._stack.callback(self.mover.close)  # before the leases go back
        found = [[Slot(memory, number) for memory in row] for number, row in enumerate(rows)]
        self._slots = [slot for feed in found for slot in feed]
        return found

    def _mover(self, largest: int, feeds: int) -> Mover:
        if self.device.type != "cuda":
            return DirectMover(self.moved)
        size = min(STAGE_BYTES, largest)
        stages = [self._lease(self.staging, size, torch.device("cpu")) for _ in range(4)]
        return CudaMover(self.device, self.moved, stages, feeds)

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(None, None, None)
        for slot in self._slots:
            slot.give_up()


def slots_of_a_feed(device: torch.device) -> int:
    """Slots of a feed on this device."""
    return CudaMover.depth if device.type == "cuda" else DirectMover.depth
