"""The CPU: dilated attention against the same fused calls on contiguous tensors, and against dense attention.

python benchmarks/cpu.py [--repeats 7] [--output benchmarks/results/cpu.json]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from common import ROOT, cpu_medians, median_ratio, peak_cpu_bytes, save
from dilated_attention_pytorch import dilated_attention_with_lse, explain
from dilated_attention_pytorch.backends.vendor import find_kernel

N, H, D = 16384, 8, 64
SEGMENTS, RATES = (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 8)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, N, H, D) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    plan = explain(q, k, v, SEGMENTS, RATES)
    kernel = find_kernel("cpu", q.dtype, D)
    assert not isinstance(kernel, str)

    contiguous = []
    for call in plan.calls:
        tensors = [torch.randn(call.outer, call.inner, call.query_len, D) for _ in range(4)]
        out, lse = kernel.forward(*tensors[:3], call.is_causal, D**-0.5)
        contiguous.append((*tensors, out, lse, call.is_causal))

    def calls_forward() -> None:
        for a, b, c, _, _, _, causal in contiguous:
            kernel.forward(a, b, c, causal, D**-0.5)

    def calls_backward() -> None:
        for a, b, c, g, out, lse, causal in contiguous:
            kernel.backward(g, a, b, c, out, lse, causal, D**-0.5)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return dilated_attention_with_lse(q, k, v, SEGMENTS, RATES).out

    def dense() -> torch.Tensor:
        with torch.no_grad():
            views = (t.transpose(1, 2) for t in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*views)

    recorded = dilated_attention_with_lse(q, k, v, SEGMENTS, RATES).out

    def ours_backward() -> None:
        torch.autograd.grad(recorded, leaves, grad, retain_graph=True)

    times = cpu_medians(
        {
            "forward": ours,
            "calls_forward": calls_forward,
            "backward": ours_backward,
            "calls_backward": calls_backward,
            "dense_forward": dense,
        },
        repeats=arguments.repeats,
    )
    out_bytes, lse_bytes = recorded.nbytes, N * H * 4
    extra = peak_cpu_bytes(ours) - out_bytes - lse_bytes
    extra_backward = peak_cpu_bytes(ours_backward) - 3 * out_bytes
    save(
        arguments.output,
        {
            "shape": {"N": N, "H": H, "D": D, "segments": SEGMENTS, "rates": RATES, "dtype": "float32"},
            "median_seconds": {name: statistics.median(t) for name, t in times.items()},
            "seconds": times,
            "forward_over_calls": median_ratio(times["forward"], times["calls_forward"]),
            "backward_over_calls": median_ratio(times["backward"], times["calls_backward"]),
            "dense_over_forward": median_ratio(times["dense_forward"], times["forward"]),
            "flop_ratio_dense": plan.dense_pairs / plan.pairs,
            "forward_bytes_beyond_out_and_lse_over_out": extra / out_bytes,
            "backward_bytes_beyond_gradients_over_out": extra_backward / out_bytes,
            "predicted_peak_over_measured": {
                "forward": plan.peak_bytes_forward / (extra + out_bytes + lse_bytes),
                "backward": plan.peak_bytes_backward / (extra_backward + 3 * out_bytes),
            },
        },
    )


if __name__ == "__main__":
    main()
