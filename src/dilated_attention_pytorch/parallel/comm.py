"""Messages between ranks: one all-to-all whose splits are what each pair needs, as bytes, counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory import Lease, MemoryPool


@dataclass
class Traffic:
    """What a rank has sent so far."""

    bytes_sent: int = 0
    messages_sent: int = 0


@dataclass
class Pending:
    """An exchange under way; `wait` gives what each peer sent."""

    received: dict[int, Tensor]
    work: dist.Work | None
    sent: Tensor | None
    """Must live until the exchange is over."""
    lease: Lease

    def wait(self) -> dict[int, Tensor]:
        """Block until all has arrived (on a GPU: until the stream may use it)."""
        if self.work is not None:
            self.work.wait()
            self.work, self.sent = None, None
        return self.received

    def release(self) -> None:
        """Return the receive buffer; what `wait` gave must not be used after."""
        self.received = {}
        self.lease.release()


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
    """
    world = dist.get_world_size(group)
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    parts = [outgoing[peer].view(torch.uint8) if peer in outgoing else nothing for peer in range(world)]
    sent, splits = [part.numel() for part in parts], [incoming.get(peer, 0) for peer in range(world)]
    single = [part for part in parts if part.numel()]
    send = single[0] if len(single) == 1 else torch.cat(parts)
    lease = pool.acquire((sum(splits),), torch.uint8, device)
    receive = lease.tensor
    work = dist.all_to_all_single(receive, send, splits, sent, group=group, async_op=True)
    traffic.bytes_sent += sum(sent)
    traffic.messages_sent += len(single)
    received = dict(zip(range(world), receive.split(splits), strict=True))
    return Pending({peer: received[peer] for peer in incoming}, work, send, lease)
