"""What every kind of pool holds to: no aliases, books that add up, budgets, threads, streams, leaks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dilated_attention_pytorch.memory import (
    AdaptivePool,
    Bucketing,
    Fragmentation,
    LeakedLeaseWarning,
    LeaseError,
    MemoryBudgetExceeded,
    SimplePool,
)
from dilated_attention_pytorch.memory.backing import Fence
from dilated_attention_pytorch.memory.leasing import LeasePool

SMALL = Fragmentation(region_bytes=2048)
KINDS: dict[str, Callable[..., LeasePool]] = {
    "simple": SimplePool,
    "adaptive": AdaptivePool,
    "bucketing": lambda **given: AdaptivePool(bucketing=Bucketing(), **given),
    "fragmentation": lambda **given: AdaptivePool(fragmentation=SMALL, **given),
    "no compaction": lambda **given: AdaptivePool(
        fragmentation=Fragmentation(region_bytes=2048, compaction=False), **given
    ),
    "both": lambda **given: AdaptivePool(bucketing=Bucketing(max_waste=0.1), fragmentation=SMALL, **given),
}


def on_gpu(kind: str, backing: Memories, **given) -> LeasePool:
    """A pool over a simulated GPU, which the driver knows nothing of."""
    watch = {} if kind == "simple" else {"watch": lambda device: None}
    return KINDS[kind](backing=backing, **watch, **given)


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_ten_thousand_cycles_over_eight_threads(kind: str):
    pool, wrong = KINDS[kind](), []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        choose, kept = random.Random(number), []
        start.wait()
        for step in range(1250):
            size, mark = choose.choice((8, 64, 100, 1000)), number * 10_000 + step
            lease = pool.acquire((size,), torch.int64, "cpu")
            lease.tensor.fill_(mark)
            kept.append((lease, mark))
            if len(kept) > 2:
                lease, mark = kept.pop(choose.randrange(3))
                if not bool((lease.tensor == mark).all()):
                    wrong.append(mark)
                lease.tensor.fill_(-1)  # poison: a later owner's value is never this
                lease.release()
        for lease, mark in kept:
            if not bool((lease.tensor == mark).all()):
                wrong.append(mark)
            lease.release()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = pool.stats()
    assert stats.requests == 10_000
    assert stats.leased == stats.asked == 0
    assert stats.misses <= 4 * 24
    assert pool.trim() == stats.held
    assert pool.stats().held == 0


@every_kind
def test_of_threads_that_return_a_lease_one_succeeds(kind: str):
    pool = KINDS[kind]()
    for _ in range(50):
        lease, errors = pool.acquire((100,), torch.uint8, "cpu"), []
        start = threading.Barrier(4)

        def give_back(lease=lease, errors=errors, start=start) -> None:
            start.wait()
            try:
                lease.release()
            except LeaseError as error:
                errors.append(error)

        threads = [threading.Thread(target=give_back) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 3
    assert pool.stats().leased == 0


@every_kind
def test_an_exception_returns_the_lease_and_a_second_return_raises(kind: str):
    pool = KINDS[kind]()
    with pytest.raises(ZeroDivisionError), pool.acquire((3,), torch.int64, "cpu") as lease:
        _ = 1 / 0
    assert pool.stats().leased == 0
    with pytest.raises(LeaseError, match="return it once"):
        lease.release()
    with pytest.raises(LeaseError, match="acquire another"):
        _ = lease.tensor


@every_kind
def test_shapes_dtypes_and_no_bytes(kind: str):
    pool = KINDS[kind]()
    for shape, dtype in (
        ((), torch.float64),
        ((3, 0, 2), torch.float32),
        ((2, 3, 5), torch.bfloat16),
        ((7,), torch.bool),
    ):
        for _ in range(2):
            with pool.acquire(list(shape), dtype, "cpu") as lease:
                found = lease.tensor
                assert (found.shape, found.dtype, found.is_contiguous()) == (shape, dtype, True)
                if found.is_floating_point():
                    expected = torch.randn(shape).to(dtype)
                    assert torch.equal(found.copy_(expected), expected)


@every_kind
def test_gradients_and_inference_mode_leave_no_trace_on_memory(kind: str):
    pool = KINDS[kind]()
    source = torch.randn(100, requires_grad=True)
    with torch.inference_mode(), pool.acquire((100,), torch.float32, "cpu"):
        pass
    with pool.acquire((100,), torch.float32, "cpu") as lease:
        lease.tensor.copy_(source)
        assert lease.tensor.requires_grad
    with pool.acquire((100,), torch.float32, "cpu") as lease:
        assert not lease.tensor.requires_grad
        lease.tensor.fill_(1.0)
        (2 * lease.tensor.requires_grad_()).sum().backward()
    assert pool.stats().hits == 2


@every_kind
def test_stats_have_parts_that_add_up(kind: str):
    pool = KINDS[kind]()
    sizes = (1, 100, 700, 1000, 5000, 33_000)
    leases = [pool.acquire((n,), torch.uint8, "cpu") for n in sizes for _ in range(2)]
    for lease in leases[::3]:
        lease.release()
    stats = pool.stats()
    asked = sum(n for i, n in enumerate(n for n in sizes for _ in range(2)) if i % 3)
    assert stats.asked == asked
    assert stats.devices["cpu"].held == stats.held >= stats.leased >= asked
    for name in ("held", "leased", "asked", "requests", "hits"):
        assert sum(getattr(part, name) for part in stats.buckets.values()) == getattr(stats, name)
    assert stats.internal_fragmentation == pytest.approx(1 - asked / stats.leased)
    assert 0 <= stats.external_fragmentation < 1
    for size, part in stats.buckets.items():
        assert size & (size - 1) == 0
        assert part.idle_largest <= size
    for i, lease in enumerate(leases):
        if i % 3:
            lease.release()
    assert pool.trim(pool.stats().held) == 0
    assert pool.trim() > 0
    assert pool.stats().trims > 0


@every_kind
def test_close_names_what_leaked_and_where(kind: str):
    pool = KINDS[kind](debug=True)
    leases = [pool.acquire((n,), torch.uint8, "cpu") for n in (5, 7, 9)]
    leases[1].release()
    with pytest.warns(LeakedLeaseWarning, match="2 leases of 14 bytes"):
        leaks = pool.close()
    assert [leak.bytes for leak in leaks] == [5, 9]
    for leak in leaks:
        assert leak.taken_at is not None
        assert "test_close_names_what_leaked_and_where" in leak.taken_at
    with pytest.raises(RuntimeError, match="closed"):
        pool.acquire((1,), torch.uint8, "cpu")
    leases[0].release()
    leases[2].release()
    assert pool.stats().held == 0
    assert pool.close() == ()


@every_kind
def test_memory_that_is_short_is_asked_for_again_after_idle_memory_is_given_up(kind: str):
    class Short(Memories):
        limit = 20_000

        def allocate(self, size: int, device: torch.device, stream: object) -> torch.Tensor:
            if sum(m.numel() for m in self.live) + size > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().allocate(size, device, stream)

    backing = Short()
    pool = on_gpu(kind, backing)
    pool.acquire((12_288,), torch.uint8, "cuda:0").release()
    with pool.acquire((16_384,), torch.uint8, "cuda:0") as lease:
        assert lease.tensor.numel() == 16_384
        with pytest.raises(torch.OutOfMemoryError):
            pool.acquire((8192,), torch.uint8, "cuda:0")
        assert pool.stats().leased == 16_384
    assert sum(m.numel() for m in backing.live) == pool.stats().held


@every_kind
def test_a_wait_that_fails_leaves_no_lease(kind: str):
    class Failing(Memories):
        broken = False

        def wait(self, fence: Fence, device: torch.device, stream: Stream) -> None:
            if self.broken:
                raise KeyboardInterrupt
            super().wait(fence, device, stream)

    backing = Failing()
    pool = on_gpu(kind, backing)
    first, second = backing.streams[:2]
    with pool.acquire((1000,), torch.uint8, "cuda:0", stream=first) as lease:
        backing.work(lease.tensor, first)
    backing.broken = True
    with pytest.raises(KeyboardInterrupt):
        pool.acquire((1000,), torch.uint8, "cuda:0", stream=second)
    assert pool.stats().leased == 0
    backing.broken = False
    with pool.acquire((1000,), torch.uint8, "cuda:0", stream=second) as lease:
        assert all(second.has_seen(work) for _, _, work in backing.on(lease.tensor))
    assert pool.close() == ()


def test_a_pool_for_one_device_refuses_others():
    pool = SimplePool(device=torch.device("cuda", 1), backing=Memories())
    pool.acquire((4,), torch.uint8, "cuda:1").release()
    pool.acquire((4,), torch.uint8, "cpu").release()
    for _ in range(2):
        with pytest.raises(ValueError, match="device is cuda:0; this pool is for cuda:1 and cpu"):
            pool.acquire((4,), torch.uint8, "cuda:0")
    assert set(pool.stats().devices) == {"cuda:1", "cpu"}


class Stream:
    """A GPU's stream as a vector clock: what it has done, and what it has waited for."""

    def __init__(self, number: int) -> None:
        self.number, self.clock = number, dict[int, int]()

    def work(self) -> tuple[int, int]:
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.number, self.clock[self.number]

    def has_seen(self, work: tuple[int, int]) -> bool:
        return self.clock.get(work[0], 0) >= work[1]


class Memories:
    """A `Backing` whose GPU is simulated: its memory lies on the CPU."""

    notes = ()

    def __init__(self) -> None:
        self.streams = [Stream(n) for n in range(4)]
        self.current = self.streams[0]
        self.live: list[torch.Tensor] = []
        self.works: list[tuple[int, int, tuple[int, int]]] = []
        """Work on memory: first byte, end, and whose; taking it from PyTorch is work too."""

    def allocate(self, size: int, device: torch.device, stream: Stream) -> torch.Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        self.live.append(memory)
        if stream is not None:
            self.work(memory, stream)
        return memory

    def ordered(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def stream(self, device: torch.device, given: Stream | None) -> Stream:
        return given or self.current

    def fence(self, stream: Stream) -> Fence:
        return Fence(stream, tuple(stream.clock.items()))

    def wait(self, fence: Fence, device: torch.device, stream: Stream) -> None:
        for number, count in fence.event:
            stream.clock[number] = max(stream.clock.get(number, 0), count)

    def reached(self, fence: Fence) -> bool:
        return False

    def discard(self, memory: torch.Tensor, fences: tuple[Fence, ...]) -> None:
        seen = Stream(-1)
        for fence in fences:
            self.wait(fence, torch.device("cuda"), seen)
        assert all(seen.has_seen(work) for _, _, work in self.on(memory)), "given up before its users were done"
        first = memory.data_ptr()
        self.works = [w for w in self.works if w[1] <= first or w[0] >= first + memory.numel()]
        self.live = [one for one in self.live if one is not memory]

    def on(self, tensor: torch.Tensor) -> list[tuple[int, int, tuple[int, int]]]:
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return [work for work in self.works if work[0] < end and work[1] > first]

    def work(self, tensor: torch.Tensor, stream: Stream) -> None:
        first = tensor.data_ptr()
        self.works.append((first, first + tensor.nbytes, stream.work()))


@every_kind
def test_work_on_four_streams_is_in_order_wherever_memory_is_used_again(kind: str):
    """Every owner's stream has waited for all work of earlier owners of any of its bytes."""
    for seed in range(6):
        choose, backing = random.Random(seed), Memories()
        pool = on_gpu(kind, backing, budget=40_000)
        leases = []
        for _ in range(300):
            backing.current = choose.choice(backing.streams)
            if len(leases) < 6 and choose.random() < 0.6:
                given = choose.choice((None, *backing.streams))
                stream = given or backing.current
                lease = pool.acquire((choose.choice((100, 600, 1500, 4000)),), torch.uint8, "cuda:0", stream=given)
                assert all(stream.has_seen(work) for _, _, work in backing.on(lease.tensor))
                backing.work(lease.tensor, stream)
                leases.append(lease)
            elif leases:
                lease = leases.pop(choose.randrange(len(leases)))
                if choose.random() < 0.3:  # the stream that is current at the end may have worked on it too
                    backing.work(lease.tensor, backing.current)
                lease.release()
            if choose.random() < 0.03:
                pool.trim(choose.randrange(20_000))
        for lease in leases:
            lease.release()
        assert pool.stats().hits > 20
        pool.trim()
        assert backing.live == []


class Operations(RuleBasedStateMachine):
    """Any sequence of operations: leased tensors never overlap, bytes add up, the budget holds."""

    BUDGET = 20_000
    kind = "simple"

    def __init__(self) -> None:
        super().__init__()
        self.pool = KINDS[self.kind](budget=self.BUDGET)
        self.leases, self.requests = [], 0

    @rule(size=st.integers(1, 9000))
    def acquire(self, size: int) -> None:
        leased, self.requests = self.pool.stats().leased, self.requests + 1
        try:
            lease = self.pool.acquire((size,), torch.uint8, "cpu")
        except MemoryBudgetExceeded:
            # Only an arena, whose leases can be in the way, refuses what would fit.
            assert leased + size > self.BUDGET or self.pool.stats().held > leased
            return
        self.leases.append((lease, self.requests % 251))
        lease.tensor.fill_(self.leases[-1][1])

    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        if self.leases:
            lease, mark = self.leases.pop(which % len(self.leases))
            assert bool((lease.tensor == mark).all())
            lease.release()

    @rule(to_bytes=st.integers(0, 20_000))
    def trim(self, to_bytes: int) -> None:
        before = self.pool.stats().held
        assert before - self.pool.trim(to_bytes) == self.pool.stats().held

    @precondition(lambda self: isinstance(self.pool, AdaptivePool))
    @rule()
    def compact(self) -> None:
        before = self.pool.stats()
        self.pool.compact()
        after = self.pool.stats()
        assert (before.held, before.leased) == (after.held, after.leased)
        assert after.external_fragmentation <= before.external_fragmentation

    @invariant()
    def holds(self) -> None:
        stats = self.pool.stats()
        assert stats.asked == sum(lease.tensor.numel() for lease, _ in self.leases)
        assert stats.asked <= stats.leased <= stats.held <= min(self.BUDGET, stats.peak)
        assert stats.requests == self.requests
        spans = sorted((lease.tensor.data_ptr(), lease.tensor.numel()) for lease, _ in self.leases)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
        if not self.leases:
            assert stats.leased == 0


@every_kind
def test_any_sequence_of_operations(kind: str):
    machine = type(kind, (Operations,), {"kind": kind})
    case = machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, database=None)
    case().runTest()
