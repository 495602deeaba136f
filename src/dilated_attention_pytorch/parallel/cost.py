"""What a strategy costs, computed from integers: bytes and messages exactly, seconds by a model of rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ..merge import accumulator_dtype
from .hybrid import Placement, Ranges, total
from .schedule import Call, RingCall
from .ulysses import Share, share_heads
from .volume import Volume, volumes

_SAMPLE = 16
"""Ranks whose own work is counted, the first and the last among them; of many ranks the others are like these."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device and its links do; measure your own with ``dilated-attention bench parallel``.

    The defaults were measured on H200 GPUs joined by NVLink, in bfloat16 with head dim 128: fused attention forward
    and backward, and a ring of sends and receives of 512 MiB.
    """

    forward_flops: float = 5.35e14
    """Useful operations of attention a second, forward."""
    backward_flops: float = 3.76e14
    bandwidth: float = 3.53e11
    """Bytes a second that a rank sends while it receives as many."""
    latency: float = 3e-5
    """Seconds before an exchange moves anything."""
    receive_limit: float = 8 * 2**30
    """Most bytes of receive buffers that "auto" accepts for "gather"."""

    def __post_init__(self) -> None:
        for name in ("forward_flops", "backward_flops", "bandwidth", "receive_limit"):
            if not 0 < getattr(self, name) <= inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a positive number")
        if not 0 <= self.latency < inf:
            raise ValueError(f"latency is {self.latency!r}; give seconds, 0 or more")


@dataclass(frozen=True)
class Transfer:
    """What one rank sends in one pass."""

    bytes_sent: int
    messages: int

    def __add__(self, other: Transfer) -> Transfer:
        return Transfer(self.bytes_sent + other.bytes_sent, self.messages + other.messages)


@dataclass(frozen=True)
class Estimate:
    """A strategy for one call; lists have an entry for each rank of the mesh."""

    strategy: str
    forward: tuple[Transfer, ...]
    backward: tuple[Transfer, ...]
    receive_bytes: int
    """Largest receive buffers of a rank at one time, forward."""
    pairs: int
    """Most (query, key) pairs of a rank."""
    forward_seconds: float
    backward_seconds: float
    forward_compute_seconds: float
    backward_compute_seconds: float
    """What computing takes alone; the rest of the seconds is communication that nothing hides."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


def estimate(
    call: Call, strategy: str, mesh: tuple[int, ...], across: str, rows: Sequence[Ranges], rates: Rates
) -> Estimate:
    """What ``strategy`` costs on a mesh whose ranks hold ``rows``; backward without a gradient of the log-sum-exp.

    Raises:
        ValueError: a strategy that cannot divide the heads.
    """
    placement = Placement.of(strategy, mesh, "gather" if across == "gather" else "ring")
    shape, held = call.shape, placement.held(list(rows))
    shares: Sequence[Share | None] = (
        (None,) if placement.heads == 1 else share_heads(shape.heads, shape.kv_heads, placement.heads)
    )
    parts = []
    for share in shares:
        ring = RingCall.of(call, share, held)
        parts.append(_ring(call, ring, placement.across, rates))
    forward, backward = [], []
    for rank in range(len(rows)):
        around, along = divmod(rank, placement.heads)
        part = parts[along]
        trades = (Transfer(0, 0), Transfer(0, 0))
        if placement.heads > 1:
            counts = [total(r) for r in rows[around * placement.heads : (around + 1) * placement.heads]]
            trades = _trades(call, [s for s in shares if s is not None], counts, along)
        forward.append(trades[0] + part.forward[around])
        backward.append(trades[1] + part.backward[around])
    slowest = max(parts, key=lambda part: part.seconds)
    exposed = [0.0, 0.0]
    if placement.heads > 1:  # a rank computes nothing while it trades rows for heads
        for which, transfers in enumerate((forward, backward)):
            ringed = [parts[n % placement.heads] for n in range(len(rows))]
            traded = [
                one.bytes_sent - (part.forward, part.backward)[which][n // placement.heads].bytes_sent
                for n, (one, part) in enumerate(zip(transfers, ringed, strict=True))
            ]
            exposed[which] = max(traded) / rates.bandwidth + 2 * rates.latency
    traded_in = 0
    if placement.heads > 1:
        traded_in = max(one.bytes_sent for one in forward)
    return Estimate(
        strategy, tuple(forward), tuple(backward), max(traded_in, *(part.receive_bytes for part in parts)),
        max(part.pairs for part in parts),
        slowest.forward_seconds + exposed[0], slowest.backward_seconds + exposed[1],
        slowest.forward_compute_seconds, slowest.backward_compute_seconds,
    )  # fmt: skip


def _trades(call: Call, shares: Sequence[Share], rows: Sequence[int], rank: int) -> tuple[Transfer, Transfer]:
    """What a rank sends to trade its rows for heads and back: q, k, v (and mask), out, lse; then the gradients."""
    shape, size, acc = call.shape, call.dtype.itemsize, accumulator_dtype(call.dtype).itemsize
    dims = shape.head_dim + shape.value_dim
    mine, forward, backward = shares[rank], 0, 0
    for peer, theirs in enumerate(shares):
        if peer == rank:
            continue
        inputs = theirs.heads * shape.head_dim + theirs.kv_heads * dims
        forward += rows[rank] * (inputs * size + call.has_mask)
        forward += rows[peer] * mine.heads * (shape.value_dim * size + acc)
        backward += rows[rank] * theirs.heads * shape.value_dim * size
        backward += rows[peer] * (mine.heads * shape.head_dim + mine.kv_heads * dims) * size
    messages = 2 * (len(shares) - 1)
    return Transfer(shape.batch * forward, messages), Transfer(shape.batch * backward, messages)


def _ring(call: Call, ring: RingCall, across: str, rates: Rates) -> Estimate:
    """What the ranks of one ring send and compute."""
    world, size, acc = len(ring.held), call.dtype.itemsize, accumulator_dtype(call.dtype).itemsize
    found = volumes(ring.pattern, ring.heads, ring.kv_heads, ring.held, call.options.is_causal)
    dims = call.shape.head_dim + call.shape.value_dim
    fetched, home = (dims + call.has_mask) * size, dims * acc
    # Where each branch is differentiated with its own output, its rows travel once more for that output.
    apart = call.options.mixing_grad == "detached"
    forward, backward = [], []
    for rank in range(world):
        once = _send(found, rank, fetched)
        returned = [_send([one], rank, home, back=True) for one in found] if apart else [
            _send(found, rank, home, back=True)
        ]  # fmt: skip
        again = [_send([one], rank, fetched) for one in found for _ in range(2)] if apart else [once]
        forward.append(once)
        backward.append(sum([*again, *returned], Transfer(0, 0)))
    peers = max(one.messages for one in forward)
    received = max(sum(one.received[rank] for one in found) for rank in range(world)) * fetched
    rounds = max(1, peers if across == "ring" else 1)
    sample = {round(i * (world - 1) / (_SAMPLE - 1)) for i in range(_SAMPLE)} if world > _SAMPLE else range(world)
    own = {rank: ring.problem(call, rank, "cpu", fold=True).plan.pairs for rank in sample}
    met = {rank: sum(one.pairs[rank] for one in found) for rank in sample}
    busiest = max(sample, key=lambda rank: own[rank] + met[rank])
    seconds, alone = [], []
    flops = (2 * dims / rates.forward_flops, 2 * (dims + 2 * call.shape.head_dim + call.shape.value_dim))
    for each, moved in ((flops[0], forward), (flops[1] / rates.backward_flops, backward)):
        most = max(moved, key=lambda one: one.bytes_sent)
        travel = most.bytes_sent / rates.bandwidth / rounds + rates.latency if most.messages else 0.0
        first, rest = own[busiest] * each, met[busiest] * each / rounds
        alone.append(first + rest * rounds)
        seconds.append(max(first, travel) + (rounds - 1) * max(rest, travel) + rest)
    return Estimate(
        across, tuple(forward), tuple(backward), -(-received * min(2, rounds) // rounds), own[busiest] + met[busiest],
        seconds[0], seconds[1], alone[0], alone[1],
    )  # fmt: skip


def _send(found: Sequence[Volume], rank: int, size: int, *, back: bool = False) -> Transfer:
    """Rows of several branches in one message to each rank, or (``back``) their gradients to where they came from."""
    bits = 0
    for one in found:
        bits |= (one.sources if back else one.targets)[rank]
    rows = sum((one.received if back else one.sent)[rank] for one in found)
    return Transfer(rows * size, bits.bit_count())


def candidates(
    call: Call, mesh: tuple[int, ...], across: str, rows: Sequence[Ranges], rates: Rates
) -> tuple[tuple[Estimate, ...], tuple[tuple[str, str], ...]]:
    """The strategies that a mesh allows, the one that "auto" picks first; and those it passes over, with the reason.

    The fewest seconds win, forward and backward; of equals the first of ring, gather, ulysses, hybrid.
    """
    names = ("ring", "gather", "ulysses") if len(mesh) == 1 else ("hybrid",)
    found, passed = [], []
    for name in names:
        try:
            one = estimate(call, name, mesh, across, rows, rates)
        except ValueError as error:
            if name == "hybrid":
                raise
            passed.append((name, str(error)))
            continue
        if name == "gather" and one.receive_bytes > rates.receive_limit:
            passed.append((name, f"its receive buffers take {one.receive_bytes:,} bytes, more than receive_limit"))
            continue
        found.append(one)
    return tuple(sorted(found, key=lambda one: one.seconds)), tuple(passed)
