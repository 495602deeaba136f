"""The ranks of a device mesh as `ContextParallel` sees them: they agree, watch each other, and report failures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .agreement import agree
from .errors import ConfigurationMismatch, PeerFailed
from .watch import Watch, watch_ranks


class Peers:
    """The ranks of a device mesh of one or more dimensions, watched from here on; see `ContextParallel`."""

    def __init__(self, mesh: DeviceMesh, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; give a positive number of seconds")
        self._watches: list[Watch] = []
        if mesh.size() == 1:
            return
        groups = mesh.get_all_groups()
        self._watches = [
            watch_ranks(group.group_name, tuple(dist.get_process_group_ranks(group)), timeout, group)
            for group in groups
        ]
        if mesh.ndim > 1:
            ranks = tuple(map(int, mesh.mesh.flatten()))
            name = "mesh " + ",".join(map(str, ranks))
            self._watches.append(watch_ranks(name, ranks, timeout))

    def agree(self, fields: Mapping[str, object], note: str | None = None) -> list[str | None]:
        """Make sure that every rank gives the same ``fields``, and get their notes; see `agreement.agree`."""
        return agree(self._watches[-1], fields, note) if self._watches else [note]

    def check(self) -> None:
        """Raise `PeerFailed` if a rank has failed."""
        if self._watches:
            self._watches[-1].check()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What every rank does as step ``number``: a rank that skips one is found, one that raises is reported."""
        for watch in self._watches:
            watch.step = number
        with self.reporting():
            self.check()
            yield

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the other ranks at once when this one raises."""
        try:
            yield
        except (PeerFailed, ConfigurationMismatch):
            raise
        except BaseException as error:
            if self._watches:
                self._watches[-1].heartbeat.report(f"it raised {type(error).__name__}: {error}")
            raise
