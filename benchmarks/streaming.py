"""A GPU over tensors in host memory: time against computation and transfer alone, peak memory, rows against float64.

    python benchmarks/streaming.py [--budget-gib 8] [--rows 4194304] [--heads 16] [--head-dim 128] [--backward]
        [--pageable] [--pattern near|far] [--repeats 3] [--output FILE]

query, key and value are bfloat16 in page-locked memory; the budget has to be a quarter of them at most. "near" is
LongNet's pattern up to segments of 32768 rows, "far" goes on, by factors of 4, to segments of the whole sequence.
The bound is the larger of two times: that of the bytes that streaming moves, at the rates of copies of 256 MiB to and
from page-locked memory measured in the same run (both directions at once, so the slower one counts), and that of the
attended pairs at the rate of the same operator on rows that fit on the device. On a CPU it runs at any small size
and measures copies in memory.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import ROOT, save
from dilated_attention_pytorch import DilatedPattern, Streaming, dilated_attention_with_lse
from dilated_attention_pytorch.patterns.plan import plan
from dilated_attention_pytorch.types import Document, Shape


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Wall time of each run after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def host_tensor(rows: int, heads: int, dim: int, seed: int, device: torch.device, *, pinned: bool) -> Tensor:
    """Normal random bfloat16 (1, rows, heads, dim) in host memory, drawn on the device a part at a time."""
    found = torch.empty(1, rows, heads, dim, dtype=torch.bfloat16, pin_memory=pinned and device.type == "cuda")
    generator = torch.Generator(device).manual_seed(seed)
    part = max(1, (1 << 28) // (heads * dim))
    for first in range(0, rows, part):
        count = min(part, rows - first)
        drawn = torch.randn(1, count, heads, dim, generator=generator, device=device, dtype=torch.bfloat16)
        found[:, first : first + count].copy_(drawn)
    return found


def copy_rates(device: torch.device, repeats: int, size: int) -> dict[str, float]:
    """Bytes a second to the device and back, from and to page-locked memory."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    near = torch.empty(size, dtype=torch.uint8, device=device)
    to = min(seconds(lambda: near.copy_(host, non_blocking=True), device, repeats * 4))
    back = min(seconds(lambda: host.copy_(near, non_blocking=True), device, repeats * 4))
    return {"to_device": size / to, "to_host": size / back}


def pairs(pattern: DilatedPattern, rows: int, heads: int, dim: int) -> int:
    """Attended pairs of a query and a key."""
    shape, documents = Shape(1, rows, rows, heads, heads, dim, dim), (Document(0, 1, 0, rows, 0, rows),)
    return plan(pattern, shape, documents, is_causal=False, zeros=False).pairs


def pair_rate(
    pattern: DilatedPattern, heads: int, dim: int, rows: int, device: torch.device, repeats: int, *, backward: bool
) -> float:
    """Attended pairs a second of the operator on rows that fit on the device."""
    leaves = [
        torch.randn(1, rows, heads, dim, device=device, dtype=torch.bfloat16).requires_grad_(backward) for _ in range(3)
    ]
    segments, rates = pattern.segment_lengths, pattern.dilation_rates

    def run() -> None:
        out, _ = dilated_attention_with_lse(*leaves, segments, rates)
        if backward:
            torch.autograd.grad(out, leaves, out)

    return pairs(pattern, rows, heads, dim) / min(seconds(run, device, repeats))


def worst_row(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pattern: DilatedPattern, count: int
) -> dict[str, float]:
    """Errors of sampled rows, active in each branch in turn, against the definition in float64, and bound B of each.

    Bound B: twice the error of the same formula with products in bfloat16, and 4 eps of the largest value.
    """
    rows, heads, dim = query.shape[1:]
    generator = torch.Generator().manual_seed(9)
    errors: list[tuple[float, float, float]] = []
    for sample in range(count):
        branch = sample % len(pattern.segment_lengths)
        w, r = pattern.segment_lengths[branch], pattern.dilation_rates[branch]
        head = int(torch.randint(min(heads, r * -(-heads // r)), (1,), generator=generator))
        offset = pattern.head_offset(head, r, heads)
        row = int(torch.randint(rows, (1,), generator=generator))
        row = min(row // w * w + (row % w) // r * r + offset, rows - 1)
        keys, values = [], []
        for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
            offset = pattern.head_offset(head, r, heads)
            if row % w % r == offset:
                first = row // w * w
                here = slice(first + offset, min(first + w, rows), r)
                keys.append(key[0, here, head])
                values.append(value[0, here, head])
        if not keys:
            continue
        q, k, v = query[0, row, head], torch.cat(keys), torch.cat(values)
        scores = k.double() @ q.double() / math.sqrt(dim)
        gold, gold_lse = torch.softmax(scores, 0) @ v.double(), float(torch.logsumexp(scores, 0))
        eager = (torch.softmax((k @ q).float() / math.sqrt(dim), 0).bfloat16() @ v).double()
        eps = torch.finfo(torch.bfloat16).eps
        bound = 2 * float((eager - gold).abs().max()) + 4 * eps * float(gold.abs().max())
        error = float((out[0, row, head].double() - gold).abs().max())
        errors.append((error / bound, error, abs(float(lse[0, head, row]) - gold_lse)))
    table = torch.tensor(errors, dtype=torch.float64)
    return {
        "rows": len(errors),
        "worst_error_over_bound": float(table[:, 0].max()),
        "worst_error": float(table[:, 1].max()),
        "worst_lse_error": float(table[:, 2].max()),
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One run of everything; see the module."""
    device = torch.device(given.device)
    budget, rows, heads, dim = int(given.budget_gib * 2**30), given.rows, given.heads, given.head_dim
    segments = [2048, 4096, 8192, 16384, 32768]
    rates = [1, 2, 4, 8, 16]
    while given.pattern == "far" and segments[-1] < rows:
        segments.append(segments[-1] * 4)
        rates.append(rates[-1] * 4)
    if given.segments:
        segments, rates = (list(map(int, part.split(","))) for part in (given.segments, given.rates))
    pattern = DilatedPattern(tuple(segments), tuple(rates))
    query, key, value = (host_tensor(rows, heads, dim, s, device, pinned=not given.pageable) for s in range(3))
    given_bytes = 3 * query.nbytes
    if given_bytes < 4 * budget:
        raise SystemExit(f"q, k, v have {given_bytes:,} bytes, less than 4 x the budget; give more --rows")
    leaves = [t.requires_grad_(given.backward) for t in (query, key, value)]
    streaming = Streaming(device, memory_budget=budget)
    last: list[Tensor] = []

    def run() -> None:
        out, lse = dilated_attention_with_lse(*leaves, segments, rates, parallel=streaming)
        last[:] = [out.detach(), lse.detach()]
        if given.backward:
            torch.autograd.grad(out, leaves, out.detach())

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = seconds(run, device, given.repeats)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    runs = given.repeats + 1
    moved = replace(streaming.moved)
    copies = copy_rates(device, given.repeats, min(256 << 20, given_bytes))
    transfer = max(moved.bytes_in / runs / copies["to_device"], moved.bytes_out / runs / copies["to_host"])
    resident_rows = min(rows, given.resident_rows)
    rate = pair_rate(pattern, heads, dim, resident_rows, device, given.repeats, backward=given.backward)
    compute = pairs(pattern, rows, heads, dim) / rate
    bound, best = max(compute, transfer), min(times)
    return {
        "rows": rows,
        "heads": heads,
        "head_dim": dim,
        "segment_lengths": segments,
        "dilation_rates": rates,
        "backward": given.backward,
        "pinned": not given.pageable,
        "budget_bytes": budget,
        "qkv_bytes": given_bytes,
        "peak_bytes": peak,
        "peak_within_budget": None if peak is None else peak <= budget,
        "chunks": moved.chunks // runs,
        "tiles": moved.tiles // runs,
        "bytes_in": moved.bytes_in // runs,
        "bytes_out": moved.bytes_out // runs,
        "copy_bytes_per_second": copies,
        "seconds": times,
        "transfer_seconds": transfer,
        "compute_seconds": compute,
        "time_over_bound": best / bound,
        "sampled": worst_row(query.detach(), key.detach(), value.detach(), *last, pattern, given.sampled),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-gib", type=float, default=8.0)
    parser.add_argument("--rows", type=int, default=1 << 22)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--pattern", choices=("near", "far"), default="far")
    parser.add_argument("--segments", help="segment lengths with commas between them, instead of --pattern")
    parser.add_argument("--rates", help="the dilation rates that go with --segments")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--pageable", action="store_true", help="inputs in memory that is not page-locked")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sampled", type=int, default=200, help="rows compared with float64")
    parser.add_argument("--resident-rows", type=int, default=1 << 19, help="rows for the rate of the operator itself")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "streaming.json")
    given = parser.parse_args(arguments)
    save(given.output, measure(given))


if __name__ == "__main__":
    main()
