"""The simple pool: no aliases, exact reuse, budgets, leases that are returned once, and threads."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dilated_attention_pytorch.memory import LeaseError, MemoryBudgetExceeded, SimplePool


def test_a_buffer_of_the_same_bytes_is_used_again():
    pool = SimplePool()
    with pool.acquire((4, 8), torch.float32, "cpu") as first:
        place = first.tensor.data_ptr()
        assert first.tensor.shape == (4, 8)
    with pool.acquire((64,), torch.bfloat16, "cpu") as second:
        assert second.tensor.data_ptr() == place
        with pool.acquire((4, 8), torch.float32, "cpu") as third:
            assert third.tensor.data_ptr() != place
    stats = pool.stats()
    assert (stats.requests, stats.hits, stats.misses, stats.held, stats.leased, stats.peak) == (3, 1, 2, 256, 0, 256)


def test_a_lease_is_returned_once_and_unusable_after():
    pool = SimplePool()
    lease = pool.acquire((3,), torch.int64, "cpu")
    lease.release()
    with pytest.raises(LeaseError, match="return it once"):
        lease.release()
    with pytest.raises(LeaseError, match="acquire another"):
        _ = lease.tensor
    with pool.acquire((3,), torch.int64, "cpu") as inside:
        inside.release()  # early; the end of the block does not return it again
    with pytest.raises(ZeroDivisionError), pool.acquire((3,), torch.int64, "cpu"):
        _ = 1 / 0
    assert pool.stats().leased == 0


def test_the_budget_counts_what_is_held_and_trims_what_is_idle():
    pool = SimplePool(budget=100)
    pool.acquire((60,), torch.uint8, "cpu").release()
    kept = pool.acquire((50,), torch.uint8, "cpu")  # needs the idle 60
    assert pool.stats().held == 50
    assert pool.stats().trims == 1
    with pytest.raises(MemoryBudgetExceeded, match="51 bytes asked for, 50 of 100 are on loan"):
        pool.acquire((51,), torch.uint8, "cpu")
    kept.release()
    assert pool.trim(50) == 0
    assert pool.trim() == 50
    for budget in (-1, 1.5, True):
        with pytest.raises(ValueError, match="give a number of bytes"):
            SimplePool(budget=budget)


def test_a_closed_pool_takes_back_but_gives_nothing():
    pool = SimplePool()
    lease = pool.acquire((10,), torch.uint8, "cpu")
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.acquire((10,), torch.uint8, "cpu")
    lease.release()
    assert pool.stats().held == 0


def test_a_failed_allocation_leaves_the_books_right():
    pool = SimplePool()
    with pytest.raises(RuntimeError):
        pool.acquire((2**60,), torch.uint8, "cpu")
    assert pool.stats().held == pool.stats().leased == 0


def test_threads_never_share_a_buffer():
    pool, torn = SimplePool(), []

    def work(number: int) -> None:
        choose = random.Random(number)
        for step in range(1250):
            size = choose.choice((8, 64, 1000))
            with pool.acquire((size,), torch.int64, "cpu") as lease:
                mark = number * 10_000 + step
                lease.tensor.fill_(mark)
                if not bool((lease.tensor == mark).all()):
                    torn.append(mark)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torn == []
    stats = pool.stats()
    assert stats.requests == 10_000
    assert stats.leased == 0
    assert stats.misses <= 24


class Operations(RuleBasedStateMachine):
    """Any sequence of operations: leased tensors never overlap, bytes add up, the budget holds."""

    BUDGET = 500

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.leases = SimplePool(budget=self.BUDGET), []

    @rule(size=st.integers(1, 300))
    def acquire(self, size: int) -> None:
        leased = sum(lease.tensor.numel() for lease in self.leases)
        if leased + size > self.BUDGET:
            with pytest.raises(MemoryBudgetExceeded):
                self.pool.acquire((size,), torch.uint8, "cpu")
        else:
            self.leases.append(self.pool.acquire((size,), torch.uint8, "cpu"))

    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        if self.leases:
            self.leases.pop(which % len(self.leases)).release()

    @rule(to_bytes=st.integers(0, 500))
    def trim(self, to_bytes: int) -> None:
        before = self.pool.stats().held
        assert before - self.pool.trim(to_bytes) == self.pool.stats().held

    @invariant()
    def holds(self) -> None:
        stats = self.pool.stats()
        assert stats.leased == sum(lease.tensor.numel() for lease in self.leases)
        assert stats.leased <= stats.held <= min(self.BUDGET, stats.peak)
        spans = sorted((lease.tensor.data_ptr(), lease.tensor.numel()) for lease in self.leases)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
