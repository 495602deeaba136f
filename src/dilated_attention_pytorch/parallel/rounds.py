"""Rounds of an exchange: what goes to whom, keys and values on their way while one computes, gradients sent home."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory import MemoryPool
from .comm import Pending, Traffic, exchange


class Shipment(Protocol):
    """What one rank sends to another."""

    @property
    def rows(self) -> int:
        """Rows in the buffer: a key and a value each."""
        ...


S = TypeVar("S", bound=Shipment)


@dataclass(frozen=True)
class Round(Generic[S]):
    """What this rank sends to peers and computes with what it gets from peers, in one exchange."""

    outgoing: dict[int, S]
    incoming: dict[int, S]


@dataclass(frozen=True)
class Lines:
    """Where messages go, where they are counted, where receive buffers come from."""

    group: dist.ProcessGroup
    traffic: Traffic
    pool: MemoryPool


class Exchanges(Generic[S]):
    """What peers send, round by round, the next round on its way while one is used.

    ``size`` is bytes of one row; ``pack`` makes the 1-D tensor that a shipment is sent as.
    """

    def __init__(
        self, lines: Lines, rounds: tuple[Round[S], ...], size: int, device: torch.device, pack: Callable[[S], Tensor]
    ) -> None:
        self.lines, self.rounds, self.size, self.device, self.pack = lines, rounds, size, device, pack
        self.arrived: Pending | None = None
        self.pending = self._start(0)

    def _start(self, number: int) -> Pending | None:
        if number >= len(self.rounds):
            return None
        lines, moved = self.lines, self.rounds[number]
        outgoing = {peer: self.pack(shipment) for peer, shipment in moved.outgoing.items()}
        incoming = {peer: shipment.rows * self.size for peer, shipment in moved.incoming.items()}
        return exchange(lines.group, outgoing, incoming, self.device, lines.traffic, lines.pool)

    def __iter__(self) -> Iterator[tuple[Round[S], dict[int, Tensor]]]:
        """Each round and the bytes of each peer; these are valid until the next one is asked for."""
        for number, moved in enumerate(self.rounds):
            self.arrived, self.pending = self.pending, None
            assert self.arrived is not None
            received = self.arrived.wait()
            self.pending = self._start(number + 1)
            yield moved, received
            del received
            self.arrived.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave no buffer on loan, also after an error."""
        for pending in (self.arrived, self.pending):
            if pending is not None:
                pending.drop()


class Homeward(Generic[S]):
    """Gradients of rows that were sent away, on their way back; one round is under way while the next is computed.

    ``size`` is bytes of one row; ``add`` adds the bytes of a shipment's gradients to where they belong.
    """

    def __init__(self, lines: Lines, size: int, device: torch.device, add: Callable[[S, Tensor], None]) -> None:
        self.lines, self.size, self.device, self.add = lines, size, device, add
        self.underway = deque[tuple[Pending, Round[S]]]()

    def send(self, moved: Round[S], back: dict[int, Tensor]) -> None:
        """Send gradients of what came in a round to where it came from."""
        lines = self.lines
        expected = {peer: shipment.rows * self.size for peer, shipment in moved.outgoing.items()}
        started = exchange(lines.group, back, expected, self.device, lines.traffic, lines.pool)
        self.underway.append((started, moved))
        if len(self.underway) > 1:
            self.arrive()

    def arrive(self) -> None:
        """Wait for the round that has been under way for longest, if one is, and add what it brings."""
        if not self.underway:
            return
        pending, moved = self.underway[0]
        received = pending.wait()
        for peer, shipment in moved.outgoing.items():
            self.add(shipment, received[peer])
        del received
        pending.release()
        self.underway.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave no buffer on loan, also after an error."""
        for pending, _ in self.underway:
            pending.drop()
