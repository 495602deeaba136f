"""Who is alive: every rank says so in the process group's store, and reads what the others say.

A small thread a rank publishes a beat, and for every watched group how many exchanges the rank has begun, with a
running checksum of their tags. From the others' entries it finds a rank whose beat has stopped (killed, stopped, cut
off), that raised, that left, that does not begin an exchange in which this rank waits, or that began another one. The
first rank to find somebody writes a verdict into the store, and all raise it: so all name the same rank, also when
the failure of one makes others fail.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .heartbeat_marks import Marks, odd_one_out

_PREFIX = "dilated-attention/heartbeat"
_VERDICT = f"{_PREFIX}/verdict"
_GONE = ("failed", "left")
_UNBORN = 10
"""Timeouts granted to a rank that has given no sign of life yet."""


@dataclass
class Peer:
    """What is known of another rank."""

    beat: int = -1
    """-1: nothing heard of yet."""
    heard: float = field(default_factory=time.monotonic)
    """When its beat last changed."""
    state: str = "on"
    reason: str = ""
    knows: bool = False
    """Whether it has seen the verdict."""
    groups: dict[str, list[Any]] = field(default_factory=dict)
    """[exchanges begun, marks] by group."""

    def count(self, group: str) -> int:
        """Exchanges that it has begun in a group."""
        return int(self.groups[group][0]) if group in self.groups else 0


@dataclass
class Group:
    """What this rank does in one process group."""

    ranks: tuple[int, ...]
    timeout: float
    marks: Marks = field(default_factory=Marks)
    waiting: dict[int, tuple[float, Callable[[], bool]]] = field(default_factory=dict)
    """By exchange: since when, and whether it is over."""


class Heartbeat:
    """The beat of this process; `heartbeat()` gives the one of the default process group."""

    def __init__(self, source: dist.distributed_c10d.Store, rank: int) -> None:
        self.source, self.rank = source, rank
        self.store = source.clone()  # type: ignore[attr-defined]
        self.groups: dict[str, Group] = {}
        self.verdict: tuple[int, str] | None = None
        """(rank, reason), once somebody failed."""
        self.rounds = 0
        self.on_failure: list[Callable[[], object]] = []
        """Called once in the thread when the verdict is known."""
        self._peers: dict[int, Peer] = {}
        self._state, self._reason = "on", ""
        self._found: tuple[int, str] | None = None
        self._beat, self._last = 0, time.monotonic()
        self._wake, self._end, self.lock = threading.Event(), threading.Event(), threading.RLock()
        self._thread: threading.Thread | None = None
        # The launcher hosts the store, or rank 0 does: then its death shows as a lost connection.
        self._host = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0

    @property
    def timeout(self) -> float:
        """The shortest of the groups', in seconds."""
        return min((group.timeout for group in self.groups.values()), default=30.0)

    @property
    def interval(self) -> float:
        """Seconds between beats."""
        return min(1.0, max(0.05, self.timeout / 10))

    def is_current(self) -> bool:
        """Whether it belongs to the process group that exists now."""
        return dist.is_initialized() and self.source is dist.distributed_c10d._get_default_store()

    def watch(self, name: str, ranks: tuple[int, ...], timeout: float) -> Group:
        """Begin to watch the ranks of a group, or change its timeout."""
        with self.lock:
            group = self.groups.setdefault(name, Group(ranks, timeout))
            group.timeout = timeout
            for rank in ranks:
                if rank != self.rank:
                    self._peers.setdefault(rank, Peer())
        self.store.set_timeout(timedelta(seconds=self.timeout))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dilated-attention-heartbeat", daemon=True)
            self._thread.start()
            atexit.register(self._leave)
        self._wake.set()
        return group

    def accuse(self, rank: int, reason: str) -> None:
        """This rank knows that ``rank`` failed; the others get to know with the next beat."""
        if self.verdict is None:
            self._found = rank, reason
            self._decide(rank, reason)
        self._wake.set()

    def report(self, reason: str) -> None:
        """Tell the others that this rank failed; the first reason counts."""
        with self.lock:
            if self._state == "on":
                self._state, self._reason = "failed", reason
        self._wake.set()

    def close(self) -> None:
        """Stop; the others see that this rank left in good order."""
        with self.lock:
            if self._state == "on":
                self._state = "left"
        self._end.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self.timeout + 1)

    def store_failed(self) -> None:
        """The store cannot be reached: its host is gone."""
        host, peer = self._host, self._peers.get(self._host if self._host is not None else -1)
        if peer is not None and peer.state == "left":
            return
        if host is None:
            self._decide(self.rank, "the launcher's store cannot be reached")
        elif host != self.rank:
            self._decide(host, "the store that it hosts cannot be reached (killed, stopped, or cut off)")

    def _run(self) -> None:
        try:
            while True:
                self._round()
                self.rounds += 1
                if self._end.is_set():
                    return
                self._wake.wait(self.interval)
                self._wake.clear()
        except (RuntimeError, OSError):  # the store's host is gone
            if not self._end.is_set():
                self.store_failed()

    def _round(self) -> None:
        asleep = time.monotonic() - self._last
        self._publish()
        if self._found is not None:
            self.store.compare_set(_VERDICT, "", json.dumps(self._found))
            self._found = None
        if self.verdict is None and self.store.check([_VERDICT]):
            rank, reason = json.loads(self.store.get(_VERDICT))
            self._decide(rank, reason)
            self._publish()
        self._read()
        now = self._last = time.monotonic()
        if asleep > max(1.0, self.timeout / 2):  # we were stopped ourselves: the others get their time anew
            for peer in list(self._peers.values()):
                peer.heard = now
        if self.verdict is None and (found := self._accused(now)) is not None:
            kept = self.store.compare_set(_VERDICT, "", json.dumps(found))
            rank, reason = json.loads(kept)
            self._decide(rank, reason)
            self._publish()

    def _publish(self) -> None:
        with self.lock:
            self._beat += 1
            groups = {name: [group.marks.count, group.marks.entries()] for name, group in self.groups.items()}
            value = [self._beat, self._state, self._reason, self.verdict is not None, groups]
        self.store.set(f"{_PREFIX}/{self.rank}", json.dumps(value))

    def _read(self) -> None:
        with self.lock:
            peers = dict(self._peers)
        known = [r for r, peer in peers.items() if peer.beat >= 0 or self.store.check([f"{_PREFIX}/{r}"])]
        keys = [f"{_PREFIX}/{rank}" for rank in known]
        if self.store.has_extended_api():
            values = self.store.multi_get(keys) if keys else []
        else:
            values = [self.store.get(key) for key in keys]
        for rank, value in zip(known, values, strict=True):
            beat, state, reason, knows, groups = json.loads(value)
            peer = peers[rank]
            if beat != peer.beat:
                peer.heard = time.monotonic()
            peer.beat, peer.state, peer.reason, peer.knows, peer.groups = beat, state, reason, knows, groups

    def _accused(self, now: float) -> tuple[int, str] | None:
        """A rank that failed, and how."""
        if self._state == "failed":
            return self.rank, self._reason
        peers = list(self._peers.items())
        for rank, peer in peers:
            if peer.state == "failed":
                return rank, peer.reason
        for rank, peer in peers:
            if peer.beat >= 0 and peer.state == "on" and now - peer.heard > self.timeout:
                return rank, f"no heartbeat for {self.timeout:g} s (killed, stopped, or cut off)"
        for name, group in list(self.groups.items()):
            if (found := self._behind(name, group, now) or self._strayed(name, group)) is not None:
                return found
        return None

    def _behind(self, name: str, group: Group, now: float) -> tuple[int, str] | None:
        """The rank that has begun fewest exchanges, if one in which this rank waits is among those that it has not."""
        with self.lock:
            # What is over is not asked for again: on a GPU that is a query, which breaks the capture of a CUDA graph.
            for k in [k for k, (_, over) in group.waiting.items() if _is_over(over)]:
                del group.waiting[k]
            waiting = [(k, since) for k, (since, _) in group.waiting.items()]
        if not waiting:
            return None
        number, since = min(waiting)
        peers = {rank: self._peers[rank] for rank in group.ranks if rank != self.rank}
        late = {rank: peer.count(name) for rank, peer in peers.items() if peer.count(name) < number}
        for rank in late:
            if peers[rank].state in _GONE:
                return rank, f"it left before exchange {number}"
        # One that has not begun at all may still be loading what it needs; its launcher knows if it died.
        patience = group.timeout * (1 if all(peers[rank].beat >= 0 for rank in late) else _UNBORN)
        if not late or now - since <= patience:
            return None
        rank = min(late, key=lambda r: (late[r], r))
        return rank, f"it did not take part in exchange {late[rank] + 1} within {group.timeout:g} s"

    def _strayed(self, name: str, group: Group) -> tuple[int, str] | None:
        """A rank that began another exchange than most."""
        with self.lock:
            entries = {self.rank: group.marks.entries()}
        for rank in group.ranks:
            if rank != self.rank and name in self._peers[rank].groups:
                entries[rank] = self._peers[rank].groups[name][1]
        found = odd_one_out(entries)
        return None if found is None else (found[0], f"it skipped a step: {found[1]}")

    def _decide(self, rank: int, reason: str) -> None:
        with self.lock:  # this thread, or the one that computes, was the first to know
            if self.verdict is not None:
                return
            self.verdict = rank, reason
        for call in self.on_failure:
            call()

    def _leave(self) -> None:
        """At the end of the process: say so; let the others read it where this rank hosts the store."""
        last = getattr(sys, "last_value", None)
        if last is not None and self.verdict is None:
            self.report(f"it ended with {type(last).__name__}: {last}")
        failed = self.verdict is not None or self._state == "failed"
        if failed and self._host == self.rank:
            end = time.monotonic() + 2 * self.interval + 0.5
            while time.monotonic() < end and not all(
                peer.knows or peer.state in _GONE or rank == (self.verdict or (-1, ""))[0]
                for rank, peer in list(self._peers.items())
            ):
                time.sleep(0.02)
        self.close()
        # gloo's threads wait for what a stopped peer never sends, and the interpreter would wait for them.
        unfinished = [over for group in self.groups.values() for _, over in group.waiting.values()]
        if not all(map(_is_over, unfinished)):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def _is_over(over: Callable[[], bool]) -> bool:
    """Whether an exchange is over; one that failed is not, and whoever waits for it meets the error."""
    try:
        return over()
    except RuntimeError:  # an earlier error on the device, say: no failure of the store
        return False


_current: list[Heartbeat] = []


def heartbeat() -> Heartbeat:
    """The heartbeat over the store of the default process group, begun when first asked for."""
    source = dist.distributed_c10d._get_default_store()
    if not _current or _current[0].source is not source:
        if _current:
            _current.pop().close()
        _current.append(Heartbeat(source, dist.get_rank()))
    return _current[0]
