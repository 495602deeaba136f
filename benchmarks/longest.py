"""As many tokens as one device holds, in one forward pass over real tensors: time, memory, and rows checked in float64.

    python benchmarks/longest.py [--log2-tokens 28] [--heads 1] [--head-dim 64] [--sampled 200] [--output FILE]

query, key and value are normal random bfloat16 on the device, the pattern LongNet's with segments 2048 x 8^i and rates
8^i up to the first segment that holds all tokens. Rows active in each branch, the last ones too, are compared with the
definition in float64. Beyond what a device holds `Streaming` takes tensors from host memory: `benchmarks/streaming.py`
with ``--rows``, ``--heads`` and ``--head-dim``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import ROOT, save
from dilated_attention_pytorch import DilatedPattern, dilated_attention_with_lse
from sampled import check_rows
from streaming import pairs, seconds

_PART = 1 << 28


def device_tensor(rows: int, heads: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """Normal random bfloat16 (1, rows, heads, dim), drawn a part at a time."""
    found = torch.empty(1, rows, heads, dim, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for part in found.split(max(1, _PART // (heads * dim)), dim=1):
        part.normal_(generator=generator)
    return found


def pattern_of(rows: int) -> DilatedPattern:
    """Segments 2048 x 8^i with rates 8^i, up to the first that holds all rows."""
    lengths = [2048]
    while lengths[-1] < rows:
        lengths.append(lengths[-1] * 8)
    return DilatedPattern(tuple(lengths), tuple(length // 2048 for length in lengths))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One run; see the module."""
    device, rows = torch.device(given.device), 1 << given.log2_tokens
    pattern = pattern_of(rows)
    tensors = [device_tensor(rows, given.heads, given.head_dim, seed, device) for seed in range(3)]
    last: list[Tensor] = []

    def run() -> None:
        last.clear()
        with torch.no_grad():
            last.extend(
                dilated_attention_with_lse(
                    *tensors, pattern.segment_lengths, pattern.dilation_rates, backend=given.backend
                )
            )

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = seconds(run, device, given.repeats)
    attended = pairs(pattern, rows, given.heads, given.head_dim)
    found: dict[str, Any] = {
        "tokens": rows,
        "heads": given.heads,
        "head_dim": given.head_dim,
        "segment_lengths": list(pattern.segment_lengths),
        "dilation_rates": list(pattern.dilation_rates),
        "backend": given.backend,
        "tensor_bytes": sum(t.nbytes for t in (*tensors, *last)),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "first_seconds": times[0],
        "seconds": times[1:],
        "tokens_per_second": rows / min(times[1:]),
        "useful_flops_per_second": 4 * attended * given.head_dim / min(times[1:]),
    }
    found["sampled"] = check_rows(*tensors, *last, pattern, given.sampled)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log2-tokens", type=int, default=28)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sampled", type=int, default=200, help="rows of each branch compared with float64")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "longest.json")
    given = parser.parse_args(arguments)
    save(given.output, measure(given))


if __name__ == "__main__":
    main()
