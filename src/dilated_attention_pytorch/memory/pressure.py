"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch


class Room(NamedTuple):
    """Bytes of a device that PyTorch could still take, and all that it has."""

    free: int
    total: int


def room(device: torch.device) -> Room | None:
    """Of a GPU or of the host; None for other devices, and where the system does not say.

    A GPU's free memory is what the driver has plus what PyTorch's allocator keeps without using it.
    """
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return Room(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), whole)
    return host_room() if device.type == "cpu" else None


def host_room(root: Path = Path("/")) -> Room | None:
    """Of the host: of the machine, or of the control group (version 2, or 1) if that has less.

    Args:
        root: where /proc and /sys are, for tests.
    """
    found = [one for one in (_machine(root), *_groups(root)) if one is not None]
    return min(found, default=None)


def _machine(root: Path) -> Room | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    if "MemAvailable" not in sizes:
        return None
    return Room(sizes["MemAvailable"], sizes["MemTotal"])


def _groups(root: Path) -> list[Room]:
    found = []
    for folder, limit, used, cache in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = ((root / folder / name).read_text().strip() for name in (limit, used))
            lines = (root / folder / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        if most.isdigit():  # "max" is no limit
            reclaimable = sum(int(line.split()[1]) for line in lines if line.split()[:1] == [cache])
            found.append(Room(max(int(most) - int(now) + reclaimable, 0), int(most)))
    return found
