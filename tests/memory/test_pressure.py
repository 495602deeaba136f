"""Free memory of a host, read from a tree of files, and of a GPU, from a driver that is pretended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch.memory.pressure import Room, host_room, room

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 5 kB\nMemAvailable: {48 * 2**20} kB\n"}


def group(limit: str, used: int, cache: int) -> dict[str, str]:
    return {
        "sys/fs/cgroup/memory.max": f"{limit}\n",
        "sys/fs/cgroup/memory.current": f"{used}\n",
        "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MACHINE, Room(48 * GIB, 64 * GIB)),
        ({**MACHINE, **group("max", 3 * GIB, 0)}, Room(48 * GIB, 64 * GIB)),
        ({**MACHINE, **group(str(8 * GIB), 6 * GIB, GIB)}, Room(3 * GIB, 8 * GIB)),
        ({**MACHINE, **group(str(512 * GIB), 6 * GIB, GIB)}, Room(48 * GIB, 64 * GIB)),
        (
            {
                **MACHINE,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(5 * GIB),
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
            },
            Room(0, 4 * GIB),
        ),
    ],
)
def test_the_smaller_of_machine_and_group(tmp_path: Path, files: dict[str, str], expected: Room | None):
    assert host_room(tree(tmp_path, files)) == expected


def test_this_host_has_room():
    found = room(torch.device("cpu"))
    assert found is not None
    assert 0 <= found.free <= found.total
    assert room(torch.device("meta")) is None


def test_a_gpu_counts_what_the_allocator_keeps_unused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 25)
    assert room(torch.device("cuda", 0)) == Room(15, 100)
