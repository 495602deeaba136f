"""The operators of block-sparse attention that PyTorch sees: schemas, fakes, autograd; `dispatch` chooses inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...types import Options, Shape
from ..documents import read_documents
from ..ops import _fake_backward, _fake_forward, _observed, _register, call_straight, no_autocast, seen, transformed
from .dispatch import SPARSE_BACKENDS, choose_sparse
from .problem import SparseProblem, make_problem


def sparse_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    lists: Sequence[Tensor],
    pattern: str,
    key_start: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    device: str | None = None,
) -> SparseProblem:
    """Read what the tensors say (shapes, where documents lie) into a problem; meta tensors stand for ``device``."""
    shape = Shape(
        query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3]
    )  # fmt: skip
    documents = read_documents(
        shape, key_start=key_start, key_starts=key_starts, cu_seqlens=cu_seqlens, suffix_mask=None
    )  # fmt: skip
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    options = Options(is_causal, scale, dropout_p, "mask", "exact")
    return make_problem(
        pattern, lists, shape, options, documents, query.dtype, device or str(query.device),
        key_padding_mask is not None,
    )  # fmt: skip


def without_empty_rows(grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    """A row without keys is constant: what reaches it (NaN from a logaddexp of two -inf, say) goes no further."""
    empty = lse == -torch.inf
    return grad_out.masked_fill(empty.unsqueeze(-1), 0), None if grad_lse is None else grad_lse.masked_fill(empty, 0)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    seed: Tensor | None,
    lists: Sequence[Tensor],
    pattern: str,
    key_start: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H)), both contiguous."""
    problem = sparse_problem(
        query, key, value, key_padding_mask, cu_seqlens, key_starts, lists, pattern, key_start, is_causal, scale,
        dropout_p,
    )  # fmt: skip
    return _forward_of(problem, query, key, value, key_padding_mask, seed, backend)


def _forward_of(
    problem: SparseProblem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = SPARSE_BACKENDS[choose_sparse(backend, problem)[0]]
    with torch.cuda.device_of(query), no_autocast(query.device.type):
        return chosen.forward(query, key, value, problem, mask=mask, seed=None if seed is None else int(seed.item()))


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    seed: Tensor | None,
    lists: Sequence[Tensor],
    pattern: str,
    key_start: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    problem = sparse_problem(
        query, key, value, key_padding_mask, cu_seqlens, key_starts, lists, pattern, key_start, is_causal, scale,
        dropout_p,
    )  # fmt: skip
    return _backward_of(
        problem, grad_out, grad_lse, query, key, value, out, lse, key_padding_mask, seed, backend
    )  # fmt: skip


def _backward_of(
    problem: SparseProblem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = SPARSE_BACKENDS[choose_sparse(backend, problem, backward=True, grad_lse=grad_lse is not None)[0]]
    if not problem.every_row_has_keys:
        grad_out, grad_lse = without_empty_rows(grad_out, grad_lse, lse)
    with torch.cuda.device_of(query), no_autocast(query.device.type):
        return chosen.backward(
            grad_out, grad_lse, query, key, value, out, lse, problem, mask=mask,
            seed=None if seed is None else int(seed.item()),
        )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, lists, ctx.rest = inputs[:7], inputs[7], inputs[8:]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:], *lists)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # once: under checkpointing every access recomputes
    saved, lists = tensors[:9], list(tensors[9:])
    empty = (None,) * 4, [None] * len(lists), (None,) * len(ctx.rest)
    if grad_out is None and grad_lse is None:
        return None, None, None, *empty[0], empty[1], *empty[2]
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    if torch.is_grad_enabled() or _observed(grad_out, *saved[:3], grad_lse):
        gradients = seen(sparse_backward, _TransformedBackward, (grad_out, grad_lse, *saved, lists, *ctx.rest))
    elif (problem := getattr(ctx, "problem", None)) is not None:
        query, key, value, out, lse, mask, _, _, seed = saved
        gradients = _backward_of(problem, grad_out, grad_lse, query, key, value, out, lse, mask, seed, ctx.rest[-1])
    else:
        gradients = _backward(*(grad_out, grad_lse, *saved, lists, *ctx.rest))
    return *gradients, *empty[0], empty[1], *empty[2]


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("block-sparse attention is differentiable once; its gradients have no derivative")


sparse_forward = _register("sparse_forward", _forward, _fake_forward)
sparse_backward = _register("sparse_backward", _backward, _fake_backward)
torch.library.register_autograd("dilated_attention_pytorch::sparse_backward", _refuse)
torch.library.register_autograd(
    "dilated_attention_pytorch::sparse_forward", _differentiate, setup_context=_setup_context
)  # fmt: skip


class _Attention(torch.autograd.Function):
    """The differentiable operator, past PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        # Kept, since what rows have chosen is sorted once for both passes.
        query, key, value, mask, _, _, seed = inputs[:7]
        ctx.problem = sparse_problem(*(*inputs[:6], *inputs[7:13]))
        output = _forward_of(ctx.problem, query, key, value, mask, seed, inputs[13])
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        found = _differentiate(ctx, grad_out, grad_lse)
        return *found[:7], None, *found[8:]


_Transformed = transformed(sparse_forward, _Attention.backward, _setup_context)
_TransformedBackward = transformed(sparse_backward, _refuse)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    seed: Tensor | None,
    lists: Sequence[Tensor],
    pattern: str,
    key_start: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`sparse_forward`, by `call_straight`."""
    arguments = (
        query, key, value, key_padding_mask, cu_seqlens, key_starts, seed, lists, pattern, key_start, is_causal, scale,
        dropout_p, backend,
    )  # fmt: skip
    return call_straight(sparse_forward, _Attention, _Transformed, _forward, arguments)
