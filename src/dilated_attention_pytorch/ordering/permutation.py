"""The operator that moves rows, and its derivative: the same with the inverse, where a plain gather would add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import has_triton

_NAME = "dilated_attention_pytorch::permute_rows"


def inverse_of(index: Tensor) -> Tensor:
    """The inverse of a permutation (N,), or of each of a batch of them (B, N)."""
    places = torch.arange(index.shape[-1], device=index.device).expand(index.shape)
    return torch.empty_like(index).scatter_(-1, index, places)


def gather_rows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """``x`` with row index[i] in place i, by PyTorch: index is (N,), or (x.shape[0], N) for a batch."""
    if index.dim() == 1:
        return x.index_select(dim, index)
    outer, rows, inner = x.shape[:dim].numel(), x.shape[dim], x.shape[dim + 1 :].numel()
    first = torch.arange(outer, device=x.device)[:, None] * rows
    flat = (first + index.repeat_interleave(outer // max(index.shape[0], 1), 0)).flatten()
    return x.reshape(outer * rows, inner).index_select(0, flat).view(x.shape)


def _permute_rows(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    if x.is_cuda and has_triton():
        from ..kernels.hilbert.triton import permute_rows as kernel

        return kernel(x, index, dim)
    return gather_rows(x, index, dim)


def _fake(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, inverse, ctx.dim = inputs
    ctx.save_for_backward(index, inverse)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    index, inverse = ctx.saved_tensors
    return permute_rows(grad, inverse, index, ctx.dim), None, None, None


torch.library.define(_NAME, torch.library.infer_schema(_permute_rows, mutates_args=()))
torch.library.impl(_NAME, "CompositeExplicitAutograd", _permute_rows)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _differentiate, setup_context=_setup_context)

permute_rows: Any = torch.ops.dilated_attention_pytorch.permute_rows.default
"""(x, index, inverse, dim): x with row index[i] in place i; nobody checks that the two are inverses."""
