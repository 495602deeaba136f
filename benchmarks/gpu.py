"""A GPU: forward and backward on LongNet's and GigaPath's patterns against the best dense rate of the same run.

    python benchmarks/gpu.py [--repeat-ms 200] [--output benchmarks/results/gpu.json]

A rate is useful TFLOP/s: 4 D operations per attended pair forward, 10 D backward. The dense rate is the best that
PyTorch's cuDNN and flash kernels reach over N in 8K, 16K, 32K at batch 1 with the same heads, D and causal flag.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from common import ROOT, save
from dilated_attention_pytorch import dilated_attention, explain
from dilated_attention_pytorch.backends.vendor import find_kernel

H = 16
LONGNET = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
GIGAPATH = ((1024, 4096, 32768, 131072, 1048576), (1, 2, 4, 8, 16))
ROWS: list[dict[str, Any]] = [
    {"name": "longnet", "n": 131072, "d": 128, "pattern": LONGNET, "causal": False},
    {"name": "longnet causal", "n": 131072, "d": 128, "pattern": LONGNET, "causal": True},
    {"name": "longnet", "n": 32768, "d": 64, "pattern": LONGNET, "causal": False},
    {"name": "longnet causal", "n": 32768, "d": 64, "pattern": LONGNET, "causal": True},
    {"name": "gigapath", "n": 65536, "d": 48, "pattern": GIGAPATH, "causal": False},
]


def milliseconds(function: Callable[[], object], repeat_ms: int) -> float:
    """Median time of one call on the device."""
    return float(do_bench(function, warmup=25, rep=repeat_ms, return_mode="median"))


@cache
def dense_rates(d: int, causal: bool, repeat_ms: int) -> dict[str, float]:
    """TFLOP/s of each dense kernel and length, forward and backward."""
    rates = {}
    for name in ("cudnn", "flash"):
        kernel = find_kernel("cuda", torch.bfloat16, d, name=name)
        assert not isinstance(kernel, str), kernel
        for n in (8192, 16384, 32768):
            q, k, v, g = (torch.randn(1, H, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            flop = 4 * d * H * (n * (n + 1) // 2 if causal else n * n) / 1e9
            out, lse = kernel.forward(q, k, v, causal, d**-0.5)
            ms = milliseconds(lambda: kernel.forward(q, k, v, causal, d**-0.5), repeat_ms)  # noqa: B023
            rates[f"forward {name} {n}"] = flop / ms
            ms = milliseconds(lambda: kernel.backward(g, q, k, v, out, lse, causal, d**-0.5), repeat_ms)  # noqa: B023
            rates[f"backward {name} {n}"] = 2.5 * flop / ms
    return rates


def measure(row: dict[str, Any], repeat_ms: int) -> dict[str, Any]:
    """One row: times, rates, ratios to dense, peak memory."""
    segments, rates = row["pattern"]
    n, d, causal = row["n"], row["d"], row["causal"]
    q, k, v = (torch.randn(1, n, H, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)
    plan = explain(q, k, v, segments, rates, is_causal=causal)
    dense = dense_rates(d, causal, repeat_ms)
    result: dict[str, Any] = {
        **row, "h": H, "dtype": "bfloat16", "backend": f"{plan.backend} ({plan.kernel})", "calls": len(plan.calls),
        "dense": dense,
    }  # fmt: skip

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return dilated_attention(q, k, v, segments, rates, is_causal=causal)

    recorded = dilated_attention(q, k, v, segments, rates, is_causal=causal)

    def backward() -> object:
        return torch.autograd.grad(recorded, (q, k, v), grad, retain_graph=True)

    for name, function, flops in (
        ("forward", forward, plan.flops_forward),
        ("backward", backward, plan.flops_backward),
    ):
        ms = milliseconds(function, repeat_ms)
        best = max(rate for key, rate in dense.items() if key.startswith(name))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        result[name] = {
            "ms": ms, "tflops": flops / ms / 1e9, "dense_tflops": best, "of_dense": flops / ms / 1e9 / best,
            "peak_mib": peak / 2**20,
            "predicted_peak_mib": (plan.peak_bytes_forward if name == "forward" else plan.peak_bytes_backward) / 2**20,
        }  # fmt: skip
    return result


def main() -> None:
    """Measure every row and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat-ms", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for row in ROWS:
        results.append(measure(row, arguments.repeat_ms))
        for name in ("forward", "backward"):
            r = results[-1][name]
            print(f"{row['name']:<16} N={row['n']} D={row['d']} {name:<9}{r['ms']:8.3f} ms {r['tflops']:6.0f} TFLOP/s "
                  f"{r['of_dense']:.3f} of dense, peak {r['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    save(arguments.output, results)


if __name__ == "__main__":
    main()
