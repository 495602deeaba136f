"""A small call of every GPU kernel, forward and backward: what a memory checker runs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/every_kernel.py

Without the caching allocator every tensor is an allocation of its own, so that an access behind its end is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import GlobalLocal, dilated_attention, hilbert_order, sparse_attention
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


def main() -> None:
    """Every backend and head dim, lengths that divide nothing, masks, documents, a decoding step."""
    mask = torch.rand(1, 645, device="cuda") < 0.3
    cuts = torch.tensor([0, 100, 101, 645])
    options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"cu_seqlens": cuts}, {"padding": "zeros"}]
    for dim in gluon.HEAD_DIMS if gluon.unavailable() is None else ():
        for some in options:
            differentiate(lambda *t, some=some: dilated_attention(*t, *PATTERN, backend="gluon", **some),
                          645, 645, dim, torch.bfloat16)  # fmt: skip
        print("gluon", dim, flush=True)
    for dim, dtype in ((24, torch.bfloat16), (64, torch.float16), (128, torch.float32)):
        for some in (*options, {"key_padding_mask": mask}, {"dropout_p": 0.2}):
            differentiate(lambda *t, some=some: dilated_attention(*t, *PATTERN, backend="triton", **some),
                          645, 645, dim, dtype)  # fmt: skip
        step = {"is_causal": True, "key_start": 77}
        differentiate(lambda *t, step=step: dilated_attention(*t, *PATTERN, backend="triton", **step),
                      645, 1, dim, dtype)  # fmt: skip
        print("triton", dim, dtype, flush=True)
    pattern = GlobalLocal(window=128, num_global_tokens=64, block_size=64)
    for backend in ("triton", *(("gluon",) if gluon.unavailable() is None else ())):
        for is_causal in (False, True):
            differentiate(
                lambda *t, is_causal=is_causal, backend=backend: sparse_attention(
                    *t, pattern, is_causal=is_causal, backend=backend
                ),
                645, 645, 64, torch.bfloat16,
            )  # fmt: skip
        print("block-sparse", backend, flush=True)
    x = torch.randn(3, 37, 77, device="cuda", dtype=torch.bfloat16)
    permute_rows(x, torch.randperm(37, device="cuda"), 1)
    hilbert_order(37, 21, device="cuda")
    norm, linear = torch.nn.LayerNorm(77, device="cuda"), torch.nn.Linear(77, 40, device="cuda")
    for gelu in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            (out,) = norm_linear(x.requires_grad_(), norm, [linear], gelu=gelu)
        out.float().square().sum().backward()
    torch.cuda.synchronize()
    print("ordering and norms", flush=True)


if __name__ == "__main__":
    main()
