"""Traces: what is written is what happened, and what is read is checked."""

from __future__ import annotations

import io
import json
import re
import threading

import pytest
import torch

from dilated_attention_pytorch.memory import LeaseError, MemoryBudgetExceeded, RecordingPool, SimplePool, read_trace
from dilated_attention_pytorch.memory.trace import FORMAT

HEAD = json.dumps({"format": FORMAT, "version": 1, "what": "a test"})


def test_a_recording_tells_what_happened():
    text = io.StringIO()
    pool = RecordingPool(SimplePool(budget=100), text, what="a test")
    first = pool.acquire((2, 3), torch.float32, "cpu")
    second = pool.acquire((5,), torch.uint8, torch.device("cpu"))
    with pytest.raises(MemoryBudgetExceeded):
        pool.acquire((100,), torch.uint8, "cpu")
    first.release()
    with pytest.raises(LeaseError, match="return it once"):
        first.release()
    pool.step()
    second.release()
    assert pool.stats().requests == 3
    assert pool.trim() == 29
    assert pool.close() == ()
    trace = read_trace(text.getvalue().splitlines())
    assert [(event.op, event.lease, event.bytes) for event in trace.events] == [
        ("acquire", 0, 24), ("acquire", 1, 5), ("return", 0, 0), ("step", -1, 0), ("return", 1, 0),
    ]  # fmt: skip
    assert (trace.what, trace.requests, trace.asked_at_once) == ("a test", 2, 29)
    times = [event.seconds for event in trace.events]
    assert times == sorted(times)


def test_threads_write_whole_lines():
    text = io.StringIO()
    pool = RecordingPool(SimplePool(), text)

    def work() -> None:
        for n in range(200):
            pool.acquire((n % 7 + 1,), torch.uint8, "cpu").release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace = read_trace(text.getvalue().splitlines())
    assert (trace.requests, len(trace.events)) == (800, 1600)


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        ([], "does not start as a trace does"),
        (["{}"], "does not start as a trace does"),
        (["hello"], "line 1 of the trace is no JSON"),
        ([HEAD, "[1]"], "a line without an op"),
        ([HEAD, '{"op":"return","lease":3}'], "line 2 of the trace: 'return' of lease 3"),
        ([HEAD, *['{"op":"acquire","lease":1,"bytes":4}'] * 2], "line 3 of the trace: 'acquire' of lease 1"),
        ([HEAD, '{"op":"jump"}'], "'jump'"),
    ],
)
def test_what_is_no_trace_is_refused(lines: list[str], fragment: str):
    with pytest.raises(ValueError, match=re.escape(fragment)):
        read_trace(lines)
