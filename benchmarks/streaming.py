"""A GPU over tensors in host memory: time against computation and transfer alone, peak memory, every row checked.

    python benchmarks/streaming.py [--budget-gib 8] [--more-budgets-gib 16 32] [--rows 2818048] [--heads 16]
        [--head-dim 128] [--directions both] [--pageable] [--pattern near|far] [--pools] [--repeats 3] [--trace FOLDER]
        [--output FILE]

query, key and value are bfloat16 in page-locked memory; the budget has to be a quarter of them at most. "near" is
LongNet's pattern up to segments of 32768 rows, "far" has three branches more, each with segments and rates 4 times
those before, so that chunks cut them. The bound is the larger of two times: that of the bytes that streaming moves, at
the rates of copies of 256 MiB to and from page-locked memory measured in the same run (both directions at once, so the
slower one counts), and that of the same operator on the same rows on the device. All rows of all results are compared
with that resident one, and random rows active in each branch with float64. Where the device cannot hold everything,
`--resident-rows` says how many rows the operator is timed on; results are then compared with float64 alone. On a CPU
it runs at any small size and measures copies in memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import ROOT, save
from dilated_attention_pytorch import DilatedPattern, Streaming, create_memory_pool, dilated_attention_with_lse
from dilated_attention_pytorch.memory.compare import CONTENDERS
from dilated_attention_pytorch.patterns.plan import plan
from dilated_attention_pytorch.types import Document, Shape
from sampled import check_rows


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Wall time of every run; the first one compiles and allocates."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def host_tensor(rows: int, heads: int, dim: int, seed: int, device: torch.device, *, pinned: bool) -> Tensor:
    """Normal random bfloat16 (1, rows, heads, dim) in host memory, drawn on the device a part at a time."""
    found = torch.zeros(1, rows, heads, dim, dtype=torch.bfloat16)  # by all threads, so that all pages are there
    if pinned and device.type == "cuda":  # page-locked in place: PyTorch would round it up to a power of two
        error = torch.cuda.cudart().cudaHostRegister(found.data_ptr(), found.nbytes, 0)
        if int(error) or not found.is_pinned():
            raise RuntimeError(f"{found.nbytes:,} bytes of host memory cannot be page-locked: {error}")
    generator = torch.Generator(device).manual_seed(seed)
    part = max(1, (1 << 28) // (heads * dim))
    for first in range(0, rows, part):
        count = min(part, rows - first)
        drawn = torch.randn(1, count, heads, dim, generator=generator, device=device, dtype=torch.bfloat16)
        found[:, first : first + count].copy_(drawn)
    return found


def copy_rates(device: torch.device, repeats: int, size: int) -> dict[str, float]:
    """Bytes a second to the device and back, from and to page-locked memory; alone, and each with the other."""
    hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
    nears = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def to() -> None:
        nears[0].copy_(hosts[0], non_blocking=True)

    def back() -> None:
        hosts[1].copy_(nears[1], non_blocking=True)

    def both() -> None:
        for function, stream in zip((to, back), streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(4):
                    function()

    found = {"to_device": size / min(seconds(to, device, repeats * 4)[1:])}
    found["to_host"] = size / min(seconds(back, device, repeats * 4)[1:])
    if streams:
        found["each_at_once"] = 4 * size / min(seconds(both, device, repeats * 2)[1:])
    return found


def pairs(pattern: DilatedPattern, rows: int, heads: int, dim: int) -> int:
    """Attended pairs of a query and a key."""
    shape, documents = Shape(1, rows, rows, heads, heads, dim, dim), (Document(0, 1, 0, rows, 0, rows),)
    return plan(pattern, shape, documents, is_causal=False, zeros=False).pairs


def attend(tensors: list[Tensor], pattern: DilatedPattern, *, backward: bool, **options: Any) -> dict[str, Tensor]:
    """out and lse, and with ``backward`` the gradients of the three tensors for grad_out = out."""
    leaves = [t.detach().requires_grad_(backward) for t in tensors]
    out, lse = dilated_attention_with_lse(*leaves, pattern.segment_lengths, pattern.dilation_rates, **options)
    found = {"out": out.detach(), "lse": lse.detach()}
    if backward:
        grads = torch.autograd.grad(out, leaves, out.detach())
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return found


def resident(
    tensors: list[Tensor],
    pattern: DilatedPattern,
    rows: int,
    device: torch.device,
    repeats: int,
    got: dict[str, Tensor],
    backend: str = "auto",
) -> dict[str, Any]:
    """Seconds of the operator on the first ``rows`` rows on the device, extrapolated by the number of pairs; and, where
    these are all rows, the largest difference of ``got`` from its result, for each tensor.

    Two results that each are within bound B of the exact one differ by twice that at most, so by 8 eps of the largest
    value, twice the smaller term of B.
    """
    near = [t[:, :rows].to(device) for t in tensors]
    kept: list[dict[str, Tensor]] = [{}]

    def run() -> None:
        kept[0] = {}
        kept[0] = attend(near, pattern, backward="dq" in got, backend=backend)

    heads, dim = near[0].shape[2:]
    scale = pairs(pattern, tensors[0].shape[1], heads, dim) / pairs(pattern, rows, heads, dim)
    found: dict[str, Any] = {"compute_seconds": min(seconds(run, device, repeats)[1:]) * scale}
    if rows < tensors[0].shape[1]:
        return found
    for name, theirs in kept[0].items():
        mine, dim = got[name], 2 if name == "lse" else 1
        step = max(1, (1 << 28) // (mine[0].numel() // mine.shape[dim]))
        parts = list(zip(mine.split(step, dim), theirs.split(step, dim), strict=True))
        largest = torch.stack([t.abs().max() for _, t in parts]).max().float()
        apart = torch.stack([(m.to(device).float() - t.float()).abs().max() for m, t in parts]).max()
        eps = 1e-5 if name == "lse" else 8 * torch.finfo(torch.bfloat16).eps
        found[f"{name}_difference_over_limit"] = float(apart / (eps * largest))
    return found


def record(function: Callable[[], object], device: torch.device, path: Path) -> None:
    """One more call under PyTorch's profiler, as a trace of what ran on the host and on each stream when."""
    from torch.profiler import ProfilerActivity, profile

    gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as recorded:
        function()
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))


def run_budget(
    tensors: list[Tensor],
    pattern: DilatedPattern,
    budget: int,
    copies: dict[str, float],
    given: argparse.Namespace,
    last: dict[str, Tensor],
    *,
    backward: bool,
) -> dict[str, Any]:
    """Times, bytes and peak of one direction within a budget; ``last`` gets the results."""
    device, streaming = torch.device(given.device), Streaming(given.device, memory_budget=budget)

    def run() -> None:
        last.clear()  # its page-locked memory is used again
        last.update(attend(tensors, pattern, backward=backward, backend=given.backend, parallel=streaming))

    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = seconds(run, device, given.repeats)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    print(f"{budget:,} bytes{', backward' if backward else ''}: {times} s, peak {peak} bytes", flush=True)
    counts = {
        name: getattr(streaming.moved, name) // len(times) for name in ("chunks", "tiles", "bytes_in", "bytes_out")
    }
    if given.trace is not None:
        name = f"{'backward' if backward else 'forward'}_{budget / 2**30:g}_gib.json.gz"
        record(run, device, given.trace / name)
    return {
        "budget_bytes": budget,
        **counts,
        "peak_bytes": peak,
        "peak_within_budget": None if peak is None else peak <= budget,
        "first_seconds": times[0],
        "seconds": times[1:],
        "transfer_seconds": max(counts["bytes_in"] / copies["to_device"], counts["bytes_out"] / copies["to_host"]),
    }


def run_direction(
    tensors: list[Tensor],
    pattern: DilatedPattern,
    copies: dict[str, float],
    given: argparse.Namespace,
    *,
    backward: bool,
) -> dict[str, Any]:
    """Times, bytes and errors of one direction, and times within larger budgets."""
    device, rows = torch.device(given.device), tensors[0].shape[1]
    last: dict[str, Tensor] = {}
    budgets = [int(gib * 2**30) for gib in (given.budget_gib, *given.more_budgets_gib)]
    found, *more = [run_budget(tensors, pattern, one, copies, given, last, backward=backward) for one in budgets]
    most = min(rows, given.resident_rows or rows)
    reference = resident(tensors, pattern, most, device, given.repeats, last, given.backend)
    for one in (found, *more):
        bound = max(reference["compute_seconds"], one["transfer_seconds"])
        one["time_over_bound"] = min(one["seconds"]) / bound
    sampled = check_rows(*tensors, last["out"], last["lse"], pattern, given.sampled)
    return {**found, **reference, "sampled": sampled, "more_budgets": more}


def run_pools(
    tensors: list[Tensor], pattern: DilatedPattern, given: argparse.Namespace, *, backward: bool
) -> dict[str, Any]:
    """Median seconds with each kind of pool, in turn; new memory after the second call; most bytes on the device."""
    device, budget = torch.device(given.device), int(given.budget_gib * 2**30)
    kinds = ("simple", "adaptive", "bucketing", "fragmentation")
    pools: dict[str, Any] = {"own": None, **{name: CONTENDERS[name](None) for name in kinds}}
    if device.type == "cuda":
        pools["fragmentation, mem_pool"] = create_memory_pool("adaptive", device=device, backing="mem_pool")
    streams = {name: Streaming(device, memory_budget=budget, pool=pool) for name, pool in pools.items()}
    times: dict[str, list[float]] = {name: [] for name in streams}
    peaks, misses = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0)
    for turn in range(given.repeats + 2):
        for name, streaming in streams.items():
            before = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device) - (pools[name].stats().held if pools[name] else 0)
            start = time.perf_counter()
            attend(tensors, pattern, backward=backward, backend=given.backend, parallel=streaming)
            synchronize(device)
            if turn > 1:
                times[name].append(time.perf_counter() - start)
            elif pools[name] is not None:
                misses[name] = pools[name].stats().misses
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - before)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "new_after_second_call": pools[name].stats().misses - misses[name] if pools[name] else None,
            "held_bytes": pools[name].stats().held if pools[name] else 0,
            "peak_bytes": peaks[name] or None,
        }
        for name in streams
    }


def measure(given: argparse.Namespace, keep: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """One run of everything; see the module. ``keep`` gets what has been found, after each direction."""
    device = torch.device(given.device)
    budget, rows, heads, dim = int(given.budget_gib * 2**30), given.rows, given.heads, given.head_dim
    segments = [2048, 4096, 8192, 16384, 32768]
    rates = [1, 2, 4, 8, 16]
    for _ in range(3 if given.pattern == "far" else 0):
        segments.append(segments[-1] * 4)
        rates.append(rates[-1] * 4)
    if given.segments:
        segments, rates = (list(map(int, part.split(","))) for part in (given.segments, given.rates))
    pattern = DilatedPattern(tuple(segments), tuple(rates))
    start = time.perf_counter()
    tensors = [host_tensor(rows, heads, dim, s, device, pinned=not given.pageable) for s in range(3)]
    made = time.perf_counter() - start
    given_bytes = sum(t.nbytes for t in tensors)
    if given_bytes < 4 * budget:
        raise SystemExit(f"q, k, v have {given_bytes:,} bytes, less than 4 x the budget; give more --rows")
    copies = copy_rates(device, given.repeats, min(256 << 20, given_bytes))
    found: dict[str, Any] = {
        "rows": rows,
        "heads": heads,
        "head_dim": dim,
        "segment_lengths": segments,
        "dilation_rates": rates,
        "backend": given.backend,
        "pinned": not given.pageable,
        "budget_bytes": budget,
        "qkv_bytes": given_bytes,
        "seconds_to_make_inputs": made,
        "copy_bytes_per_second": copies,
    }
    for name in ("forward", "forward_and_backward") if given.directions == "both" else (given.directions,):
        found[name] = run_direction(tensors, pattern, copies, given, backward=name != "forward")
        print(name, {key: value for key, value in found[name].items() if key != "sampled"}, flush=True)
        if keep is not None:
            keep(found)
    if given.pools:
        found["pools"] = run_pools(tensors, pattern, given, backward=given.directions != "forward")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-gib", type=float, default=8.0)
    parser.add_argument("--rows", type=int, default=86 * 32768)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--pattern", choices=("near", "far"), default="far")
    parser.add_argument("--segments", help="segment lengths with commas between them, instead of --pattern")
    parser.add_argument("--rates", help="the dilation rates that go with --segments")
    parser.add_argument("--backend", default="auto", help="of a chunk's own pairs, and of the resident operator")
    parser.add_argument("--directions", choices=("forward", "forward_and_backward", "both"), default="forward")
    parser.add_argument(
        "--more-budgets-gib", type=float, nargs="*", default=[], help="larger ones, timed in the same run"
    )
    parser.add_argument("--pageable", action="store_true", help="inputs in memory that is not page-locked")
    parser.add_argument("--pools", action="store_true", help="compare kinds of pools, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sampled", type=int, default=200, help="rows of each branch compared with float64")
    parser.add_argument("--resident-rows", type=int, help="rows on the device alone; by default all")
    parser.add_argument("--trace", type=Path, help="a folder for traces of PyTorch's profiler, one of each direction")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "streaming.json")
    given = parser.parse_args(arguments)
    save(given.output, measure(given, lambda found: save(given.output, found, quiet=True)))


if __name__ == "__main__":
    main()
