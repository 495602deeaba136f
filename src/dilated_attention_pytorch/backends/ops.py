"""The operators that PyTorch sees: schemas, fakes, autograd. What runs is chosen inside, by `dispatch`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ..merge import accumulator_dtype
from ..patterns import DilatedPattern
from ..types import HeadOffsets, MixingGrad, Options, Padding, Shape
from .dispatch import choose
from .documents import read_documents
from .problem import Problem
from .views import foldable


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    key_start: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    head_offsets: str,
    padding: str,
    mixing_grad: str,
    device: str | None = None,
) -> Problem:
    """Read what the tensors say (shapes, strides, where documents lie) into a Problem, on ``device`` or theirs."""
    shape = Shape(
        query.shape[0],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        key.shape[2],
        query.shape[3],
        value.shape[3],
    )
    documents = read_documents(
        shape,
        key_start=key_start,
        key_starts=key_starts,
        cu_seqlens=cu_seqlens,
        suffix_mask=key_padding_mask if padding == "zeros" else None,
    )
    return _problem(
        tuple(segment_lengths),
        tuple(dilation_rates),
        head_offsets,
        shape,
        Options(
            is_causal,
            1 / math.sqrt(query.shape[3]) if scale is None else scale,
            dropout_p,
            cast(Padding, padding),
            cast(MixingGrad, mixing_grad),
        ),
        documents,
        query.dtype,
        device or str(query.device),
        key_padding_mask is not None,
        all(map(foldable, (query, key, value))),
    )


@lru_cache(maxsize=256)
def _problem(
    segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...], head_offsets: str, *rest: Any
) -> Problem:
    """One Problem for equal calls, so that what it works out (plan, pattern) is worked out once."""
    return Problem(DilatedPattern(segment_lengths, dilation_rates, cast(HeadOffsets, head_offsets)), *rest)


@contextmanager
def no_autocast(device: str) -> Iterator[None]:
    """Leave dtypes as they are: the public functions have cast already."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    key_starts: Tensor | None,
    seed: Tensor | None,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    key_start: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    head_offsets: str,
    padding: str,
    mixing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H)), both contiguous."""
    problem = make_problem(
        query, key, value, key_padding_mask, cu_seqlens, key_starts, segment_lengths, dilation_rates, key_start,
        is_causal, scale, dropout_p, head_offsets, padding, mixing_grad,
    )  # fmt: skip
    chosen = choose(backend, problem).backend
    with torch.cuda.device_of(query), no_autocast(query.device.type):
        return chosen.forward(
            query, key, value, problem, mask=key_padding_mask, seed=None if seed is None else int(seed.item())
        )


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return (
        query.new_empty(*rows, value.shape[3]),
        query.new_empty(rows, dtype=accumulator_dtype(query.dtype)),
    )


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
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    key_start: int,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    head_offsets: str,
    padding: str,
    mixing_grad: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    problem = make_problem(
        query, key, value, key_padding_mask, cu_seqlens, key_starts, segment_lengths, dilation_rates, key_start,
        is_causal, scale, dropout_p, head_offsets, padding, mixing_grad,
    )  # fmt: skip
    chosen = choose(backend, problem, backward=True, grad_lse=grad_lse is not None).backend
    # A row without keys is constant: what reaches it (NaN from a logaddexp of two -inf, say) goes no further.
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)
    if key_padding_mask is not None:  # only then is such a row part of a call
        grad_out = grad_out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    with torch.cuda.device_of(query), no_autocast(query.device.type):
        return chosen.backward(
            grad_out, grad_lse, query, key, value, out, lse, problem,
            mask=key_padding_mask, seed=None if seed is None else int(seed.item()),
        )  # fmt: skip


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.rest = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    empty = (None,) * (4 + len(ctx.rest))
    if grad_out is None and grad_lse is None:
        return None, None, None, *empty
    if grad_out is None:
        grad_out = torch.zeros_like(ctx.saved_tensors[3])
    return *attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest), *empty


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("dilated attention is differentiable once; its gradients have no derivative")


def _register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make an operator of a function, with a schema from its annotations.

    `torch.library.custom_op` does the same and wraps the function in `torch._dynamo.disable`, whose import costs the
    first call some two seconds; an operator is opaque to dynamo without that.
    """
    qualified = f"dilated_attention_pytorch::{name}"
    torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    torch.library.register_fake(qualified, fake)
    return cast(Callable[..., Any], getattr(torch.ops.dilated_attention_pytorch, name).default)


attention_forward = _register("forward", _forward, _fake_forward)
attention_backward = _register("backward", _backward, _fake_backward)
torch.library.register_autograd("dilated_attention_pytorch::backward", _refuse)
torch.library.register_autograd("dilated_attention_pytorch::forward", _differentiate, setup_context=_setup_context)
