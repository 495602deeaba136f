"""The arena: best fit, joining of neighbours, compaction, regions that are given up."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dilated_attention_pytorch.memory import AdaptivePool, Fragmentation, MemoryBudgetExceeded


def pool_of(**given) -> AdaptivePool:
    budget = given.pop("budget", None)
    return AdaptivePool(fragmentation=Fragmentation(**{"region_bytes": 1 << 20, **given}), budget=budget)


def lease(pool: AdaptivePool, kib: int):
    return pool.acquire((kib * 1024,), torch.uint8, "cpu")


def test_the_smallest_gap_that_fits_is_taken():
    pool = pool_of()
    blocks = [lease(pool, kib) for kib in (100, 4, 50, 4, 70, 4)]
    places = [block.tensor.data_ptr() for block in blocks]
    assert [b - a for a, b in pairwise(places)] == [k * 1024 for k in (100, 4, 50, 4, 70)]
    for number in (0, 2, 4):
        blocks[number].release()
    with lease(pool, 60) as found, lease(pool, 90) as other, lease(pool, 48) as third:
        assert found.tensor.data_ptr() == places[4]
        assert other.tensor.data_ptr() == places[0]
        assert third.tensor.data_ptr() == places[2]
    assert pool.stats().misses == 1


def test_neighbours_are_joined_in_any_order():
    pool = pool_of(region_bytes=512)
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        whole = lease(pool, 300)
        whole.release()
        held = pool.stats().held
        blocks = [lease(pool, 100) for _ in range(3)]
        for number in order:
            blocks[number].release()
        stats = pool.stats()
        assert (stats.held, stats.idle_largest, stats.external_fragmentation) == (held, 300 * 1024, 0)


def test_external_fragmentation_is_what_lies_outside_the_largest_gap():
    pool = pool_of(region_bytes=1000 * 1024)
    blocks = [lease(pool, 100) for _ in range(10)]
    for number in (0, 2, 3, 9):
        blocks[number].release()
    stats = pool.stats()
    assert (stats.idle, stats.idle_largest) == (400 * 1024, 200 * 1024)
    assert stats.external_fragmentation == 0.5


def test_idle_regions_become_one_when_a_request_needs_it():
    pool = pool_of(region_bytes=512)
    blocks = [lease(pool, 100) for _ in range(5)]
    assert pool.stats().misses == 5
    for block in blocks[1:]:
        block.release()
    with lease(pool, 380) as found:
        assert found.tensor.numel() == 380 * 1024
        assert pool.stats().held == 500 * 1024
    assert pool.stats().peak == 500 * 1024
    blocks[0].release()
    with lease(pool, 500):  # nothing is on loan: all of it becomes one
        assert pool.stats().held == 500 * 1024


def test_when_nothing_is_on_loan_the_next_request_finds_one_region():
    pool = pool_of(region_bytes=512)
    blocks = [lease(pool, 100) for _ in range(3)]
    for block in blocks:
        block.release()
    with lease(pool, 10):  # any of the three would do
        stats = pool.stats()
        assert (stats.held, stats.idle_largest) == (300 * 1024, 290 * 1024)
    lease(pool, 20).release()
    assert pool.stats().misses == 4


def test_without_compaction_regions_stay():
    pool = pool_of(region_bytes=512, compaction=False)
    blocks = [lease(pool, 100) for _ in range(4)]
    for block in blocks:
        block.release()
    assert pool.compact() == 0
    assert pool.stats().external_fragmentation == 0.75
    lease(pool, 400).release()
    assert pool.stats().held == 800 * 1024


def test_compaction_leaves_leases_where_they_are():
    pool = pool_of(region_bytes=512)
    blocks = [lease(pool, 100) for _ in range(4)]
    blocks[2].tensor.fill_(7)
    for number in (0, 1, 3):
        blocks[number].release()
    assert pool.compact() == 3
    stats = pool.stats()
    assert (stats.held, stats.idle_largest, stats.external_fragmentation) == (400 * 1024, 300 * 1024, 0)
    assert bool((blocks[2].tensor == 7).all())


def test_a_region_gives_way_to_the_budget_only_when_it_is_idle():
    pool = pool_of(region_bytes=200 * 1024, budget=300 * 1024)
    kept = lease(pool, 10)
    assert pool.stats().held == 200 * 1024
    with pytest.raises(MemoryBudgetExceeded, match="10,240 of 307,200 are on loan in 204,800 that cannot be given up"):
        lease(pool, 250)
    lease(pool, 100).release()
    assert pool.trim() == 0
    kept.release()
    lease(pool, 300).release()
    assert pool.stats().held == 300 * 1024


@pytest.mark.parametrize("size", [0, 511])
def test_regions_have_a_least_size(size: int):
    with pytest.raises(ValueError, match="at least 512"):
        Fragmentation(region_bytes=size)
