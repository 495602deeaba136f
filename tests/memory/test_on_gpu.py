"""Pools on a real GPU: four side streams with poison values, page-locked staging, and memory of a pool of its own."""

from __future__ import annotations

import random

import pytest
import torch

from dilated_attention_pytorch.memory import AdaptivePool, Bucketing, Fragmentation, SimplePool, create_memory_pool

POISON = -1
KINDS = {
    "simple": SimplePool,
    "bucketing": lambda: AdaptivePool(bucketing=Bucketing()),
    "fragmentation": lambda: AdaptivePool(fragmentation=Fragmentation()),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_four_side_streams_never_see_each_others_values(kind: str):
    pool, choose = KINDS[kind](), random.Random(0)
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    busy = torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    kept = []
    for mark in range(10_000):
        stream = choose.choice(streams)
        with torch.cuda.stream(stream):
            if mark % 8 == 0:
                busy @ busy  # so that the host runs ahead and memory comes back long before it was used
            lease = pool.acquire((choose.choice((1000, 5000, 30_000)),), torch.int64, "cuda", stream=stream)
            lease.tensor.fill_(mark)
            kept.append((lease, mark, stream))
        if len(kept) > 6:
            lease, mark, stream = kept.pop(choose.randrange(len(kept)))
            with torch.cuda.stream(stream):
                wrong_here = (lease.tensor != mark).sum()
                lease.tensor.fill_(POISON)
                lease.release()
            torch.cuda.current_stream().wait_stream(stream)
            wrong += wrong_here
            wrong_here.record_stream(torch.cuda.current_stream())
    for lease, _, _ in kept:
        lease.release()
    torch.cuda.synchronize()
    assert int(wrong) == 0
    stats = pool.stats()
    assert (stats.leased, stats.requests) == (0, 10_000)
    assert stats.misses < 100
    assert pool.trim() == stats.held


@pytest.mark.gpu
def test_page_locked_memory_comes_back_when_its_copy_is_over():
    pool = create_memory_pool("simple", device="cuda", pinned=True)
    target = torch.zeros(200, 1 << 20, dtype=torch.uint8, device="cuda")
    for n in range(200):
        with pool.acquire((1 << 20,), torch.uint8, "cpu") as lease:
            assert lease.tensor.is_pinned()
            lease.tensor.fill_(n)
            target[n].copy_(lease.tensor, non_blocking=True)
    expected = torch.arange(200, dtype=torch.uint8, device="cuda")[:, None]
    assert bool((target == expected).all())
    assert pool.stats().misses == 1


@pytest.mark.gpu
@pytest.mark.parametrize("strategies", [(), ("fragmentation",), ("numa",)])
def test_memory_of_a_pool_of_its_own(strategies: tuple[str, ...]):
    pool = create_memory_pool("adaptive", device="cuda", strategies=strategies, backing="mem_pool")
    for _ in range(3):
        with pool.acquire((1 << 20,), torch.float32, "cuda") as lease:
            assert float(lease.tensor.fill_(1.0).sum()) == 1 << 20
    stats = pool.stats()
    assert stats.misses == 1
    pool.close()
    assert pool.stats().held == 0
