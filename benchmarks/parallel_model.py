"""What `plan` and strategy "auto" reckon with, against measurement: bytes exactly, seconds, and which is faster.

    python benchmarks/parallel_model.py [--ranks 2] [--rounds 6] [--output FILE]

Processes on the CPU, gloo, float32, forward and backward. Strategies are timed in turn, round after round, and the
fastest pass of each counts, as other work on the machine only ever adds. Rates are measured in the same run. A pair of
strategies is compared where the model sets their times apart by a tenth or more; where it sets them equal, as "ring"
and "gather" on two ranks, which then send and compute the same, their ratio says how much the times are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.spawn import start_processes

from common import ROOT, save
from dilated_attention_pytorch.benchmarking.parallel import ParallelMeasurement, ParallelSetting, measure, measure_rates
from dilated_attention_pytorch.parallel.cluster import predict, whole_call
from dilated_attention_pytorch.patterns import DilatedPattern

STRATEGIES = ("ring", "gather", "ulysses")
_APART = 1.1


def cases() -> dict[str, tuple[ParallelSetting, int]]:
    """Setting and tokens by name: from few bytes for much computing to many for little."""
    plain: dict[str, Any] = {"head_dim": 64, "dtype": torch.float32, "device": "cpu", "repeats": 1}
    four = {"heads": 4, "kv_heads": 4, **plain}
    wide = {"heads": 16, "kv_heads": 16, **plain, "head_dim": 128}
    longnet, dense = DilatedPattern((256, 1024, 4096), (1, 4, 4)), DilatedPattern((1 << 20,), (1,))
    return {
        "segments inside shards": (ParallelSetting(pattern=DilatedPattern((256, 1024), (1, 4)), **four), 4096),
        "LongNet": (ParallelSetting(pattern=longnet, **four), 4096),
        "dense, causal, zigzag": (ParallelSetting(pattern=dense, is_causal=True, layout="zigzag", **four), 1500),
        "one key head": (ParallelSetting(pattern=longnet, **{**four, "heads": 8, "kv_heads": 1}), 2048),
        "many bytes": (ParallelSetting(pattern=dense, **wide), 300),
    }


def faster(one: ParallelMeasurement, other: ParallelMeasurement) -> ParallelMeasurement:
    """The least of every time."""
    timings = {}
    for name in ("forward", "both"):
        a, b = getattr(one, name), getattr(other, name)
        timings[name] = type(a)(*(min(getattr(a, f), getattr(b, f)) for f in ("total", "compute", "exchange")))
    return replace(one, **timings, formula=one.formula and other.formula)


def run(rank: int, world: int, rounds: int, folder: str) -> None:
    """One rank."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh, best = DeviceMesh("cpu", list(range(world))), dict[tuple[str, str], ParallelMeasurement]()
    rates: Any = None
    for _ in range(rounds):
        for name, (setting, tokens) in cases().items():
            for strategy in STRATEGIES:
                one = measure(mesh, setting, tokens=tokens, strategy=strategy)
                best[name, strategy] = faster(one, best.get((name, strategy), one))
        setting, _ = cases()["LongNet"]
        found = measure_rates(mesh, list(best.values()), setting)
        if rates is not None:
            found = replace(
                found, bandwidth=max(found.bandwidth, rates.bandwidth), latency=min(found.latency, rates.latency)
            )
        rates = found
    if rank == 0:
        report = {
            "rates": asdict(rates),
            "measured": [[name, strategy, one.to_dict()] for (name, strategy), one in best.items()],
        }
        (Path(folder) / "report.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def compare(report: dict[str, Any], world: int) -> dict[str, Any]:
    """The model beside every measurement, and how often it is right about which of two strategies is faster."""
    from dilated_attention_pytorch.parallel import Rates

    rates, points = Rates(**report["rates"]), dict[str, dict[str, dict[str, Any]]]()
    for name, strategy, one in report["measured"]:
        setting, tokens = cases()[name]
        call = whole_call(
            setting.pattern, tokens=tokens, heads=setting.heads, kv_heads=setting.kv_heads, head_dim=setting.head_dim,
            dtype=setting.dtype, is_causal=setting.is_causal,
        )  # fmt: skip
        guess = predict(call, world, strategy=strategy, layout=setting.layout, rates=rates)
        points.setdefault(name, {})[strategy] = {
            "measured_ms": one["both"]["total"],
            "predicted_ms": 1e3 * guess.seconds,
            "bytes_sent": one["bytes_both"],
            "predicted_bytes": guess.bytes_sent,
            "formula": one["formula"],
        }
    apart, right, noise = 0, 0, 1.0
    for strategies in points.values():
        for a, b in combinations(strategies.values(), 2):
            ratio = a["predicted_ms"] / b["predicted_ms"]
            if not 1 / _APART < ratio < _APART:
                apart += 1
                right += (ratio > 1) == (a["measured_ms"] > b["measured_ms"])
            if ratio == 1:
                noise = max(noise, *(x["measured_ms"] / y["measured_ms"] for x, y in ((a, b), (b, a))))
    every = [one for strategies in points.values() for one in strategies.values()]
    errors = sorted(abs(one["predicted_ms"] / one["measured_ms"] - 1) for one in every)
    return {
        "ranks": world,
        "rates": report["rates"],
        "points": points,
        "bytes_as_predicted": sum(one["formula"] and one["bytes_sent"] == one["predicted_bytes"] for one in every),
        "of_points": len(every),
        "median_error": errors[len(errors) // 2],
        "largest_error": errors[-1],
        "pairs_in_order": right,
        "of_pairs_set_apart": apart,
        "largest_ratio_of_equals": noise,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "parallel_model_cpu.json")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(run, (given.ranks, given.rounds, folder), nprocs=given.ranks, start_method="spawn")
        report = json.loads((Path(folder) / "report.json").read_text())
    save(given.output, compare(report, given.ranks))


if __name__ == "__main__":
    main()
