"""Waiting for others: what ends a communicator, what the heartbeat asks of an exchange, what is refused."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dilated_attention_pytorch.parallel import watch
from dilated_attention_pytorch.parallel.heartbeat import Group, Heartbeat, Peer


class Communicator:
    """A group whose abort waits for that of another, as kernels of both on one device make it wait."""

    def __init__(self, name: str) -> None:
        self.group_name, self.ended, self.first = name, threading.Event(), threading.Event()

    def abort(self) -> None:
        self.ended.set()
        assert self.first.wait(5)


def test_communicators_are_aborted_at_once_and_nobody_waits_for_it(capfd: pytest.CaptureFixture[str]):
    first, second = Communicator("first"), Communicator("second")
    first.first, second.first = second.ended, first.ended
    heart = Heartbeat(dist.HashStore(), 0)
    threads = []
    heart.on_failure += [lambda group=group: threads.append(watch.abort(group)) for group in (first, second)]
    begun = time.monotonic()
    heart._decide(1, "gone")
    heart._decide(2, "gone, too")  # the first verdict counts
    assert time.monotonic() - begun < 4
    assert heart.verdict == (1, "gone")
    assert len(threads) == 2
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert capfd.readouterr().err == ""


def test_a_communicator_that_cannot_be_aborted_is_named(capfd: pytest.CaptureFixture[str]):
    def abort() -> None:
        raise RuntimeError("no such luck")

    watch.abort(SimpleNamespace(group_name="pair", abort=abort)).join(10)
    assert capfd.readouterr().err == "cannot abort NCCL's communicator of pair: no such luck\n"


def test_what_is_over_is_not_asked_for_again_and_an_error_is_not_the_stores():
    heart, group, asked = Heartbeat(dist.HashStore(), 0), Group((0, 1), 5.0), []
    heart._peers[1] = Peer(beat=1, groups={"pair": [0, {}]})

    def over(number: int) -> bool:
        asked.append(number)
        if number == 3:
            raise RuntimeError("an error on the device")
        return number == 1

    now = time.monotonic()
    for number in (1, 2, 3):
        group.waiting[number] = now, lambda number=number: over(number)
    assert heart._behind("pair", group, now) is None
    assert heart._behind("pair", group, now) is None
    assert asked == [1, 2, 3, 2, 3]
    found = heart._behind("pair", group, now + 6)
    assert found is not None
    assert found[0] == 1
    assert "did not take part in exchange 1" in found[1]


def test_an_exchange_is_not_captured_in_a_cuda_graph(pool):
    for status, answer in pool.run("captured", 2):
        assert status == "done", answer
        assert answer == "a CUDA graph is being captured"


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses", "sparse"])
def test_buffers_come_back_after_an_error(pool, strategy, phase):
    for status, answer in pool.run("broken", 3, strategy, phase):
        assert status == "done", answer
        assert answer["raised"]
        assert answer["leased"] == 0
        assert answer["requests"] > 0
        assert answer["error"] < 1e-12
        assert answer["leased_after"] == 0
