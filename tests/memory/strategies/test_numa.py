"""NUMA: which node is next to a device, read from a tree of files; what happens where there is no choice."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dilated_attention_pytorch.memory import Numa, create_memory_pool
from dilated_attention_pytorch.memory.strategies import numa
from dilated_attention_pytorch.memory.strategies.numa import Machine, NumaBacking, bound_to, node_of_address, numbers


def machine(root: Path, *, nodes: str = "0-1", node: int = 1) -> Machine:
    files = {
        "devices/system/node/has_memory": nodes,
        "devices/system/node/node0/cpulist": "0-3,8-11",
        "devices/system/node/node1/cpulist": "4-7",
        "bus/pci/devices/0000:3b:00.0/numa_node": str(node),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return Machine(root)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return torch.device("cuda", 0)


def test_a_list_of_numbers():
    assert numbers("0-2,5,7-8") == (0, 1, 2, 5, 7, 8)
    assert numbers("") == ()


def test_the_node_of_a_gpu(tmp_path: Path, gpu: torch.device):
    found = machine(tmp_path)
    assert found.cpus(0) == (0, 1, 2, 3, 8, 9, 10, 11)
    assert numa.choose_node(gpu, Numa(), found) == (1, "")
    assert numa.choose_node(gpu, Numa(node=0), found) == (0, "")
    assert numa.choose_node(torch.device("cpu"), Numa(node=0), found) == (0, "")


@pytest.mark.parametrize(
    ("nodes", "node", "kind", "reason"),
    [("0", 0, "cuda", "the machine has one"), ("0-1", -1, "cuda", "does not say"), ("0-1", 1, "cpu", "for no GPU")],
)
def test_no_choice_is_said(tmp_path: Path, gpu: torch.device, nodes: str, node: int, kind: str, reason: str):
    device = gpu if kind == "cuda" else torch.device("cpu")
    backing = NumaBacking(device, Numa(), machine=machine(tmp_path, nodes=nodes, node=node))
    assert backing.node is None
    assert any(reason in note for note in backing.notes)
    assert backing.allocate(10, torch.device("cpu"), None).numel() == 10


def test_a_pool_says_what_it_could_not_do():
    pool = create_memory_pool("adaptive", device="cpu", strategies=("numa",))
    pool.acquire((4,), torch.float32, "cpu").release()
    notes = " ".join(pool.stats().notes)
    assert "NUMA" in notes
    if not torch.cuda.is_available():
        assert "pageable" in notes


def test_wrong_nodes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="give the number of a NUMA node"):
        Numa(node=-1)
    with pytest.raises(ValueError, match="node is 7; this machine has the NUMA nodes 0, 1"):
        NumaBacking(torch.device("cpu"), Numa(node=7), machine=machine(tmp_path))


def test_memory_is_touched_under_the_nodes_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def call(which: int, *arguments: object) -> int:
        if which == numa._SET:
            calls.append("preferred" if arguments[1] is not None and any(arguments[1]) else "default")
            if calls[-1] == "preferred":
                assert arguments[1][0] == 1 << 1
        elif arguments[-1].value == numa._NODE_OF_ADDRESS:
            calls.append("where")
            ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = 0
        return 0

    monkeypatch.setattr(numa, "_system_call", call)
    backing = NumaBacking(torch.device("cpu"), Numa(node=1), machine=machine(tmp_path))
    before = os.sched_getaffinity(0)
    memory = backing.allocate(5000, torch.device("cpu"), None)
    assert not memory.any()
    assert calls == ["preferred", "default", "where"]
    assert os.sched_getaffinity(0) == before
    assert any("is on NUMA node 0 instead of 1" in note for note in backing.notes)


def test_thread_and_policy_are_put_back():
    before = os.sched_getaffinity(0)
    one = min(before)
    with bound_to(0, (one,)):
        assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError), bound_to(0, (one,)):
        _ = 1 / 0
    assert os.sched_getaffinity(0) == before
    with bound_to(0, ()):  # none of the node's CPUs is allowed
        assert os.sched_getaffinity(0) == before


def test_where_the_system_refuses_nothing_is_set():
    calls = []
    with bound_to(0, (), lambda which, *rest: calls.append(which) or -1):
        pass
    assert calls == [numa._GET]
    assert node_of_address(0, lambda *rest: -1) is None


def test_the_system_names_the_node_of_a_page():
    memory = torch.ones(10_000)
    assert node_of_address(memory.data_ptr()) in (None, *Machine().nodes())
