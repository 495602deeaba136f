"""One function that makes any pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import torch

from .adaptive import AdaptivePool
from .backing import Backing, TorchBacking, registered_mem_pool
from .base import MemoryPool
from .simple import SimplePool
from .strategies import Bucketing, Fragmentation, Numa
from .strategies.numa import NumaBacking
from .trace import RecordingPool

Kind = Literal["simple", "adaptive"]
Strategy = Bucketing | Fragmentation | Numa

STRATEGIES: dict[str, type[Strategy]] = {"bucketing": Bucketing, "fragmentation": Fragmentation, "numa": Numa}
DEFAULTS = ("fragmentation",)
"""Strategies of an adaptive pool: what paid in the measurements of docs/memory.md."""


def create_memory_pool(
    kind: Kind = "simple",
    *,
    device: torch.device | str,
    budget: int | None = None,
    strategies: Sequence[str | Strategy] | None = None,
    pinned: bool = False,
    backing: Literal["allocator", "mem_pool"] = "allocator",
    process_group: Any = None,
    trace: Path | TextIO | None = None,
    debug: bool = False,
) -> MemoryPool:
    """Make a pool of leases for ``ContextParallel(pool=...)``, streaming, and long-lived buffers of your own.

    Args:
        kind: "simple" finds buffers again by exactly their size; "adaptive" keeps memory as its strategies say, and
            gives idle memory up before the device runs out.
        device: what the pool serves, besides host memory.
        budget: most bytes held, leased and idle together, on all devices; None for no limit.
        strategies: of an adaptive pool: names ("bucketing", "fragmentation", "numa") or configurations (`Bucketing`,
            `Fragmentation`, `Numa`), each at most once; None for the defaults.
        pinned: host memory is page-locked, for copies that overlap with work on a GPU.
        backing: "mem_pool" takes GPU memory from a `torch.cuda.MemPool` of its own, apart from PyTorch's.
        process_group: of NCCL, with ``backing="mem_pool"``: memory comes from NCCL's allocator and is registered, so
            that messages in it need no copy through NCCL's buffers.
        trace: a file that gets every acquire and return as a line of JSON.
        debug: remember where leases are taken, for the report of `close`.

    Raises:
        ValueError: an unknown name, or options that do not go together.

    >>> pool = create_memory_pool("adaptive", device="cpu", budget=1 << 20, strategies=("bucketing",))
    >>> with pool.acquire((16, 16), torch.float32, "cpu") as lease:
    ...     _ = lease.tensor.fill_(1.0)
    >>> pool.stats().held
    1024
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(map(repr, get_args(Kind)))}")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    if kind == "simple" and strategies:
        raise ValueError(f"strategies is {strategies!r}, and a simple pool takes none; make an adaptive one")
    chosen = _strategies(DEFAULTS if strategies is None and kind == "adaptive" else strategies or ())
    mem_pool = _mem_pool(place, backing, process_group)
    host = chosen.get("numa")
    memory: Backing = TorchBacking(pinned=pinned, mem_pool=mem_pool)
    if isinstance(host, Numa):
        memory = NumaBacking(place, host, mem_pool=mem_pool)
    pool: MemoryPool
    if kind == "simple":
        pool = SimplePool(budget=budget, device=place, debug=debug, backing=memory)
    else:
        classes, arena = chosen.get("bucketing"), chosen.get("fragmentation")
        assert classes is None or isinstance(classes, Bucketing)
        assert arena is None or isinstance(arena, Fragmentation)
        pool = AdaptivePool(
            budget=budget, bucketing=classes, fragmentation=arena, device=place, debug=debug, backing=memory
        )
    return pool if trace is None else RecordingPool(pool, trace, what=f"{kind} pool of {place}")


def _strategies(given: Sequence[str | Strategy]) -> dict[str, Strategy]:
    """By name."""
    if isinstance(given, str):
        raise ValueError(f"strategies is {given!r}; give a sequence of names, e.g. ({given!r},)")
    names = {kind: name for name, kind in STRATEGIES.items()}
    found: dict[str, Strategy] = {}
    for one in given:
        name = one if isinstance(one, str) else names.get(type(one), repr(one))
        if name not in STRATEGIES:
            raise ValueError(f"strategies has {name!r}; choose from {', '.join(map(repr, STRATEGIES))}")
        if name in found:
            raise ValueError(f"strategies has {name} twice; give it once")
        found[name] = STRATEGIES[name]() if isinstance(one, str) else one
    return found


def _mem_pool(device: torch.device, backing: str, group: Any) -> Any:
    if backing not in ("allocator", "mem_pool"):
        raise ValueError(f"backing is {backing!r}; choose 'allocator' or 'mem_pool'")
    if backing == "allocator":
        if group is not None:
            raise ValueError("process_group is given, and backing is 'allocator'; give backing='mem_pool' to register")
        return None
    if device.type != "cuda":
        raise ValueError(f"backing is 'mem_pool' and device {device}; only memory of CUDA devices comes from one")
    return torch.cuda.MemPool() if group is None else registered_mem_pool(group)
