"""A trace run through a pool: what it allocates step by step, holds, wastes, and costs in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Lease, MemoryPool
from .trace import Trace

SAMPLES = 400
"""Points in time at which statistics are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A pool in the middle of a trace."""

    event: int
    held: int
    leased: int
    internal_fragmentation: float
    external_fragmentation: float


@dataclass(slots=True, kw_only=True)
class Replay:
    """What happened."""

    requests: int = 0
    misses_by_step: list[int] = field(default_factory=list)
    """Requests of each step that took new memory."""
    peak: int = 0
    """Most bytes held."""
    samples: list[Sample] = field(default_factory=list)
    step_samples: list[Sample] = field(default_factory=list)
    """At the end of each step, after ``between`` was called."""

    @property
    def misses(self) -> int:
        """Requests that took new memory."""
        return sum(self.misses_by_step)

    @property
    def reuse(self) -> float:
        """Share of the requests that were served without new memory."""
        return 1 - self.misses / self.requests if self.requests else 1.0


def replay(
    trace: Trace,
    pool: MemoryPool,
    *,
    device: str | None = None,
    samples: int = SAMPLES,
    between: Callable[[], object] | None = None,
) -> Replay:
    """Acquire and return as recorded; leases that the trace leaves out are returned at the end.

    Args:
        trace: what to do.
        pool: of any kind.
        device: for all leases, in place of the recorded ones.
        samples: points in time at which statistics are taken, spread evenly.
        between: called at the end of each step, for instance a pool's ``compact``.

    Raises:
        MemoryBudgetExceeded: the pool's budget is smaller than the trace needs.
    """
    found, leases = Replay(), dict[int, Lease]()
    every = max(len(trace.events) // samples, 1) if samples else len(trace.events) + 1
    before = pool.stats().misses

    def sample(number: int) -> Sample:
        stats = pool.stats()
        return Sample(
            event=number,
            held=stats.held,
            leased=stats.leased,
            internal_fragmentation=stats.internal_fragmentation,
            external_fragmentation=stats.external_fragmentation,
        )

    def end_step(number: int) -> None:
        nonlocal before
        if between is not None:
            between()
        now = pool.stats().misses
        found.misses_by_step.append(now - before)
        found.step_samples.append(sample(number))
        before = now

    try:
        for number, event in enumerate(trace.events):
            if event.op == "acquire":
                found.requests += 1
                where = device or event.device
                leases[event.lease] = pool.acquire((event.bytes,), torch.uint8, where)
            elif event.op == "return":
                leases.pop(event.lease).release()
            else:
                end_step(number)
            if not number % every:
                found.samples.append(sample(number))
        if trace.events and trace.events[-1].op != "step":
            end_step(len(trace.events))
        found.peak = pool.stats().peak
    finally:
        for lease in leases.values():
            lease.release()
    return found


def seconds(trace: Trace, pool: MemoryPool | None, *, device: str | None = None) -> list[list[float]]:
    """Seconds of every acquire together with its return, by the step of the return.

    Args:
        trace: what to do.
        pool: None for plain ``torch.empty`` and the end of the tensor.
        device: for all leases, in place of the recorded ones.
    """
    leases: dict[int, Lease | Tensor] = {}
    begun: dict[int, float] = {}
    times: list[list[float]] = [[]]
    clock = time.perf_counter
    for event in trace.events:
        if event.op == "acquire":
            where = torch.device(device or event.device)
            start = clock()
            if pool is None:
                leases[event.lease] = torch.empty((event.bytes,), dtype=torch.uint8, device=where)
            else:
                leases[event.lease] = pool.acquire((event.bytes,), torch.uint8, where)
            begun[event.lease] = clock() - start
        elif event.op == "return":
            lease = leases.pop(event.lease)
            start = clock()
            if isinstance(lease, Lease):
                lease.release()
            else:
                del lease
            times[-1].append(clock() - start + begun.pop(event.lease))
        else:
            times.append([])
    for lease in leases.values():
        if isinstance(lease, Lease):
            lease.release()
    return times
