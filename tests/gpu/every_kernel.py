"""A small call of every GPU kernel, forward and backward: what a memory checker runs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/every_kernel.py [PART ...]

Without the caching allocator every tensor is an allocation of its own, so that an access behind its end is found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import ContentTopK, GlobalLocal, dilated_attention, hilbert_order, sparse_attention
from dilated_attention_pytorch.backends import gluon
from dilated_attention_pytorch.kernels.hilbert.triton import permute_rows
from dilated_attention_pytorch.models.pointwise import norm_linear

PATTERN = (128, 300, 700), (1, 2, 4)


def differentiate(attend: Callable[..., Tensor], rows: int, queries: int, dim: int, dtype: torch.dtype) -> None:
    """Forward and backward of one call with grouped heads."""
    leaves = [
        torch.randn(1, n, heads, dim, device="cuda", dtype=dtype).requires_grad_()
        for n, heads in ((queries, 4), (rows, 2), (rows, 2))
    ]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all(torch.isfinite(t).all() for t in (out, *grads))


def dilated(backend: str, dim: int, dtype: torch.dtype) -> None:
    """Lengths that divide nothing, documents; masks, dropout and a decoding step where the backend takes them."""
    mask = torch.rand(1, 645, device="cuda") < 0.3
    cuts = torch.tensor([0, 100, 101, 645])
    options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"cu_seqlens": cuts}, {"padding": "zeros"}]
    if backend == "triton":
        options += [{"key_padding_mask": mask}, {"dropout_p": 0.2}]
    for some in options:
        differentiate(partial(attend_dilated, backend=backend, **some), 645, 645, dim, dtype)
    if backend == "triton":
        differentiate(partial(attend_dilated, backend=backend, is_causal=True, key_start=77), 645, 1, dim, dtype)


def attend_dilated(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return dilated_attention(query, key, value, *PATTERN, **options)


def block_sparse(backend: str) -> None:
    """Lists of blocks, and blocks that content chooses: for a block of rows and, under a causal mask, for each row."""
    for pattern in (GlobalLocal(window=128, num_global_tokens=64, block_size=64), ContentTopK(2, block_size=64)):
        for is_causal in (False, True):
            attend = partial(sparse_attention, pattern=pattern, is_causal=is_causal, backend=backend)
            differentiate(attend, 645, 645, 64, torch.bfloat16)


def others() -> None:
    """Ordering, and norms with what follows them."""
    x = torch.randn(3, 37, 77, device="cuda", dtype=torch.bfloat16)
    permute_rows(x, torch.randperm(37, device="cuda"), 1)
    hilbert_order(37, 21, device="cuda")
    norm, linear = torch.nn.LayerNorm(77, device="cuda"), torch.nn.Linear(77, 40, device="cuda")
    for gelu in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            (out,) = norm_linear(x.requires_grad_(), norm, [linear], gelu=gelu)
        out.float().square().sum().backward()


PARTS: dict[str, Callable[[], None]] = {
    **{f"gluon-{dim}": partial(dilated, "gluon", dim, torch.bfloat16) for dim in gluon.HEAD_DIMS},
    "triton-24": partial(dilated, "triton", 24, torch.bfloat16),
    "triton-64": partial(dilated, "triton", 64, torch.float16),
    "triton-128": partial(dilated, "triton", 128, torch.float32),
    "sparse-triton": partial(block_sparse, "triton"),
    "sparse-gluon": partial(block_sparse, "gluon"),
    "others": others,
}


def main() -> None:
    """The parts that are named, or all that this GPU has."""
    for name in sys.argv[1:] or PARTS:
        if "gluon" in name and (reason := gluon.unavailable()):
            print(f"not {name}: {reason}", flush=True)
            continue
        PARTS[name]()
        torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    main()
