"""Which code holds how much memory: every tensor that operators make and lose, on the CPU and on a GPU."""

from __future__ import annotations

import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(__file__).resolve().parent.parent
ELSEWHERE = "elsewhere"


class Listener(Protocol):
    """Who is told of memory."""

    def taken(self, key: int, size: int, device: str) -> None:
        """``size`` bytes were taken; ``key`` is theirs until they are gone."""

    def gone(self, key: int) -> None:
        """They were given up."""


class TensorWatch(TorchDispatchMode):
    """Tells a listener of the memory of every tensor that an operator returns, and when its last user lets go.

    What an operator needs inside, and gives up before it returns, is not seen.

    Args:
        listener: is told.
        least: bytes below which memory is left out.
    """

    def __init__(self, listener: Listener, *, least: int = 1) -> None:
        super().__init__()
        self.listener, self.least = listener, least
        self._live: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._live and size >= self.least:
                    self._live[key] = weakref.ref(storage, partial(self._expired, key))
                    self.listener.taken(key, size, str(tensor.device))
        return found

    def _expired(self, key: int, _: object) -> None:
        if self._live.pop(key, None) is not None:
            self.listener.gone(key)


@dataclass(frozen=True, slots=True)
class Change:
    """A moment at which somebody took (positive) or gave up bytes."""

    seconds: float
    owner: str
    bytes: int


class Ledger:
    """Notes who takes and who gives up; owners are functions of this package."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._start = time.perf_counter()
        self._held: dict[int, tuple[str, int]] = {}

    def taken(self, key: int, size: int, device: str) -> None:
        """Note it for the innermost function of this package that is running."""
        owner = owner_of(_running(sys._getframe(1)))
        self._held[key] = owner, size
        self.changes.append(Change(time.perf_counter() - self._start, owner, size))

    def gone(self, key: int) -> None:
        """Note it for who took it."""
        if (found := self._held.pop(key, None)) is not None:
            self.changes.append(Change(time.perf_counter() - self._start, found[0], -found[1]))


def _running(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_qualname
        frame = frame.f_back


def owner_of(frames: Iterable[tuple[str, str]]) -> str:
    """Of (file, function) from the innermost out, the first of this package that is not this command's.

    >>> owner_of([("/lib/torch/nn.py", "forward"), (str(PACKAGE / "models" / "blocks.py"), "Block.forward")])
    'models/blocks.py: Block.forward'
    """
    for name, function in frames:
        path = Path(name)
        if path.is_relative_to(PACKAGE) and not path.name.startswith("memory"):
            return f"{path.relative_to(PACKAGE).as_posix()}: {function.partition('.<locals>')[0]}"
    return ELSEWHERE


def changes_of_snapshot(snapshot: Mapping[str, Any]) -> list[Change]:
    """Who took and gave up memory of GPUs, of what ``torch.cuda.memory._snapshot()`` says."""
    found, held = [], dict[tuple[int, int], tuple[str, int]]()
    entries = [
        (entry["time_us"], device, entry)
        for device, trace in enumerate(snapshot["device_traces"])
        for entry in trace
        if entry["action"] in ("alloc", "free_completed")
    ]
    entries.sort(key=lambda item: item[0])
    for moment, device, entry in entries:
        key, seconds = (device, entry["addr"]), (moment - entries[0][0]) / 1e6
        if entry["action"] == "alloc":
            owner = owner_of((frame["filename"], frame["name"]) for frame in entry.get("frames", ()))
            held[key] = owner, entry["size"]
            found.append(Change(seconds, owner, entry["size"]))
        elif key in held:
            owner, size = held.pop(key)
            found.append(Change(seconds, owner, -size))
    return found


@contextmanager
def watched(changes: list[Change], device: torch.device) -> Iterator[None]:
    """Add to ``changes`` what is taken and given up meanwhile: by torch's memory history on a GPU."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=1_000_000)
        try:
            yield
        finally:
            changes.extend(changes_of_snapshot(torch.cuda.memory._snapshot()))
            torch.cuda.memory._record_memory_history(enabled=None)
        return
    ledger = Ledger()
    try:
        with TensorWatch(ledger):
            yield
    finally:
        changes.extend(ledger.changes)


def timeline(changes: Sequence[Change], *, points: int = 400, owners: int = 8) -> dict[str, Any]:
    """Bytes held over time, of those who held most, and of all others together.

    Returns:
        ``seconds`` from the first change on, ``bytes`` by owner at these moments (the one of each interval at which
        most was held), ``peak``, and ``peak_owners``: what each held then.
    """
    now: Counter[str] = Counter()
    total = peak = 0
    most: Counter[str] = Counter()
    at_peak: dict[str, int] = {}
    start = changes[0].seconds if changes else 0.0
    width = (changes[-1].seconds - start) / points if changes else 0.0
    width = width or 1.0  # all at one moment
    moments: dict[int, tuple[int, float, dict[str, int]]] = {}
    for change in changes:
        now[change.owner] += change.bytes
        total += change.bytes
        most[change.owner] = max(most[change.owner], now[change.owner])
        if total > peak:
            peak, at_peak = total, dict(now)
        interval = min(int((change.seconds - start) / width), points - 1)
        if interval not in moments or total > moments[interval][0]:
            moments[interval] = total, change.seconds - start, dict(now)
    kept = [name for name, _ in most.most_common(owners) if name != ELSEWHERE]
    series: dict[str, list[int]] = {name: [] for name in (*kept, "others")}
    seconds = []
    for interval in sorted(moments):
        _, moment, held = moments[interval]
        seconds.append(moment)
        for name in kept:
            series[name].append(held.get(name, 0))
        series["others"].append(sum(held.values()) - sum(held.get(name, 0) for name in kept))
    owned = {name: size for name, size in sorted(at_peak.items(), key=lambda item: -item[1]) if size}
    return {"seconds": seconds, "bytes": series, "peak": peak, "peak_owners": owned}
