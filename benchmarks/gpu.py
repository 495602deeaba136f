"""A GPU: forward and backward on LongNet's and GigaPath's patterns, each backend, against the best dense rate.

    python benchmarks/gpu.py [--rows longnet,gigapath] [--backends gluon,sdpa] [--torchscale FOLDER] [--output FILE]

A rate is useful TFLOP/s: 4 D operations per attended pair forward, 10 D backward. The dense rate is the best that
PyTorch's cuDNN and flash kernels reach over N in 8K, 16K, 32K at batch 1 with the same heads, D and causal flag, in the
same run. "ragged" rows have one row more or less, or segments that their rate does not divide; "short" rows are timed
against one dense call of the same N; "long" rows say how time grows with N; "float32" has SDPA's memory-efficient
kernel as its dense one. FOLDER holds the package `torchscale` as its repository has it; it is timed on "longnet" and
"gigapath" rows without its linear layers, with PyTorch's flash kernel (FlashAttention 2) in the place of flash-attn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from common import ROOT, save
from dilated_attention_pytorch import DilatedPattern, dilated_attention, explain
from dilated_attention_pytorch.backends.vendor import find_kernel
from dilated_attention_pytorch.benchmarking.contenders import CONTENDERS, Setting
from peers import stand_in_for_flash_attn

H = 16
LONGNET = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
UNDIVIDED = ((2050, 4100, 8200, 16400, 32800), (1, 2, 4, 8, 16))
GIGAPATH = ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))
MAIN = (
    ("longnet", 131072, 128, LONGNET, False),
    ("longnet", 131072, 128, LONGNET, True),
    ("longnet", 32768, 64, LONGNET, False),
    ("longnet", 131072, 64, LONGNET, False),
    ("longnet", 32768, 64, LONGNET, True),
    ("gigapath", 65536, 48, GIGAPATH, False),
)
ROWS: list[dict[str, Any]] = [
    *({"name": name, "n": n, "d": d, "pattern": pattern, "causal": causal} for name, n, d, pattern, causal in MAIN),
    *(
        {"name": "ragged", "n": n + extra, "d": d, "pattern": pattern, "causal": causal}
        for _, n, d, pattern, causal in MAIN
        for extra in (-1, 1)
    ),
    *(
        {"name": "ragged", "n": n, "d": d, "pattern": UNDIVIDED, "causal": causal}
        for name, n, d, _, causal in MAIN
        if name == "longnet"
    ),
    *({"name": "short", "n": n, "d": 64, "pattern": LONGNET, "causal": False} for n in (2048, 4096, 8192)),
    *({"name": "float32", "n": 32768, "d": 64, "pattern": LONGNET, "causal": causal} for causal in (False, True)),
    *({"name": "long", "n": 32768 << i, "d": 64, "pattern": LONGNET, "causal": False} for i in range(8)),
]


def milliseconds(function: Callable[[], object], repeat_ms: int) -> float:
    """Median time of one call on the device, after as long a warm-up: a card that was idle runs faster at first."""
    return float(do_bench(function, warmup=max(200, repeat_ms), rep=repeat_ms, return_mode="median"))


@cache
def dense_rates(d: int, causal: bool, dtype: torch.dtype, repeat_ms: int) -> dict[str, float]:
    """TFLOP/s of each dense kernel and length, forward and backward."""
    rates = {}
    for name in ("efficient",) if dtype == torch.float32 else ("cudnn", "flash"):
        kernel = find_kernel("cuda", dtype, d, name=name)
        assert not isinstance(kernel, str), kernel
        for n in (8192, 16384, 32768):
            q, k, v, g = (torch.randn(1, H, n, d, device="cuda", dtype=dtype) for _ in range(4))
            flop = 4 * d * H * (n * (n + 1) // 2 if causal else n * n) / 1e9
            out, lse = kernel.forward(q, k, v, causal, d**-0.5)
            ms = milliseconds(lambda: kernel.forward(q, k, v, causal, d**-0.5), repeat_ms)  # noqa: B023
            rates[f"forward {name} {n}"] = flop / ms
            ms = milliseconds(lambda: kernel.backward(g, q, k, v, out, lse, causal, d**-0.5), repeat_ms)  # noqa: B023
            rates[f"backward {name} {n}"] = 2.5 * flop / ms
    return rates


@cache
def torchscale_ms(n: int, d: int, pattern: tuple[tuple[int, ...], ...], causal: bool, repeat_ms: int) -> dict[str, Any]:
    """Milliseconds of torchscale's attention, forward and backward, or why there are none."""
    setting = Setting(1, H, d, torch.bfloat16, torch.device("cuda"), causal, DilatedPattern(*pattern))
    peer = CONTENDERS["torchscale"]
    if reason := peer.absent(setting):
        return {"absent": reason}
    attention, shape = peer.prepare(setting, n)
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad = torch.randn_like(leaves[0])
    with torch.no_grad():
        forward = milliseconds(lambda: attention(*leaves), repeat_ms)
    recorded = attention(*leaves)
    backward = milliseconds(lambda: torch.autograd.grad(recorded, leaves, grad, retain_graph=True), repeat_ms)
    return {"forward": forward, "backward": backward}


def measure(row: dict[str, Any], backend: str, repeat_ms: int, *, torchscale: bool = False) -> dict[str, Any]:
    """One row through one backend: times, rates, ratios to dense and to torchscale, peak memory."""
    segments, rates = row["pattern"]
    n, d, causal = row["n"], row["d"], row["causal"]
    dtype = torch.float32 if row["name"] == "float32" else torch.bfloat16
    q, k, v = (torch.randn(1, n, H, d, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)
    result: dict[str, Any] = {**row, "h": H, "dtype": str(dtype), "backend": backend}
    try:
        plan = explain(q, k, v, segments, rates, is_causal=causal, backend=backend)
    except ValueError as error:
        return result | {"refused": str(error)}
    if row["name"] == "long":  # a pass over the longest takes long enough; nothing dense to compare with
        dense: dict[str, float] = {}
    else:
        dense = dense_rates(d, causal, dtype, repeat_ms)
    result |= {"chosen": [plan.backend, plan.backend_backward], "dense": dense}

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return dilated_attention(q, k, v, segments, rates, is_causal=causal, backend=backend)

    recorded = dilated_attention(q, k, v, segments, rates, is_causal=causal, backend=backend)

    def backward() -> object:
        return torch.autograd.grad(recorded, (q, k, v), grad, retain_graph=True)

    for name, function, flops in (
        ("forward", forward, plan.flops_forward),
        ("backward", backward, plan.flops_backward),
    ):
        ms = milliseconds(function, repeat_ms)
        best = max((rate for key, rate in dense.items() if key.startswith(name)), default=math.nan)
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
    if torchscale and row["name"] in ("longnet", "gigapath"):
        peer = torchscale_ms(n, d, row["pattern"], causal, repeat_ms)
        result["torchscale_ms"] = peer
        for name in ("forward", "backward") if "forward" in peer else ():
            result[name]["torchscale_over_ours"] = peer[name] / result[name]["ms"]
    if row["name"] == "short":
        views = [t.detach().transpose(1, 2) for t in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        result["dense_ms_of_this_n"] = milliseconds(lambda: attend(*views, is_causal=causal), repeat_ms)
    return result


def main() -> None:
    """Measure every row with every backend and write after each, so that a stop loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(row["name"] for row in ROWS))
    parser.add_argument("--rows", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--backends", default="auto,gluon,triton,sdpa")
    parser.add_argument("--repeat-ms", type=int, default=200)
    parser.add_argument("--torchscale", type=Path, help="a folder with the package torchscale")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    arguments = parser.parse_args()
    if arguments.torchscale:
        stand_in_for_flash_attn()
        sys.path.insert(0, str(arguments.torchscale))
    torch.manual_seed(0)
    results = []
    for row in ROWS:
        if row["name"] not in arguments.rows.split(","):
            continue
        for backend in arguments.backends.split(","):
            results.append(measure(row, backend, arguments.repeat_ms, torchscale=bool(arguments.torchscale)))
            label = f"{row['name']}{' causal' if row['causal'] else ''} N={row['n']} D={row['d']} {backend}"
            for name in ("forward", "backward"):
                if r := results[-1].get(name):
                    rate = f"{r['tflops']:6.0f} TFLOP/s {r['of_dense']:.3f} of dense"
                    if "torchscale_over_ours" in r:
                        rate += f", torchscale {r['torchscale_over_ours']:.2f} x"
                    print(f"{label:<44} {name:<9}{r['ms']:8.3f} ms {rate}, peak {r['peak_mib']:.0f} MiB", flush=True)
            torch.cuda.empty_cache()
        save(arguments.output, results, quiet=True)
    save(arguments.output, results)


if __name__ == "__main__":
    main()
