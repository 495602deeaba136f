"""Do all ranks ask for the same? Compared through the store, where a missing rank can be named."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .errors import ConfigurationMismatch
from .watch import Watch

_PREFIX = "dilated-attention/agreement"


def agree(watch: Watch, fields: Mapping[str, object], note: str | None = None) -> list[str | None]:
    """Make sure that every rank gives the same ``fields``, compared as they print; returns all ranks' ``note``.

    Every rank of the group has to call it at the same point.

    Raises:
        ConfigurationMismatch: a rank differs from the first one; on all ranks.
        PeerFailed: a rank does not come.
    """
    number = watch.begin()
    store, prefix = watch.heartbeat.store, f"{_PREFIX}/{watch.name}/{number}"
    store.set(
        f"{prefix}/{watch.heartbeat.rank}", json.dumps([{name: repr(value) for name, value in fields.items()}, note])
    )
    keys = [f"{prefix}/{rank}" for rank in watch.ranks]
    watch.expect(number, lambda: False)
    try:
        watch.until(lambda: store.check(keys), number)
    finally:
        watch.arrived(number)
    theirs = [json.loads(store.get(key)) for key in keys]
    first = theirs[0][0]
    for rank, (other, _) in enumerate(theirs):
        for name in first:
            if other.get(name) != first[name]:
                raise ConfigurationMismatch(
                    f"rank {rank} has {name} {other.get(name)}, rank 0 has {first[name]}; give all ranks the same",
                    rank=rank,
                    name=name,
                )
    return [theirs_note for _, theirs_note in theirs]
