"""A sweep: a time or a reason for every contender, length and pass."""

from __future__ import annotations

import time

import pytest
import torch

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.benchmarking import Contender, Setting, check_numerics, choose_contenders, sweep
from dilated_attention_pytorch.benchmarking.measure import TooSlow, is_out_of_memory, timed

SETTING = Setting(1, 2, 8, torch.float32, torch.device("cpu"), False, DilatedPattern((8, 32), (1, 2)))
LENGTHS = (16, 32, 64)


def contender(function, *, absent=None, prepare=None) -> Contender:
    make = prepare or (lambda setting, length: (function, setting.shape(length)))
    return Contender("fake", "fake", "dense", lambda setting: absent, make)


def statuses(fake: Contender, max_seconds: float = 5.0) -> dict:
    found = list(sweep([fake], SETTING, LENGTHS, max_seconds=max_seconds))
    assert len(found) == 2 * len(LENGTHS)
    assert all((m.milliseconds is not None) == (m.status == "ok") for m in found)
    return {(m.length, m.which): m for m in found}


def slow_from(length: int, seconds: float = 0.03):
    def function(query, key, value):
        if query.shape[1] >= length:
            time.sleep(seconds)
        return query + key + value

    return function


def test_every_pass_of_every_length_has_a_time():
    found = statuses(contender(lambda query, key, value: query * key * value))
    assert list(found) == [(n, which) for n in LENGTHS for which in ("forward", "backward")]
    for measurement in found.values():
        assert measurement.status == "ok"
        assert 0 < measurement.low <= measurement.milliseconds <= measurement.high
        assert measurement.repeats >= 3
        assert measurement.peak_bytes is None  # torch does not count on the CPU
        work = (4 if measurement.which == "forward" else 10) * 8 * 2 * measurement.length**2
        assert measurement.tflops == pytest.approx(work / measurement.milliseconds / 1e9)


def test_one_that_is_too_slow_is_not_run_again():
    runs = []

    def function(query, key, value):
        runs.append(query.shape[1])
        return slow_from(32)(query, key, value)

    found = statuses(contender(function), max_seconds=0.02)
    assert found[16, "forward"].status == found[16, "backward"].status == "ok"
    assert found[32, "forward"].detail.startswith("one run took 0.03")
    for key in ((32, "forward"), (32, "backward"), (64, "forward"), (64, "backward")):
        assert found[key].status == "too slow"
    assert "at N=32" in found[64, "forward"].detail
    assert runs.count(32) == 2
    assert runs.count(64) == 0


def test_one_that_would_take_far_too_long_is_not_begun():
    runs = []

    def function(query, key, value):
        runs.append(query.shape[1])
        return slow_from(16, 0.02)(query, key, value)

    found = list(sweep([contender(function)], SETTING, (16, 1600), max_seconds=0.1))
    forward = [m for m in found if m.which == "forward"]
    assert [m.status for m in forward] == ["ok", "too slow"]  # 10,000 times the operations: about 200 s
    assert forward[1].detail.startswith("not run: about 2")
    assert 1600 not in runs


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("can't allocate memory: x")]
)
def test_lack_of_memory_ends_a_contender(error: Exception):
    def function(query, key, value):
        if query.shape[1] > 16:
            raise error
        return query * 1

    found = statuses(contender(function))
    assert found[16, "forward"].status == "ok"
    assert {found[n, which].status for n in (32, 64) for which in ("forward", "backward")} == {"out of memory"}


def test_a_backward_pass_without_memory_leaves_the_forward_pass():
    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query):
            return query * 1

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    found = statuses(contender(lambda query, key, value: Hungry.apply(query) + key + value))
    assert {found[n, "forward"].status for n in LENGTHS} == {"ok"}
    assert {found[n, "backward"].status for n in LENGTHS} == {"out of memory"}


def test_a_length_is_prepared_once_for_both_passes():
    prepared = []

    def prepare(setting, length):
        prepared.append(length)
        return slow_from(1 << 60), setting.shape(length)

    assert {m.status for m in statuses(contender(None, prepare=prepare)).values()} == {"ok"}
    assert tuple(prepared) == LENGTHS


def test_a_failure_is_recorded_and_the_next_length_tried():
    def function(query, key, value):
        if query.shape[1] == 32:
            raise RuntimeError("no kernel\nmore")
        return query + key + value

    found = statuses(contender(function))
    assert found[32, "forward"].status == found[32, "backward"].status == "failed"
    assert found[32, "forward"].detail == "RuntimeError: no kernel"
    assert found[64, "forward"].status == "ok"


def test_one_that_is_absent_is_listed_with_the_reason():
    def prepare(setting, length):
        raise AssertionError("it is not asked")

    found = statuses(contender(None, absent="no such library", prepare=prepare))
    assert {(m.status, m.detail) for m in found.values()} == {("absent", "no such library")}


def test_an_interruption_passes_through():
    def function(query, key, value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statuses(contender(function))


def test_a_first_slow_run_does_not_count():
    delays = iter([0.05])
    assert max(timed(lambda: time.sleep(next(delays, 0)), torch.device("cpu"), 0.02)) < 0.02
    with pytest.raises(TooSlow):
        timed(lambda: time.sleep(0.03), torch.device("cpu"), 0.02)


def test_other_runtime_errors_are_not_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("a defect"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_numerics_are_checked_against_the_reference(monkeypatch: pytest.MonkeyPatch):
    (ours,) = choose_contenders(["ours"])
    checked = check_numerics(ours, SETTING, 40)
    assert checked.passed
    assert checked.backend == "sdpa"
    assert set(checked.errors) == {"out", "lse", "dq", "dk", "dv"}
    assert all(0 <= checked.errors[name] <= checked.bounds[name] for name in checked.errors)

    from dilated_attention_pytorch.backends import sdpa

    right = sdpa.forward

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(sdpa, "forward", wrong)
    assert check_numerics(ours, SETTING, 40).passed is False
