"""Time and memory of one contender at one length: the median of repeated runs, or why there is none."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .contenders import Attention, Setting

Pass = Literal["forward", "backward"]
Status = Literal["ok", "too slow", "out of memory", "failed", "absent", "not run"]
Prepare = Callable[[], tuple[Attention, tuple[int, ...]]]
PASSES: tuple[Pass, Pass] = ("forward", "backward")

BUDGET_SECONDS = 0.3
"""About how long a measurement repeats its run."""
FEWEST, MOST = 3, 100
CACHE_BYTES = 256 << 20
"""Written before every run on a GPU, so that no run finds its inputs in the cache."""

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


@dataclass(frozen=True)
class Measurement:
    """One pass of one contender at one length. Only with status "ok" is there a time.

    ``low`` and ``high`` are the quartiles of the runs in milliseconds, ``peak_bytes`` what was allocated beyond what
    was there when the pass began (None on the CPU).
    """

    contender: str
    length: int
    which: Pass
    status: Status
    detail: str = ""
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    repeats: int = 0
    tflops: float | None = None
    peak_bytes: int | None = None


class TooSlow(Exception):
    """One run took longer than the limit."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"one run took {seconds:.3g} s")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; for torch that is a RuntimeError like many others."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def run_seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> list[float]:
    """Seconds of every one of ``repeats`` runs."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start_event, end_event in events:
        cache.zero_()
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize(device)
    return [start_event.elapsed_time(end_event) / 1e3 for start_event, end_event in events]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated at the peak of a run beyond those before it; None where torch does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del kept
    return peak


def timed(run: Callable[[], object], device: torch.device, max_seconds: float) -> list[float]:
    """Seconds of repeated runs after a first that does not count (it may compile).

    Raises:
        TooSlow: one run took more than ``max_seconds``.
    """
    run_seconds(run, device)
    times = run_seconds(run, device)
    if times[0] > max_seconds:
        raise TooSlow(times[0])
    repeats = min(MOST, max(FEWEST, math.ceil(min(BUDGET_SECONDS, max_seconds) / max(times[0], 1e-9))))
    return times + run_seconds(run, device, repeats - 1)


def _one_pass(
    name: str, prepare: Prepare, setting: Setting, length: int, which: Pass, flops: int, max_seconds: float
) -> Measurement:
    function, shape = prepare()
    generator = torch.Generator(setting.device).manual_seed(length)
    inputs = [
        torch.randn(shape, generator=generator, device=setting.device, dtype=setting.dtype).requires_grad_()
        for _ in range(3)
    ]
    if which == "forward":

        def run() -> object:
            with torch.no_grad():
                return function(*inputs)
    else:
        recorded = function(*inputs)
        gradient = torch.randn_like(recorded)

        def run() -> object:
            return torch.autograd.grad(recorded, inputs, gradient, retain_graph=True)

    times = timed(run, setting.device, max_seconds)
    low, middle, high = (1e3 * t for t in statistics.quantiles(times, n=4, method="inclusive"))
    return Measurement(
        name, length, which, "ok", "", middle, low, high, len(times), flops / middle / 1e9,
        peak_bytes(run, setting.device),
    )  # fmt: skip


def measure(
    name: str, prepare: Prepare, setting: Setting, length: int, which: Pass, flops: int, *, max_seconds: float
) -> Measurement:
    """Measure one pass of what ``prepare`` gives; whatever goes wrong is the measurement's status."""
    status: Status
    try:
        return _one_pass(name, prepare, setting, length, which, flops, max_seconds)
    except TooSlow as error:
        status, detail = "too slow", f"{error}, more than the limit of {max_seconds:g} s"
    except Exception as error:  # a contender that fails is a finding, and the others still count
        status = "out of memory" if is_out_of_memory(error) else "failed"
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return Measurement(name, length, which, status, detail)
