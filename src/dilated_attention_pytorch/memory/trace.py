"""Traces: every acquire and return of a pool as JSON lines, written while it works and read back."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from .base import Leak, Lease, MemoryPool, bytes_of
from .stats import PoolStats

FORMAT = "dilated-attention memory trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A line of a trace."""

    op: str
    """"acquire", "return", or "step": the mark between two steps."""
    seconds: float = 0.0
    """Since the start of the recording."""
    lease: int = -1
    bytes: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What was asked of a pool, in order."""

    what: str
    events: tuple[Event, ...]

    @property
    def requests(self) -> int:
        """Number of acquires."""
        return sum(event.op == "acquire" for event in self.events)

    @property
    def asked_at_once(self) -> int:
        """Most bytes on loan at a time: no pool can hold less at its peak."""
        found, now, sizes = 0, 0, {}
        for event in self.events:
            if event.op == "acquire":
                sizes[event.lease] = event.bytes
                now += event.bytes
                found = max(found, now)
            elif event.op == "return":
                now -= sizes.pop(event.lease)
        return found


class TraceWriter:
    """Writes a trace, from any thread.

    Args:
        file: a path, which is overwritten, or a text file, which stays open.
        what: what is traced, in words.
    """

    def __init__(self, file: Path | TextIO, *, what: str = "") -> None:
        self._own = isinstance(file, Path)
        self._file: TextIO = file.open("w", encoding="utf-8") if isinstance(file, Path) else file
        self._lock, self._start = threading.Lock(), time.perf_counter()
        self._serial = itertools.count()
        self._line({"format": FORMAT, "version": 1, "what": what})

    def acquire(self, size: int, device: str, **more: Any) -> int:
        """Note a lease; its number."""
        lease = next(self._serial)
        self._line({"op": "acquire", "seconds": self._now(), "lease": lease, "bytes": size, "device": device, **more})
        return lease

    def give_back(self, lease: int) -> None:
        """Note a return."""
        self._line({"op": "return", "seconds": self._now(), "lease": lease})

    def step(self) -> None:
        """Note that a step is over."""
        self._line({"op": "step", "seconds": self._now()})

    def close(self) -> None:
        """Write what is not written yet; close the file if it was given as a path."""
        with self._lock:
            if not self._file.closed:
                self._file.flush()
            if self._own:
                self._file.close()

    def _now(self) -> float:
        return round(time.perf_counter() - self._start, 6)

    def _line(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, separators=(",", ":")) + "\n"
        with self._lock:
            if not self._file.closed:  # a lease that comes back after the end is no longer of interest
                self._file.write(text)


class RecordingPool:
    """A pool whose acquires and returns are written down.

    Args:
        pool: does the work.
        file: where the lines go: a path, which is overwritten, or a text file, which stays open.
        what: what is traced, in words.

    >>> import io
    >>> from dilated_attention_pytorch.memory import SimplePool
    >>> text = io.StringIO()
    >>> pool = RecordingPool(SimplePool(), text, what="an example")
    >>> with pool.acquire((4,), torch.float32, "cpu"):
    ...     pass
    >>> [event.op for event in read_trace(text.getvalue().splitlines()).events]
    ['acquire', 'return']
    """

    def __init__(self, pool: MemoryPool, file: Path | TextIO, *, what: str = "") -> None:
        self.pool, self._writer = pool, TraceWriter(file, what=what)

    def acquire(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> Lease:
        """As the pool's; a request that it refuses leaves no line."""
        inner = self.pool.acquire(shape, dtype, device, stream=stream)
        tensor = inner.tensor
        lease = self._writer.acquire(
            bytes_of(shape, dtype),
            str(tensor.device),
            shape=list(shape),
            dtype=str(dtype).removeprefix("torch."),
            thread=threading.current_thread().name,
            **({} if stream is None else {"stream": stream.stream_id}),
        )

        def give_back() -> None:
            self._writer.give_back(lease)  # first: once it is back, somebody else may get it
            inner.release()

        return Lease(tensor, give_back)

    def step(self) -> None:
        """Mark the end of a step."""
        self._writer.step()

    def stats(self) -> PoolStats:
        """As the pool's."""
        return self.pool.stats()

    def trim(self, to_bytes: int = 0) -> int:
        """As the pool's."""
        return self.pool.trim(to_bytes)

    def close(self) -> tuple[Leak, ...]:
        """As the pool's; ends the trace."""
        try:
            return self.pool.close()
        finally:
            self._writer.close()


def read_trace(lines: Path | Iterable[str]) -> Trace:
    """Read a trace back.

    Raises:
        ValueError: it is no trace, or its lines do not belong together.
    """
    name = repr(str(lines)) if isinstance(lines, Path) else "the trace"
    rows = lines.read_text(encoding="utf-8").splitlines() if isinstance(lines, Path) else list(lines)
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        try:
            parsed = json.loads(row)
        except json.JSONDecodeError:
            raise ValueError(f"line {number} of {name} is no JSON; give a file that `memory record` wrote") from None
        found.append(parsed if isinstance(parsed, dict) else {})
    if not found or found[0].get("format") != FORMAT or found[0].get("version") != 1:
        raise ValueError(f"{name} does not start as a trace does; give a file that `memory record` wrote")
    names = Event.__dataclass_fields__
    try:
        events = tuple(Event(**{key: value for key, value in row.items() if key in names}) for row in found[1:])
    except TypeError as error:
        raise ValueError(f"{name} has a line without an op ({error})") from None
    out: set[int] = set()
    for number, event in enumerate(events, 2):
        if event.op == "acquire" and event.lease not in out and event.bytes >= 0:
            out.add(event.lease)
        elif event.op == "return" and event.lease in out:
            out.remove(event.lease)
        elif event.op != "step":
            raise ValueError(f"line {number} of {name}: {event.op!r} of lease {event.lease} does not follow from above")
    return Trace(what=str(found[0].get("what", "")), events=events)
