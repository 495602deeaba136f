"""The simple pool: exact reuse, budgets, and leases that are returned once. `test_leasing` has what all pools share."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.memory import LeakedLeaseWarning, LeaseError, MemoryBudgetExceeded, SimplePool


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
    with pytest.warns(LeakedLeaseWarning, match="1 leases of 10 bytes"):
        (leak,) = pool.close()
    assert (leak.bytes, leak.device, leak.taken_at) == (10, "cpu", None)
    with pytest.raises(RuntimeError, match="closed"):
        pool.acquire((10,), torch.uint8, "cpu")
    lease.release()
    assert pool.stats().held == 0


def test_a_failed_allocation_leaves_the_books_right():
    pool = SimplePool()
    with pytest.raises(RuntimeError):
        pool.acquire((2**60,), torch.uint8, "cpu")
    assert pool.stats().held == pool.stats().leased == 0
