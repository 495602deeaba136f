"""Host memory on the NUMA node of a GPU: PCI address -> sysfs -> node -> CPUs and memory policy."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backing import TorchBacking

# Numbers of set_mempolicy and get_mempolicy, for which the C library has no functions of its own.
_CALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}
_SET, _GET = 0, 1
_PREFERRED = 1
_WORDS, _BITS = 16, 8 * ctypes.sizeof(ctypes.c_ulong)  # of a set of nodes: as many as Linux can be built for
_NODE_OF_ADDRESS = 3  # MPOL_F_NODE | MPOL_F_ADDR


@dataclass(frozen=True, kw_only=True)
class Numa:
    """Takes host memory from the NUMA node that the GPU is attached to, page-locked.

    Args:
        node: the node; by default that of the pool's device.

    Copies between a GPU and the memory of another socket cross the link between sockets. Where there is one node, no
    GPU, or no access to the tables of the system, memory is what it would be without this, and the statistics' notes
    say so.
    """

    node: int | None = None

    def __post_init__(self) -> None:
        if self.node is not None and (isinstance(self.node, bool) or self.node < 0):
            raise ValueError(f"node is {self.node!r}; give the number of a NUMA node, or None for that of the device")


class Machine:
    """What sysfs says of NUMA nodes; tests give a tree of their own.

    Args:
        root: where sysfs is mounted.
    """

    def __init__(self, root: Path = Path("/sys")) -> None:
        self.root = root

    def nodes(self) -> tuple[int, ...]:
        """Nodes that have memory; none where the system does not say."""
        for name in ("has_memory", "online"):
            if text := self._read(f"devices/system/node/{name}"):
                return numbers(text)
        return ()

    def node_of(self, pci: str) -> int | None:
        """The node of a PCI device, e.g. "0000:3b:00.0"; None where the system does not say (it writes -1)."""
        text = self._read(f"bus/pci/devices/{pci.lower()}/numa_node")
        return int(text) if text and int(text) >= 0 else None

    def cpus(self, node: int) -> tuple[int, ...]:
        """CPUs of a node; none for a node of memory alone."""
        return numbers(self._read(f"devices/system/node/node{node}/cpulist"))

    def _read(self, name: str) -> str:
        try:
            return (self.root / name).read_text().strip()
        except OSError:
            return ""


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a list as sysfs writes it.

    >>> numbers("0-2,5")
    (0, 1, 2, 5)
    """
    found: list[int] = []
    for part in text.split(","):
        if part:
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return tuple(found)


def pci_address(device: torch.device) -> str:
    """The PCI address of a GPU as sysfs names it."""
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def choose_node(device: torch.device, options: Numa, machine: Machine) -> tuple[int | None, str]:
    """The node that host memory should lie on, or None and the reason.

    Raises:
        ValueError: the machine has no node of the number asked for.
    """
    nodes = machine.nodes()
    if options.node is not None and options.node not in nodes:
        raise ValueError(f"node is {options.node}; this machine has the NUMA nodes {', '.join(map(str, nodes)) or '-'}")
    if len(nodes) < 2:
        return None, "host memory is on no chosen NUMA node: the machine has one"
    if options.node is not None:
        return options.node, ""
    if device.type != "cuda":
        return None, "host memory is on no chosen NUMA node: the pool is for no GPU; give a node"
    node = machine.node_of(pci_address(device))
    if node not in nodes:
        return None, f"host memory is on no chosen NUMA node: the system does not say which is next to {device}"
    return node, ""


class NumaBacking(TorchBacking):
    """PyTorch's allocators, with host memory from one node where there is a choice."""

    def __init__(
        self, device: torch.device, options: Numa, *, machine: Machine | None = None, mem_pool: Any = None
    ) -> None:
        super().__init__(pinned=True, mem_pool=mem_pool)
        self.machine = machine or Machine()
        self.node, reason = choose_node(device, options, self.machine)
        self._misplaced = False
        if reason:
            self.notes = (*self.notes, reason)

    def allocate(self, size: int, device: torch.device, stream: Any) -> Tensor:
        """(size,) uint8 for use on ``stream``; every page of host memory is touched where it should lie."""
        if device.type != "cpu" or self.node is None:
            return super().allocate(size, device, stream)
        with bound_to(self.node, self.machine.cpus(self.node)):
            memory = super().allocate(size, device, stream)
            ctypes.memset(memory.data_ptr(), 0, size)  # by this thread: torch would share it with others
        found = node_of_address(memory.data_ptr())
        if found not in (None, self.node) and not self._misplaced:
            # PyTorch keeps page-locked memory that was freed, wherever it lies; or the node is full.
            self._misplaced = True
            self.notes = (*self.notes, f"some host memory is on NUMA node {found} instead of {self.node}")
        return memory


@contextmanager
def bound_to(node: int, cpus: tuple[int, ...], call: Callable[..., int] | None = None) -> Iterator[None]:
    """Run this thread on the node's CPUs and prefer its memory, and put both back after.

    Linux puts a page on the node of the CPU that touches it first. Where the thread may not move (none of the CPUs is
    allowed to it), the preference remains; where that is refused too, memory lies where it would without.
    """
    call = call or _system_call
    before = os.sched_getaffinity(0)
    moved = bool(before & set(cpus))
    if moved:
        os.sched_setaffinity(0, before & set(cpus))
    policy, mask, wanted = ctypes.c_int(), (ctypes.c_ulong * _WORDS)(), (ctypes.c_ulong * _WORDS)()
    size = ctypes.c_ulong(_WORDS * _BITS)
    word, bit = divmod(node, _BITS)
    wanted[word] = 1 << bit
    preferred = (
        call(_GET, ctypes.byref(policy), mask, size, None, ctypes.c_ulong(0)) == 0
        and call(_SET, ctypes.c_long(_PREFERRED), wanted, size) == 0
    )
    try:
        yield
    finally:
        if preferred:
            call(_SET, ctypes.c_long(policy.value), mask if any(mask) else None, size if any(mask) else 0)
        if moved:
            os.sched_setaffinity(0, before)


def node_of_address(address: int, call: Callable[..., int] | None = None) -> int | None:
    """The node of the page at an address; None where the system does not say."""
    node = ctypes.c_int(-1)
    where, flags = ctypes.c_void_p(address), ctypes.c_ulong(_NODE_OF_ADDRESS)
    done = (call or _system_call)(_GET, ctypes.byref(node), None, ctypes.c_ulong(0), where, flags)
    return node.value if done == 0 and node.value >= 0 else None


def _system_call(which: int, *arguments: Any) -> int:
    """set_mempolicy or get_mempolicy; -1 where it is refused or unknown."""
    found = _CALLS.get(platform.machine())
    if found is None or platform.system() != "Linux":
        return -1
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(found[which]), *arguments))
