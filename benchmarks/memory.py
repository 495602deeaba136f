"""Memory pools on recorded work: a ring, a ring of mixed lengths, streaming, training; in whole steps of a ring and of
streaming; and acquire beside torch.empty. For streaming on a GPU see `streaming.py --pools`.

python benchmarks/memory.py [--only latency|end_to_end|traces] [--device cuda:0] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from common import ROOT, provenance, save
from dilated_attention_pytorch import ContextParallel, Streaming, dilated_attention
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


def latency(device: torch.device, rounds: int = 40) -> dict[str, float]:
    """Microseconds of acquire and return of 1 MiB in steady state, of every pool and of torch.empty in turn.

    The least of the medians of the rounds: other work on the machine only ever adds.
    """
    functions: dict[str, Callable[[], object]] = {
        "torch.empty": lambda: torch.empty((BYTES,), dtype=torch.uint8, device=device),
        "simple, debug": _cycle(SimplePool(debug=True), device),
        **{name: _cycle(make(None), device) for name, make in CONTENDERS.items()},
    }
    if device.type == "cuda":
        functions["simple, page-locked"] = _cycle(SimplePool(pinned=True), torch.device("cpu"))
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


def _cycle(pool: Any, device: torch.device) -> Callable[[], object]:
    return lambda: pool.acquire((BYTES,), torch.uint8, device).release()


def _attend(parallel: Any, tensors: list[torch.Tensor]) -> float:
    """Seconds of a forward and backward pass."""
    start = time.perf_counter()
    lengths_and_rates = SHAPE["segment_lengths"], SHAPE["dilation_rates"]
    dilated_attention(*tensors, *lengths_and_rates, parallel=parallel).sum().backward()
    return time.perf_counter() - start


def _inputs(rows: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, rows, SHAPE["heads"], SHAPE["head_dim"]) for _ in range(3)]


ROUNDS = 5


def streaming_on_cpu(rows: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Steps of streaming on the CPU with each pool: see `_rounds`."""
    pools = {name: make(None) for name, make in CONTENDERS.items()}
    streams = {name: Streaming("cpu", memory_budget=1 << 24, pool=pool) for name, pool in pools.items()}
    inputs = [[t.requires_grad_() for t in _inputs(n)] for n in rows]
    return _rounds(pools, [{name: partial(_attend, one, t) for name, one in streams.items()} for t in inputs])


def ring_on_gloo(rows: tuple[int, ...], ranks: int = 2) -> dict[str, dict[str, float]]:
    """Steps of a ring of processes on the CPU with each pool: see `_rounds`; times and memory are rank 0's."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_ring_rank, (rows, ranks, folder), nprocs=ranks)
        found: dict[str, dict[str, float]] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _ring_rank(rank: int, rows: tuple[int, ...], ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    pools = {name: make(None) for name, make in CONTENDERS.items()}
    rings = {name: ContextParallel(mesh, strategy="ring", timeout=300.0, pool=pool) for name, pool in pools.items()}
    whole = {n: _inputs(n) for n in rows}

    def step(name: str, n: int) -> float:
        tensors = [rings[name].shard(t, 1).requires_grad_() for t in whole[n]]
        dist.barrier()
        return _attend(rings[name], tensors)

    found = _rounds(pools, [{name: partial(step, name, n) for name in rings} for n in rows])
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _rounds(pools: dict[str, Any], steps: list[dict[str, Callable[[], float]]]) -> dict[str, dict[str, float]]:
    """Run the steps with every pool in turn, all of them several times.

    By pool: seconds of all steps, of each the least of the rounds after the first, for other work on the machine only
    ever adds; those over the seconds of "simple"; bytes held at the peak; and requests that took new memory, in all
    and after the first round.
    """
    times: dict[str, list[list[float]]] = {name: [[] for _ in steps] for name in pools}
    first: dict[str, int] = {}
    for turn in range(ROUNDS):
        for number, functions in enumerate(steps):
            for name, function in functions.items():
                times[name][number].append(function())
        if not turn:
            first = {name: pool.stats().misses for name, pool in pools.items()}
    seconds = {name: sum(min(one[1:]) for one in found) for name, found in times.items()}
    stats = {name: pool.stats() for name, pool in pools.items()}
    return {
        name: {
            "seconds": took,
            "over_simple": took / seconds["simple"],
            "peak": stats[name].peak,
            "requests": stats[name].requests,
            "new": stats[name].misses,
            "new_after_first_round": stats[name].misses - first[name],
        }
        for name, took in seconds.items()
    }


def end_to_end() -> dict[str, dict[str, dict[str, float]]]:
    """The effect of each pool on whole steps."""
    same, mixed = (2048,), lengths(500, 2000, 6)
    return {
        "streaming": streaming_on_cpu(same),
        "streaming, mixed lengths": streaming_on_cpu(mixed),
        "ring": ring_on_gloo(same),
        "ring, mixed lengths": ring_on_gloo(mixed),
    }


def traces(repeats: int = 9) -> dict[str, Any]:
    """Recorded work replayed through each pool."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (what, given) in WORK.items():
            path = Path(folder) / "trace.jsonl"
            RECORDERS[what](Workload(**{**SHAPE, **given}), path)
            trace = read_trace(path)
            compared = compare(trace, repeats=repeats)
            for row in compared["pools"]:
                del row["samples"]
                warm = CONTENDERS[row["pool"]](None)
                replay(trace, warm, samples=0)
                row["misses_of_first_step_after_a_replay"] = replay(trace, warm, samples=0).misses_by_step[0]
            found[name] = compared
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/memory.json")
    parser.add_argument("--only", choices=("latency", "end_to_end", "traces"), help="measure this, keep the others")
    parser.add_argument("--device", default="cpu", help="whose memory the latency is of, e.g. cuda:0")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    parts: dict[str, Callable[[], Any]] = {
        "latency": partial(latency, device),
        "end_to_end": end_to_end,
        "traces": traces,
    }
    kept: dict[str, Any] = {"runs": {}}
    if arguments.only and arguments.output.exists():
        kept = json.loads(arguments.output.read_text())["results"]
    for name, measure in parts.items():
        if arguments.only in (None, name):
            kept[name], kept["runs"][name] = measure(), provenance()
    save(arguments.output, kept, quiet=True)


if __name__ == "__main__":
    main()
