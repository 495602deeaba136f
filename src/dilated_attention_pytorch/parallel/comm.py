"""Messages between ranks: one all-to-all whose splits are what each pair needs, as bytes, counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory import Lease, MemoryPool
from .errors import is_out_of_memory
from .watch import Watch, watch_of

_GRACE = 1.0
"""Seconds that an exchange which nobody wants any more gets to end."""


@dataclass
class Traffic:
    """What a rank has sent so far."""

    bytes_sent: int = 0
    messages_sent: int = 0
    retries: int = 0
    """Computations that ran out of memory and were begun again in smaller parts."""


@dataclass
class Pending:
    """An exchange under way; `wait` gives what each peer sent."""

    received: dict[int, Tensor]
    operation: Operation | None
    sent: Tensor | None
    """Must live until the exchange is over."""
    lease: Lease | None

    def wait(self) -> dict[int, Tensor]:
        """Block until all has arrived (on a GPU: until the stream may use it).

        Raises:
            PeerFailed: a rank failed; what this rank was to get from it never comes.
        """
        if self.operation is not None:
            self.operation.wait()
            self.operation, self.sent = None, None
        return self.received

    def release(self) -> None:
        """Return the receive buffer; what `wait` gave must not be used after."""
        self.received = {}
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def drop(self) -> None:
        """After an error: return the buffer, if it is not returned, once nothing is written into it any more.

        Where the exchange does not end (a rank failed), the buffer stays on loan: who got it next would find rows that
        arrive late.
        """
        if self.operation is None or self.operation.over(within=_GRACE):
            self.release()


def exchange(
    group: dist.ProcessGroup,
    outgoing: dict[int, Tensor],
    incoming: dict[int, int],
    device: torch.device,
    traffic: Traffic,
    pool: MemoryPool,
) -> Pending:
    """Send ``outgoing[peer]`` (1-D, any dtype) to each peer and receive ``incoming[peer]`` bytes from each.

    Every rank of the group has to call it at the same point, also with nothing to say. Peers are ranks in the group;
    the receive buffer comes from ``pool``, on ``device``, and is the caller's until `Pending.release`.

    Raises:
        PeerFailed: a rank has failed.
    """
    world = dist.get_world_size(group)
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    parts = [outgoing[peer].view(torch.uint8) if peer in outgoing else nothing for peer in range(world)]
    sent, splits = [part.numel() for part in parts], [incoming.get(peer, 0) for peer in range(world)]
    single = [part for part in parts if part.numel()]
    send = single[0] if len(single) == 1 else torch.cat(parts)
    lease = _acquire(pool, sum(splits), device, traffic)
    receive = lease.tensor
    try:
        operation = Operation(
            group, device, lambda: dist.all_to_all_single(receive, send, splits, sent, group=group, async_op=True)
        )
    except BaseException:  # it has not begun
        lease.release()
        raise
    traffic.bytes_sent += sum(sent)
    traffic.messages_sent += len(single)
    received = dict(zip(range(world), receive.split(splits), strict=True))
    return Pending({peer: received[peer] for peer in incoming}, operation, send, lease)


def free_idle(pool: MemoryPool) -> int:
    """Give idle memory back to the device, the pool's and then PyTorch's; the bytes that the pool gave."""
    freed = pool.trim()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return freed


def _acquire(pool: MemoryPool, size: int, device: torch.device, traffic: Traffic) -> Lease:
    try:
        return pool.acquire((size,), torch.uint8, device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    free_idle(pool)
    traffic.retries += 1
    return pool.acquire((size,), torch.uint8, device)


class Operation:
    """A collective operation of a group under way, which ends with `wait`, or with PeerFailed when a rank fails.

    On the CPU the ranks first tell each other where they are, in 32 bytes: gloo ends a process that is sent more than
    it asked for, so a rank that has skipped an operation has to be found before it takes part in the next one.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, launch: Callable[[], dist.Work]) -> None:
        self.watch, self.device = watch_of(group), device
        if self.watch is None:
            self.work = launch()
            return
        self.number = self.watch.begin()
        if device.type == "cpu":
            self._meet(group, self.watch)
        self.work = self.watch.launch(launch, self.number)

    def _meet(self, group: dist.ProcessGroup, watch: Watch) -> None:
        mine = torch.tensor(watch.mark(), dtype=torch.int64)
        marks = [torch.empty_like(mine) for _ in watch.ranks]
        work = watch.launch(lambda: dist.all_gather(marks, mine, group=group, async_op=True), self.number)
        watch.wait(work, self.number, self.device)
        watch.compare([mark.tolist() for mark in marks])

    def over(self, *, within: float) -> bool:
        """Whether it ends within so many seconds; it does not when a rank has failed."""
        end = time.monotonic() + within
        while not self.work.is_completed():
            failed = self.watch is not None and self.watch.heartbeat.verdict is not None
            if failed or time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def wait(self) -> None:
        """Wait until it is over (on a GPU: make the stream wait).

        Raises:
            PeerFailed: a rank failed, and what was to come from it never does.
        """
        if self.watch is None:
            self.work.wait()
        else:
            self.watch.wait(self.work, self.number, self.device)


def gather(parts: list[Tensor], mine: Tensor, group: dist.ProcessGroup) -> None:
    """Fill ``parts`` with every rank's ``mine``, all of one shape and dtype.

    Raises:
        PeerFailed: a rank failed.
    """
    Operation(group, mine.device, lambda: dist.all_gather(parts, mine, group=group, async_op=True)).wait()


def broadcast(mine: Tensor, group: dist.ProcessGroup) -> None:
    """Make ``mine`` the tensor of the group's first rank.

    Raises:
        PeerFailed: a rank failed.
    """
    Operation(group, mine.device, lambda: dist.broadcast(mine, group=group, group_src=0, async_op=True)).wait()


def add_up(mine: Tensor, group: dist.ProcessGroup) -> None:
    """Make ``mine`` the sum of all ranks' tensors.

    Raises:
        PeerFailed: a rank failed.
    """
    Operation(group, mine.device, lambda: dist.all_reduce(mine, group=group, async_op=True)).wait()
