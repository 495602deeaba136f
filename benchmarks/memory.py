"""Memory pools on recorded work: a ring, a ring of mixed lengths, streaming, training; and acquire beside torch.empty.

python benchmarks/memory.py [--repeats 9] [--latency-only] [--output benchmarks/results/memory.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import ROOT, save
from dilated_attention_pytorch import Streaming, dilated_attention
from dilated_attention_pytorch.cli.memory_record import RECORDERS, Workload, lengths
from dilated_attention_pytorch.memory import SimplePool, read_trace, replay
from dilated_attention_pytorch.memory.compare import CONTENDERS, compare

SHAPE: dict[str, Any] = {
    "batch": 1, "heads": 8, "head_dim": 64, "segment_lengths": (256, 1024, 4096), "dilation_rates": (1, 2, 4),
    "ranks": 3, "memory_budget": 1 << 24,
}  # fmt: skip
WORK: dict[str, tuple[str, dict[str, Any]]] = {
    "ring": ("ring", {"lengths": lengths(4096, 4096, 6)}),
    "ring, mixed lengths": ("ring", {"lengths": lengths(500, 4000, 16)}),
    "streaming, mixed lengths": ("streaming", {"lengths": lengths(500, 4000, 12)}),
    "training, mixed lengths": ("training", {"lengths": lengths(100, 600, 8), "heads": 4, "head_dim": 16}),
}
BYTES = 1 << 20


def latency(rounds: int = 40) -> dict[str, float]:
    """Microseconds of acquire and return of 1 MiB in steady state, of every pool and of torch.empty in turn.

    The least of the medians of the rounds: other work on the machine only ever adds.
    """
    cpu = torch.device("cpu")
    functions: dict[str, Callable[[], object]] = {
        "torch.empty": lambda: torch.empty((BYTES,), dtype=torch.uint8, device=cpu),
        "simple, debug": _cycle(SimplePool(debug=True)),
        **{name: _cycle(make(None)) for name, make in CONTENDERS.items()},
    }
    medians: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times = []
            for _ in range(1000):
                start = time.perf_counter_ns()
                function()
                times.append(time.perf_counter_ns() - start)
            medians[name].append(statistics.median(times) / 1000)
    return {name: min(found) for name, found in medians.items()}


def _cycle(pool: Any) -> Callable[[], object]:
    cpu = torch.device("cpu")
    return lambda: pool.acquire((BYTES,), torch.uint8, cpu).release()


def end_to_end(repeats: int) -> dict[str, float]:
    """Median seconds of a forward and backward pass of streaming on the CPU with each pool, in turn."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 4096, 8, 64, requires_grad=True) for _ in range(3)]
    lengths_and_rates = SHAPE["segment_lengths"], SHAPE["dilation_rates"]
    streams = {name: Streaming("cpu", memory_budget=1 << 24, pool=make(None)) for name, make in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in streams}
    for turn in range(repeats + 1):
        for name, parallel in streams.items():
            start = time.perf_counter()
            dilated_attention(*tensors, *lengths_and_rates, parallel=parallel).sum().backward()
            if turn:  # the first fills the pools
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/memory.json")
    parser.add_argument("--latency-only", action="store_true", help="Measure that part again and keep the others.")
    arguments = parser.parse_args()
    if arguments.latency_only:
        kept = json.loads(arguments.output.read_text())["results"]
        save(arguments.output, {**kept, "microseconds_of_1_MiB": latency()}, quiet=True)
        return
    found: dict[str, Any] = {
        "microseconds_of_1_MiB": latency(),
        "seconds_of_streaming": end_to_end(arguments.repeats),
        "traces": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (what, given) in WORK.items():
            path = Path(folder) / "trace.jsonl"
            RECORDERS[what](Workload(**{**SHAPE, **given}), path)
            trace = read_trace(path)
            compared = compare(trace, repeats=arguments.repeats)
            for row in compared["pools"]:
                del row["samples"]
                warm = CONTENDERS[row["pool"]](None)
                replay(trace, warm, samples=0)
                row["misses_of_first_step_after_a_replay"] = replay(trace, warm, samples=0).misses_by_step[0]
            found["traces"][name] = compared
    save(arguments.output, found, quiet=True)


if __name__ == "__main__":
    main()
