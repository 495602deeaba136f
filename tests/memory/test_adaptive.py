"""The adaptive pool: it gives way before a device runs out, and takes again what recurs."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.memory import AdaptivePool, Bucketing, Fragmentation, MemoryBudgetExceeded
from dilated_attention_pytorch.memory.adaptive import CHECK_EVERY
from dilated_attention_pytorch.memory.pressure import Room


class Host:
    """A device of 1,000,000 bytes, of which others use a part and the pool another."""

    def __init__(self) -> None:
        self.others = 0
        self.pool: AdaptivePool | None = None

    def __call__(self, device: torch.device) -> Room:
        # The pool asks while it holds its lock, so stats() would wait for ever.
        held = 0 if self.pool is None else sum(shop.store.held for shop in self.pool._shops.values())
        return Room(1_000_000 - self.others - held, 1_000_000)


def pool_on(host: Host, **given) -> AdaptivePool:
    host.pool = AdaptivePool(watch=host, headroom=0.1, **given)
    return host.pool


def take(pool: AdaptivePool, size: int, times: int = 1) -> None:
    for _ in range(times):
        pool.acquire((size,), torch.uint8, "cpu").release()


def test_idle_memory_is_given_up_before_the_device_runs_out():
    host = Host()
    pool = pool_on(host)
    for size in (300_000, 200_000, 100_000):
        take(pool, size)
    assert pool.stats().held == 600_000
    host.others = 250_000  # 150,000 left
    take(pool, 90_000)  # and 100,000 have to stay free: the oldest, of 300,000, goes
    stats = pool.stats()
    assert (stats.held, stats.trims) == (390_000, 1)


def test_what_is_idle_goes_while_requests_hit():
    host = Host()
    pool = pool_on(host)
    take(pool, 500_000)
    take(pool, 1000)
    host.others = 450_000
    take(pool, 1000, CHECK_EVERY)
    assert pool.stats().held == 1000


@pytest.mark.parametrize("budget", [None, 500_000])
def test_what_recurs_is_taken_again_when_there_is_room(budget: int | None):
    host = Host()
    pool = pool_on(host, budget=budget)
    take(pool, 300_000, 2)  # recurs
    take(pool, 150_000)  # does not
    host.others = 800_000
    take(pool, 2000)
    assert pool.stats().held == 2000
    host.others = 550_000  # the headroom is kept, but no more
    take(pool, 2000, CHECK_EVERY)
    assert pool.stats().held == 2000
    host.others = 0
    take(pool, 2000, CHECK_EVERY)
    before = pool.stats()
    assert before.held == 302_000
    take(pool, 300_000)
    assert pool.stats().misses == before.misses
    take(pool, 2000, CHECK_EVERY)
    assert pool.stats().held == 302_000  # once, not again and again


def test_what_was_missed_meanwhile_is_not_taken_twice():
    host = Host()
    pool = pool_on(host)
    take(pool, 300_000, 2)
    host.others = 880_000
    take(pool, 2000)
    host.others = 0
    take(pool, 300_000)
    take(pool, 2000, CHECK_EVERY)
    assert pool.stats().held == 302_000


def test_a_region_that_was_given_up_is_taken_again():
    host = Host()
    pool = pool_on(host, fragmentation=Fragmentation(region_bytes=1024))
    take(pool, 300_032)
    host.others = 880_000
    take(pool, 2048, CHECK_EVERY)
    assert pool.stats().held == 2048
    host.others = 0
    take(pool, 2048, CHECK_EVERY)
    before = pool.stats()
    assert before.held == 300_032  # with the idle region of 2,048, it is one again
    take(pool, 300_032)
    assert pool.stats().misses == before.misses


def test_a_device_that_says_nothing_is_left_alone():
    pool = AdaptivePool(watch=lambda device: None)
    take(pool, 1000, 2 * CHECK_EVERY)
    assert pool.stats().hits == 2 * CHECK_EVERY - 1


def test_a_class_that_breaks_the_budget_gives_way_to_the_size_asked_for():
    pool = AdaptivePool(bucketing=Bucketing(), budget=1100)
    with pool.acquire((1090,), torch.uint8, "cpu"):
        assert pool.stats().held == 1090
        with pytest.raises(MemoryBudgetExceeded):
            pool.acquire((11,), torch.uint8, "cpu")


@pytest.mark.parametrize("headroom", [-0.1, 1.0, float("nan")])
def test_headroom_is_a_share(headroom: float):
    with pytest.raises(ValueError, match="share from 0"):
        AdaptivePool(headroom=headroom)
