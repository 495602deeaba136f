"""The operator that gives a learned gate its gradient: out and lse pass through it unchanged.

A gate g adds ``g - stopgrad(g)`` to the scores of a row in a block. That is zero, so nothing but the gradient is left
to compute: that of g[i, j] is the sum of dS over the keys of block j that row i sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import _register, no_autocast
from . import reference
from .ops import _refuse, sparse_problem, without_empty_rows


def check_gate(gate: Any, query: Tensor, backend: str) -> None:
    """Raise ValueError for what is no gate of ``query`` (B, Nq, H, D), or a backend that carries none."""
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise ValueError(f"gate is of type {type(gate).__name__}; give a floating-point tensor (B, H, N_q, blocks)")
    batch, rows, heads = query.shape[:3]
    if gate.dim() != 4 or gate.shape[:3] != (batch, heads, rows):
        raise ValueError(f"gate has shape {tuple(gate.shape)}; give ({batch}, {heads}, {rows}, blocks), expanded")
    if gate.device != query.device:
        raise ValueError(f"gate is on {gate.device}, query on {query.device}; give both on one device")
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend {backend!r} carries no gate; use backend='auto' or 'reference'")


def _gate(
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Copies of out (B, Nq, H, Dv) and lse (B, Nq, H)."""
    problem = sparse_problem(
        query, key, value, key_padding_mask, cu_seqlens, key_starts, lists, pattern, key_start, is_causal, scale,
        dropout_p,
    )  # fmt: skip
    needed = max((-(-(d.position + d.rows) // problem.pattern.block_size) for d in problem.documents), default=0)
    if gate.shape[3] < needed:
        raise ValueError(f"gate has {gate.shape[3]} blocks, and a document has {needed}; give a column for every block")
    return out.clone(), lse.clone()


def _fake_gate(gate: Tensor, out: Tensor, lse: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(lse)


def _gate_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
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
) -> Tensor:
    """(B, H, Nq, blocks): the gradient of the gate."""
    problem = sparse_problem(
        query, key, value, key_padding_mask, cu_seqlens, key_starts, lists, pattern, key_start, is_causal, scale,
        dropout_p,
    )  # fmt: skip
    grad_out, grad_lse = without_empty_rows(grad_out, grad_lse, lse)
    with torch.cuda.device_of(query), no_autocast(query.device.type):
        return reference.gate_gradient(
            grad_out, grad_lse, query, key, value, out, lse, problem,
            gate.shape[3], mask=key_padding_mask, seed=None if seed is None else int(seed.item()),
        ).to(gate.dtype)  # fmt: skip


def _fake_gate_backward(grad_out: Tensor, grad_lse: Tensor | None, gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, lists, ctx.rest = inputs[:10], inputs[10], inputs[11:]
    ctx.save_for_backward(*tensors, *lists)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # once: under checkpointing every access recomputes
    saved, lists = tensors[:10], list(tensors[10:])
    grad_gate = None
    if ctx.needs_input_grad[0] and not (grad_out is None and grad_lse is None):
        own = torch.zeros_like(saved[1]) if grad_out is None else grad_out
        grad_gate = sparse_gate_backward(own, grad_lse, *saved, lists, *ctx.rest)
    return grad_gate, grad_out, grad_lse, *(None,) * 7, [None] * len(lists), *(None,) * len(ctx.rest)


sparse_gate = _register("sparse_gate", _gate, _fake_gate)
sparse_gate_backward = _register("sparse_gate_backward", _gate_backward, _fake_gate_backward)
torch.library.register_autograd("dilated_attention_pytorch::sparse_gate_backward", _refuse)
torch.library.register_autograd(
    "dilated_attention_pytorch::sparse_gate", _differentiate, setup_context=_setup_context
)  # fmt: skip
