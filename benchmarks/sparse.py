"""A GPU: block-sparse attention against the best dense kernel; lists of a million rows; what choosing by content costs.

    python benchmarks/sparse.py [--rows 90,50,short,block64] [--parts speed,lists,selection] [--backends auto]
                                [--dense cudnn,flash] [--causal 0,1] [--repeat-ms 100] [--once] [--output FILE]

"90" and "50" are windows and global tokens that leave out so many percent of the pairs of N = 65536, "short" are both
at N = 4096, "block64" is "90" with blocks of 64. bfloat16, H = 16, D = 128. Beside the library's backends "flex" is
PyTorch's FlexAttention. A ratio is the time of the faster of cuDNN's and flash's dense kernels over that of the call,
in the same run; "kept" is the listed share of the blocks that dense attention computes, so 1 / kept is what a kernel
of dense speed would reach. Rows "short" are also timed by the clock on the wall, calls back to back, where the host may
be what takes the time. "selection" times choosing blocks by content, listing them, calls that do both, and attention to
what they have chosen alone. --once runs everything once and times nothing: it fills the compilers' caches. Before
anything is timed, a window over everything has to equal PyTorch's dense attention, gradients included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from common import ROOT, save
from dilated_attention_pytorch import (
    ContentTopK,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    RandomBlocks,
    explain_sparse,
    sparse_attention,
)
from dilated_attention_pytorch.backends.sparse.dispatch import SPARSE_BACKENDS, choose_sparse
from dilated_attention_pytorch.backends.sparse.problem import SparseProblem
from dilated_attention_pytorch.backends.sparse.selection import sparse_select
from dilated_attention_pytorch.backends.vendor import find_kernel
from dilated_attention_pytorch.types import Document, Options, Shape

H, D = 16, 128
SHORT = 8192
DIRECTIONS = ("forward", "backward")
ROWS = {
    "90": (65536, GlobalLocal(2944, 256)),
    "50": (65536, GlobalLocal(18688, 256)),
    "short 85": (4096, GlobalLocal(128, 128)),
    "short 50": (4096, GlobalLocal(1024, 128)),
    "block64": (65536, GlobalLocal(2944, 256, block_size=64)),
}
MILLION = {
    "local": LocalWindow(4096),
    "global": GlobalLocal(4096, 1024),
    "global, block 64": GlobalLocal(4096, 1024, block_size=64),
    "hierarchical": Hierarchical(((4096, 128), (65536, 4096))),
    "random, 16 heads": RandomBlocks(8),
}
CHOICES = {
    "16 blocks of 128 by mean": (65536, ContentTopK(16, always_local=1, always_first=1)),
    "48 blocks of 128 by mean": (65536, ContentTopK(48, always_local=1, always_first=1)),
    "48 blocks of 128 by sub_means": (65536, ContentTopK(48, 1, 1, "sub_means")),
}


def milliseconds(function: Callable[[], object], repeat_ms: int) -> float:
    """Median time of one call on the device; 0: call once, do not time."""
    if not repeat_ms:
        function()
        return 1.0
    return float(do_bench(function, warmup=min(25, repeat_ms), rep=repeat_ms, return_mode="median"))


def wall_milliseconds(function: Callable[[], object], calls: int = 100) -> float:
    """Mean time of one of many calls, by the clock on the wall: the device's or the host's, whichever is longer."""
    for _ in range(10):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e3


def tensors(n: int, count: int = 4) -> list[torch.Tensor]:
    """Random (1, n, H, D) tensors."""
    return [torch.randn(1, n, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def compare_with_dense(causal: bool, backend: str) -> None:
    """AssertionError unless a window over everything gives dense attention and its gradients."""
    given = tensors(4096)
    results = []
    for sparse in (True, False):
        leaves = [t.clone().requires_grad_() for t in given[:3]]
        if sparse:
            out = sparse_attention(*leaves, LocalWindow(4096), is_causal=causal, backend=backend)
        else:
            views = (t.transpose(1, 2) for t in leaves)
            out = torch.nn.functional.scaled_dot_product_attention(*views, is_causal=causal).transpose(1, 2)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, given[3])])
    for a, b in zip(*results, strict=True):
        error = float((a.float() - b.float()).abs().max() / b.float().abs().max())
        assert error < 0.02, f"{backend}: {error}"


@cache
def dense(n: int, causal: bool, repeat_ms: int, kernels: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds of each dense kernel, forward and backward."""
    found = {}
    for name in kernels:
        kernel = find_kernel("cuda", torch.bfloat16, D, name=name)
        assert not isinstance(kernel, str), kernel
        q, k, v, g = (t.transpose(1, 2).contiguous() for t in tensors(n))
        out, lse = kernel.forward(q, k, v, causal, D**-0.5)
        found[name] = {
            "forward": milliseconds(lambda: kernel.forward(q, k, v, causal, D**-0.5), repeat_ms),  # noqa: B023
            "backward": milliseconds(
                lambda: kernel.backward(g, q, k, v, out, lse, causal, D**-0.5),  # noqa: B023
                repeat_ms,
            ),
        }
    return found


@cache
def dense_wall(n: int, causal: bool) -> float:
    """Wall-clock milliseconds of forward and backward of cuDNN's kernel, called as users call it."""
    *given, grad = (t.transpose(1, 2).contiguous() for t in tensors(n))
    leaves = [t.requires_grad_() for t in given]

    def both() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad(out, leaves, grad)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return wall_milliseconds(both)


def flex(pattern: Any, n: int, causal: bool) -> Callable[..., torch.Tensor]:
    """PyTorch's FlexAttention, compiled, with a BlockMask made from the lists; tensors (1, n, H, D)."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    shape, documents = Shape(1, n, n, H, H, D, D), (Document(0, 1, 0, n, 0, n),)
    options = Options(causal, D**-0.5, 0.0, "mask", "exact")
    plan = SparseProblem(pattern, shape, options, documents, torch.bfloat16, "cuda").plan
    rows = n // plan.block_size
    listed = torch.zeros(rows, rows, dtype=torch.bool, device="cuda")
    listed[plan.entry_rows, plan.columns.long()] = True
    halved = listed & torch.eye(rows, dtype=torch.bool, device="cuda") if causal else torch.zeros_like(listed)

    def counted(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(mask.int(), dim=1, descending=True, stable=True).int()
        return mask.sum(1).int()[None, None], order[None, None].contiguous()

    mask = BlockMask.from_kv_blocks(
        *counted(halved),
        *counted(listed & ~halved),
        BLOCK_SIZE=plan.block_size,
        mask_mod=lambda b, h, i, j: i >= j,
        seq_lengths=(n, n),
    )
    compiled = torch.compile(flex_attention)

    def attend(*given: torch.Tensor) -> torch.Tensor:
        return compiled(*(t.transpose(1, 2) for t in given), block_mask=mask).transpose(1, 2)

    return attend


def measure(name: str, causal: bool, backend: str, repeat_ms: int, kernels: tuple[str, ...]) -> dict[str, Any]:
    """One row through one backend: times, ratios to dense, peak memory."""
    n, pattern = ROWS[name]
    q, k, v, grad = tensors(n)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    result: dict[str, Any] = {
        "row": name, "n": n, "h": H, "d": D, "pattern": repr(pattern), "causal": causal, "backend": backend
    }  # fmt: skip
    start = time.perf_counter()
    try:
        plan = explain_sparse(*leaves, pattern, is_causal=causal, backend="auto" if backend == "flex" else backend)
        if backend == "flex":
            attend = flex(pattern, n, causal)
        else:
            attend = partial(sparse_attention, pattern=pattern, is_causal=causal, backend=backend)
        out = attend(*leaves)
    except ValueError as error:
        return result | {"refused": str(error)}
    torch.autograd.grad(out, leaves, grad, retain_graph=True)
    torch.cuda.synchronize()
    first_seconds = time.perf_counter() - start
    other = dense(n, causal, repeat_ms, kernels)

    def forward() -> object:
        with torch.no_grad():
            return attend(*leaves)

    def backward() -> object:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    ms = {"forward": milliseconds(forward, repeat_ms), "backward": milliseconds(backward, repeat_ms)}
    best = {one: min(kernel[one] for kernel in other.values()) for one in ms}
    wall = {}
    if n <= SHORT:
        del out

        def both() -> object:
            return torch.autograd.grad(attend(*leaves), leaves, grad)

        wall = {"wall_ms": wall_milliseconds(both), "dense_wall_ms": dense_wall(n, causal)}
        out = attend(*leaves)
    peaks = {}
    for one, function in (("forward", forward), ("backward", backward)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        torch.cuda.synchronize()
        peaks[one] = (torch.cuda.max_memory_allocated() - before) / 2**20
        del kept
    return result | {
        "chosen": [backend, backend] if backend == "flex" else [plan.backend, plan.backend_backward],
        "first_call_seconds": first_seconds,
        "kept": plan.blocks / plan.dense_blocks,
        "ms": ms,
        "dense_ms": best,
        "dense": other,
        "forward_ratio": best["forward"] / ms["forward"],
        "both_ratio": sum(best.values()) / sum(ms.values()),
        "forward_tflops": plan.flops_forward / ms["forward"] / 1e9,
        "backward_tflops": plan.flops_backward / ms["backward"] / 1e9,
        "peak_mib": peaks,
        **wall,
    }


def lists(name: str, causal: bool) -> dict[str, Any]:
    """Making the lists of a million rows on the device: median of 5, and the largest sum of live bytes."""
    rows, pattern = 1 << 20, MILLION[name]
    shape, documents = Shape(1, rows, rows, H, H, D, D), (Document(0, 1, 0, rows, 0, rows),)
    options = Options(causal, 1.0, 0.0, "mask", "exact")

    def made() -> int:
        plan = SparseProblem(pattern, shape, options, documents, torch.bfloat16, "cuda").plan
        torch.cuda.synchronize()
        return len(plan.columns)

    entries = made()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(5):
        start = time.perf_counter()
        made()
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return {
        "pattern": name, "causal": causal, "entries": entries, "ms": sorted(seconds)[2] * 1e3, "peak_mb": peak
    }  # fmt: skip


def selection(name: str, causal: bool, repeat_ms: int, kernels: tuple[str, ...]) -> dict[str, Any]:
    """The time of choosing blocks, of listing them for the kernels, and of whole calls, which do both once."""
    n, pattern = CHOICES[name]
    q, k, v, grad = tensors(n)

    def choose() -> torch.Tensor:
        return sparse_select(q.detach(), k.detach(), None, None, None, pattern.code, 0, causal, None)

    def call() -> object:
        with torch.no_grad():
            return sparse_attention(q, k, v, pattern, is_causal=causal)

    shape, documents = Shape(1, n, n, H, H, D, D), (Document(0, 1, 0, n, 0, n),)
    options = Options(causal, D**-0.5, 0.0, "mask", "exact")
    chosen = choose()

    def problem() -> SparseProblem:
        return SparseProblem(pattern.bound([chosen]), shape, options, documents, torch.bfloat16, "cuda")

    def listed() -> object:
        fresh = problem()
        return fresh.packed.order_rows if causal else fresh.forward_lists

    def listed_for_backward() -> object:  # what rows have chosen is packed once for both passes
        return None if causal else problem().backward_lists

    known = problem()
    backend = SPARSE_BACKENDS[choose_sparse("auto", known)[0]]
    inputs = [t.detach() for t in (q, k, v)]
    out, lse = backend.forward(*inputs, known)

    def attend() -> object:
        return backend.forward(*inputs, known)

    def attend_backward() -> object:
        return backend.backward(grad, None, *inputs, out, lse, known)

    functions = {
        "choose": choose, "list": listed, "list_backward": listed_for_backward, "call": call, "attend": attend,
        "attend_backward": attend_backward,
    }  # fmt: skip
    ms = {f"{part}_ms": milliseconds(function, repeat_ms) for part, function in functions.items()}
    best = {one: min(kernel[one] for kernel in dense(n, causal, repeat_ms, kernels).values()) for one in DIRECTIONS}
    extra = ms["call_ms"] - ms["attend_ms"]
    with_backward = extra + (0.0 if causal else ms["list_backward_ms"])
    return {
        "pattern": repr(pattern),
        "causal": causal,
        **ms,
        "dense_ms": best["forward"],
        "dense_backward_ms": best["backward"],
        "over_forward": extra / ms["attend_ms"],
        "over_both": with_backward / (ms["attend_ms"] + ms["attend_backward_ms"]),
    }


def main() -> None:
    """Measure, print one line each, write after each so that a stop loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--parts", default="speed,lists,selection")
    parser.add_argument("--backends", default="auto")
    parser.add_argument("--dense", default="cudnn,flash", help="kernels to compare with")
    parser.add_argument("--causal", default="0,1")
    parser.add_argument("--repeat-ms", type=int, default=100)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/sparse_h200.json")
    given = parser.parse_args()
    repeat_ms = 0 if given.once else given.repeat_ms
    kernels, flags = tuple(given.dense.split(",")), [flag == "1" for flag in given.causal.split(",")]
    torch.manual_seed(0)
    results: dict[str, list[dict[str, Any]]] = {part: [] for part in given.parts.split(",")}

    def keep(part: str, found: dict[str, Any], line: str) -> None:
        results[part].append(found)
        if not given.once:
            print(line, flush=True)
            save(given.output, results, quiet=True)
        torch.cuda.empty_cache()

    if "speed" in results:
        for causal in flags:
            for backend in given.backends.split(","):
                if backend != "flex":
                    compare_with_dense(causal, backend)
        for name in given.rows.split(","):
            for causal in flags:
                for backend in given.backends.split(","):
                    found = measure(name, causal, backend, repeat_ms, kernels)
                    label = f"{name}{' causal' if causal else ''} {backend}"
                    line = f"{label:<28} {found.get('refused', '')}"
                    if "ms" in found:
                        line = (
                            f"{label:<28} {found['chosen'][0]}/{found['chosen'][1]} kept {found['kept']:.4f} forward "
                            f"{found['ms']['forward']:.3f} ms ({found['forward_ratio']:.2f} x dense), backward "
                            f"{found['ms']['backward']:.3f} ms, both {found['both_ratio']:.2f} x"
                        )
                    if "wall_ms" in found:
                        line += f", wall {found['wall_ms']:.3f} ms against {found['dense_wall_ms']:.3f} of dense"
                    keep("speed", found, line)
    if "lists" in results:
        for name in MILLION:
            for causal in flags:
                found = lists(name, causal)
                line = f"{name:<20} {found['entries']:>10,} blocks {found['ms']:.1f} ms, {found['peak_mb']:.0f} MB"
                keep("lists", found, line)
    if "selection" in results:
        for name in CHOICES:
            for causal in flags:
                found = selection(name, causal, repeat_ms, kernels)
                line = (
                    f"{name}{' causal' if causal else ''}: choosing {found['choose_ms']:.2f} ms, listing "
                    f"{found['list_ms']:.2f}, call {found['call_ms']:.2f}, its attention {found['attend_ms']:.2f}, "
                    f"backward {found['attend_backward_ms']:.2f}; choosing and listing over attention "
                    f"{found['over_forward']:.1%}, with the backward pass {found['over_both']:.1%}"
                )
                keep("selection", found, line)


if __name__ == "__main__":
    main()
