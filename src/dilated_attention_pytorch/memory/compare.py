"""A trace through every kind of pool, side by side: reuse, peak, fragmentation, and time beside torch.empty."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .adaptive import AdaptivePool
from .leasing import LeasePool
from .replay import Replay, replay, seconds
from .simple import SimplePool
from .strategies import Bucketing, Fragmentation
from .trace import Trace

PLAIN = "torch.empty"

CONTENDERS: dict[str, Callable[[int | None], LeasePool]] = {
    "simple": lambda budget: SimplePool(budget=budget),
    "adaptive": lambda budget: AdaptivePool(budget=budget),
    "bucketing": lambda budget: AdaptivePool(budget=budget, bucketing=Bucketing()),
    "best fit": lambda budget: AdaptivePool(budget=budget, fragmentation=Fragmentation(compaction=False)),
    "fragmentation": lambda budget: AdaptivePool(budget=budget, fragmentation=Fragmentation()),
    "both": lambda budget: AdaptivePool(budget=budget, bucketing=Bucketing(), fragmentation=Fragmentation()),
}
"""Pools of a budget by name: adaptive ones without strategies, with one ("best fit" is fragmentation without
compaction), and with both."""


def compare(
    trace: Trace,
    *,
    names: Sequence[str] | None = None,
    budget: int | None = None,
    device: str | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Replay a trace through pools, each fresh, and time them in turn.

    Args:
        trace: what to do.
        names: of `CONTENDERS`; None for all.
        budget: of every pool, in bytes.
        device: for all leases, in place of the recorded ones.
        repeats: runs of the timing; the median over all leases of all runs is given.

    Returns:
        plain data: what the trace asks for, and a row for each pool. Times are microseconds of an acquire with its
        return, of the steps from the third on (of all, where there are fewer).

    Raises:
        ValueError: an unknown name.
        MemoryBudgetExceeded: a pool needs more than the budget.
    """
    chosen = list(CONTENDERS if names is None else names)
    if unknown := [name for name in chosen if name not in CONTENDERS]:
        raise ValueError(f"there is no pool {unknown[0]!r}; choose from {', '.join(map(repr, CONTENDERS))}")
    times = _times(trace, chosen, budget, device, repeats)
    rows = []
    for name in chosen:
        pool = CONTENDERS[name](budget)
        compacted = pool.compact if isinstance(pool, AdaptivePool) and pool.fragmentation is not None else None
        if name == "best fit":
            compacted = None
        found = replay(trace, pool, device=device, between=compacted)
        pool.close()
        rows.append({"pool": name, **_row(found), "microseconds": times[name], "samples": _samples(found)})
    return {
        "what": trace.what,
        "requests": trace.requests,
        "sizes": len({event.bytes for event in trace.events if event.op == "acquire"}),
        "asked_at_once": trace.asked_at_once,
        "budget": budget,
        "torch_empty_microseconds": times[PLAIN],
        "pools": rows,
    }


def _row(found: Replay) -> dict[str, Any]:
    ends = [sample.external_fragmentation for sample in found.step_samples]
    within = [s.external_fragmentation for s in found.samples]
    wasted = [s.internal_fragmentation for s in found.samples if s.leased]
    return {
        "reuse": found.reuse,
        "misses_by_step": found.misses_by_step,
        "peak": found.peak,
        "held_at_end": found.step_samples[-1].held if found.step_samples else 0,
        "internal_fragmentation": statistics.fmean(wasted) if wasted else 0.0,
        "external_fragmentation": statistics.fmean(within) if within else 0.0,
        "external_fragmentation_after_steps": max(ends, default=0.0),
    }


def _samples(found: Replay) -> list[dict[str, Any]]:
    return [asdict(sample) for sample in found.samples]


def _times(
    trace: Trace, names: Sequence[str], budget: int | None, device: str | None, repeats: int
) -> dict[str, float | None]:
    """Median microseconds; None where no lease was returned."""
    pools = {name: CONTENDERS[name](budget) for name in names}
    found: dict[str, list[float]] = {name: [] for name in (*names, PLAIN)}
    for _ in range(repeats):  # in turn, so that drift of the machine meets all alike
        for name, times in found.items():
            steps = seconds(trace, pools.get(name), device=device)
            times.extend(t for step in (steps[2:] if any(steps[2:]) else steps) for t in step)
    for pool in pools.values():
        pool.close()
    return {name: statistics.median(times) * 1e6 if times else None for name, times in found.items()}
