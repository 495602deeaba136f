"""Waiting for the other ranks without hanging when one of them is gone: poll what is awaited, and the heartbeat."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from .errors import PeerFailed
from .heartbeat import Heartbeat, heartbeat
from .heartbeat_marks import describe, odd_one_out

_SPINS = 200
_PAUSE = 0.001
_MOST = 64


class Watch:
    """Some ranks of the job that make the same sequence of exchanges, as this rank waits for them.

    Args:
        name: the same on all of them, and of them only.
        ranks: in the job.
        timeout: seconds without a heartbeat, or without taking part, after which a rank counts as failed.
        group: their process group, if they have one.
    """

    def __init__(
        self, name: str, ranks: tuple[int, ...], timeout: float, *, group: dist.ProcessGroup | None = None
    ) -> None:
        self.name, self.ranks, self.timeout = name, ranks, timeout
        self.step: int | None = None
        """The step that was declared."""
        self.heartbeat: Heartbeat = heartbeat()
        self._group = self.heartbeat.watch(name, ranks, timeout)
        self.on_gpu = group is not None and torch.cuda.is_available() and "nccl" in str(dist.get_backend(group))
        if group is not None and self.on_gpu:
            # Nobody can poll a kernel of NCCL that waits for a dead peer; aborting the communicator ends it.
            self.heartbeat.on_failure.append(partial(abort, group))

    def set_timeout(self, timeout: float) -> None:
        """Change the timeout."""
        if timeout != self.timeout:
            self.timeout = timeout
            self.heartbeat.watch(self.name, self.ranks, timeout)

    def begin(self) -> int:
        """Number of the exchange that begins here; the others can see that this rank takes part.

        Raises:
            PeerFailed: somebody has failed.
            RuntimeError: a CUDA graph is being captured: its replays would go on without anybody watching.
        """
        self.check()
        if self.on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and ranks that exchange rows in one cannot be watched; call attention "
                "with parallel= outside of the graph"
            )
        # Recomputation of a checkpointed block runs within the backward pass, on every rank.
        phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        with self.heartbeat.lock:
            return self._group.marks.add(-1 if self.step is None else self.step, phase)

    def expect(self, number: int, over: Callable[[], bool]) -> None:
        """This rank waits for the others in an exchange until ``over()``, whether or not it looks at it."""
        with self.heartbeat.lock:
            waiting = self._group.waiting
            if len(waiting) >= _MOST:  # on a GPU nobody waits for the end of what is under way
                for old in [old for old, (_, done) in waiting.items() if done()]:
                    del waiting[old]
            waiting[number] = time.monotonic(), over

    def arrived(self, number: int) -> None:
        """This rank does not wait in that exchange any more."""
        with self.heartbeat.lock:
            self._group.waiting.pop(number, None)

    def mark(self) -> list[int]:
        """Where this rank is: exchanges begun, checksum of what they were, step, and 1 in a forward pass."""
        return self._group.marks.last()

    def compare(self, marks: Sequence[Sequence[int]]) -> None:
        """Raise PeerFailed on every rank if one began another exchange than the others."""
        entries = {rank: describe(mark) for rank, mark in zip(self.ranks, marks, strict=True)}
        if (found := odd_one_out(entries)) is not None:
            rank, how = found
            self.heartbeat.accuse(rank, f"it skipped a step: {how}")
            self.check()

    def launch(self, start: Callable[[], dist.Work], number: int) -> dist.Work:
        """Begin what ``start`` begins, as part of an exchange, and look out for ranks that do not take part."""
        try:
            work = start()
        except RuntimeError as error:
            self._explain(error, number)
            raise
        self.expect(number, work.is_completed)
        return work

    def until(self, over: Callable[[], bool], number: int) -> None:
        """Wait until ``over()``.

        Raises:
            PeerFailed: somebody failed meanwhile.
        """
        rounds, since, looked, tries = -1, time.monotonic(), time.monotonic(), 0
        while not over():
            self.check()  # raises with what this rank waits for noted as such: it may never end
            now = time.monotonic()
            # The heartbeat itself hangs in the store: its host is stopped. Unless we were stopped, and it with us.
            if self.heartbeat.rounds != rounds or now - looked > 1:
                rounds, since = self.heartbeat.rounds, now
            elif now - since > self.timeout + 2 * self.heartbeat.interval:
                self.heartbeat.store_failed()
            looked, tries = now, tries + 1
            time.sleep(0 if tries < _SPINS else _PAUSE)
        self.arrived(number)

    def wait(self, work: dist.Work, number: int, device: torch.device) -> None:
        """Wait for the work of an exchange; on a GPU make the stream wait for it.

        Raises:
            PeerFailed: somebody failed meanwhile, or the work failed because of somebody.
        """
        if device.type == "cuda":
            self.check()
            work.wait()
            return
        self.until(work.is_completed, number)
        try:
            work.wait()
        except RuntimeError as error:
            self._explain(error, number)
            raise

    def _explain(self, error: RuntimeError, number: int) -> None:
        """gloo says that a connection broke, not whose fault it is; the heartbeat finds out."""
        end = time.monotonic() + self.timeout + 2 * self.heartbeat.interval
        with contextlib.suppress(PeerFailed):
            self.until(lambda: time.monotonic() > end, number)
        self.check(cause=error)

    def check(self, *, cause: BaseException | None = None) -> None:
        """Raise PeerFailed if somebody has failed."""
        if self.heartbeat.verdict is not None:
            rank, reason = self.heartbeat.verdict
            raise PeerFailed(rank=rank, step=self.number, reason=reason) from cause

    @property
    def number(self) -> int:
        """The declared step, or the number of the last exchange."""
        return self._group.marks.count if self.step is None else self.step


_watches: dict[str, Watch] = {}


def watch_of(group: dist.ProcessGroup) -> Watch | None:
    """The watch over a group, if there is one."""
    found = _watches.get(group.group_name)
    # A group of a process group that was made anew may have the name of an old one.
    return found if found is not None and found.heartbeat.is_current() else None


def watch_ranks(name: str, ranks: tuple[int, ...], timeout: float, group: dist.ProcessGroup | None = None) -> Watch:
    found = _watches.get(name)
    if found is None or found.heartbeat is not heartbeat():
        found = _watches[name] = Watch(name, ranks, timeout, group=group)
    found.set_timeout(timeout)
    return found


def abort(group: dist.ProcessGroup) -> threading.Thread:
    """End NCCL's kernels of a group that wait for a peer; what they were to receive is undefined from here on.

    In a thread of its own: aborting a communicator waits for the kernels of others on the device, which end when these
    are aborted, too (github.com/NVIDIA/nccl/issues/1013), and the heart has to go on beating.
    """

    def end() -> None:
        try:
            group.abort()
        except RuntimeError as error:
            print(f"cannot abort NCCL's communicator of {group.group_name}: {error}", file=sys.stderr)

    thread = threading.Thread(target=end, name="dilated-attention-abort", daemon=True)
    thread.start()
    return thread
