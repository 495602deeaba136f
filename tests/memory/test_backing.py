"""PyTorch's allocators behind a pool; what concerns GPUs with a CUDA that is pretended."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dilated_attention_pytorch.memory import SimplePool
from dilated_attention_pytorch.memory.backing import Fence, TorchBacking, registered_mem_pool

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.log.append("host waits")


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> Event:
        self.log.append(f"{self.name} marks")
        return Event(self.log)

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A CUDA that writes down what is asked of it, and whose memory lies on the CPU."""
    log: list[str] = []
    current = Stream("current", log)

    @contextmanager
    def stream(given: Stream):
        log.append(f"on {given.name}")
        yield

    @contextmanager
    def use(pool: object, device: torch.device):
        log.append(f"from {pool}")
        yield

    empty = torch.empty

    def pretend(size, *, dtype, device, pin_memory=False):
        log.append("pinned" if pin_memory else f"{device}")
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    monkeypatch.setattr(torch, "empty", pretend)
    return SimpleNamespace(log=log, current=current, stream=lambda name: Stream(name, log))


def test_memory_is_taken_on_its_users_stream(cuda: SimpleNamespace):
    TorchBacking().allocate(8, GPU, cuda.stream("side"))
    assert cuda.log == ["on side", "cuda:0"]
    cuda.log.clear()
    TorchBacking(mem_pool="a pool").allocate(8, GPU, cuda.current)
    assert cuda.log == ["on current", "from a pool", "cuda:0"]


def test_a_gpus_next_user_waits_on_its_stream_only_if_it_is_another(cuda: SimpleNamespace):
    pool, side, other = SimplePool(), cuda.stream("side"), cuda.stream("other")
    pool.acquire((8,), torch.uint8, GPU, stream=side).release()
    assert cuda.log == ["on side", "cuda:0", "side marks", "current marks"]
    cuda.log.clear()
    lease = pool.acquire((8,), torch.uint8, GPU, stream=other)
    assert cuda.log == ["other waits", "other waits"]
    cuda.log.clear()
    lease.release()
    pool.acquire((8,), torch.uint8, GPU).release()
    assert cuda.log == ["other marks", "current marks", "current waits", "current marks"]


def test_page_locked_memory_is_given_out_when_copies_from_it_are_over(cuda: SimpleNamespace):
    pool = SimplePool(pinned=True)
    pool.acquire((8,), torch.uint8, CPU, stream=cuda.current).release()
    assert cuda.log == ["pinned", "current marks"]
    cuda.log.clear()
    pool.acquire((8,), torch.uint8, CPU).release()
    assert cuda.log == ["host waits", "current marks"]
    cuda.log.clear()
    pool.trim()
    assert cuda.log == ["host waits"]
    assert pool.stats().notes == ()


def test_memory_of_a_gpu_is_given_up_in_the_order_of_its_users(cuda: SimpleNamespace):
    seen = []
    memory = SimpleNamespace(is_cuda=True, record_stream=seen.append)
    TorchBacking().discard(memory, (Fence("one", None), Fence("two", None)))
    assert seen == ["one", "two"]


def test_without_a_gpu_memory_is_pageable_and_that_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pool = SimplePool(pinned=True)
    pool.acquire((8,), torch.uint8, "cpu").release()
    assert pool.stats().notes == ("host memory is pageable: page-locked memory needs a CUDA device",)


def test_a_pool_of_memory_is_registered_with_nccl(monkeypatch: pytest.MonkeyPatch):
    made, registered = [], []
    monkeypatch.setattr(torch.cuda, "MemPool", lambda allocator=None: made.append(allocator) or "a pool")
    nccl = SimpleNamespace(mem_allocator="NCCL's", register_mem_pool=registered.append)
    assert registered_mem_pool(SimpleNamespace(_get_backend=lambda device: nccl)) == "a pool"
    assert (made, registered) == (["NCCL's"], ["a pool"])


def test_a_group_that_registers_nothing_is_refused():
    def none(device: torch.device) -> object:
        raise RuntimeError("No backend type associated with device type cuda")

    with pytest.raises(ValueError, match="give one of NCCL"):
        registered_mem_pool(SimpleNamespace(_get_backend=none))
    with pytest.raises(ValueError, match="give a process group of NCCL"):
        registered_mem_pool(SimpleNamespace(_get_backend=lambda device: SimpleNamespace()))
