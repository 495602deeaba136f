"""The fused kernels for Hopper GPUs over lists of blocks of 64 or 128, which see a pattern's blocks whole.

Blocks that rows choose for themselves go through `chosen`, in plain Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gluon as dilated
from ..tables import LONGEST, covered, hold_for_replays, longest_position
from . import chosen
from .problem import SparseProblem

_ROWS = 2**31 - 2**16
"""Rows of a tensor, over its batch, that 32 bits count with room for a tile."""


def unsupported(problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem (or its backward pass), or None."""
    reason = dilated.unavailable(problem.device)
    if reason:
        return reason
    shape, options = problem.shape, problem.options
    if problem.pattern.block_size not in (64, 128):
        return f"the kernels take blocks of 64 and 128, not {problem.pattern.block_size}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {problem.dtype}"
    if shape.head_dim not in dilated.HEAD_DIMS or shape.value_dim != shape.head_dim:
        return f"the kernels take equal head dims of {dilated.HEAD_DIMS}, not {shape.head_dim} and {shape.value_dim}"
    if problem.has_mask:
        return "the kernels take no key_padding_mask"
    if options.dropout_p:
        return "the kernels take no dropout"
    if options.scale <= 0:
        return f"the kernels need a positive scale, not {options.scale}"
    if backward and torch.are_deterministic_algorithms_enabled():
        return "the backward kernel adds dQ in any order, and torch.use_deterministic_algorithms is on"
    if longest_position(problem.carrier) > LONGEST:
        return f"the kernels count positions up to 2^30, and they reach {longest_position(problem.carrier)}"
    if shape.batch * max(shape.query_rows, shape.key_rows) > _ROWS:
        return f"the kernels count rows in 32 bits, and there are {shape.batch * shape.key_rows}"
    if problem.selection is not None:
        return chosen.unsupported(problem)
    if not problem.by_content and problem.plan.whole is not None:
        return "the pattern shows parts of blocks, and the kernels take whole ones"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: SparseProblem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, D), lse (B, Nq, H))."""
    if problem.selection is not None:
        found = forward(query, key, value, problem.listed)
        chosen.join_chosen(query, key, value, *found, problem, mask, seed)
        return found
    from ...kernels import hopper_sparse

    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not covered(problem.carrier, "query"):
        out.zero_()
        lse.fill_(-torch.inf)
    lists, (q, k, v) = problem.forward_lists, map(dilated._ready, (query, key, value))
    hold_for_replays(lists)
    hopper_sparse.forward(
        q, k, v, out, lse, tiles=lists.tiles, records=lists.records, work=lists.work,
        is_causal=problem.options.is_causal, scale=problem.options.scale,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: SparseProblem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the final (out, lse); ``grad_lse`` is (B, Nq, H)."""
    if problem.selection is not None:
        tensors = grad_out, grad_lse, query, key, value, out, lse
        gradients = backward(*tensors, problem.listed)
        chosen.add_chosen(*tensors, gradients, problem, mask, seed)
        return gradients
    from ...kernels import hopper_sparse_backward

    make = torch.empty if covered(problem.carrier, "key") else torch.zeros
    dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
    lists, (do, q, k, v) = problem.backward_lists, map(dilated._ready, (grad_out, query, key, value))
    hold_for_replays(lists)
    dq = hopper_sparse_backward.backward(
        do, grad_lse, q, k, v, out, lse, dk, dv, tiles=lists.tiles, segments=lists.segments, records=lists.records,
        work=lists.work, is_causal=problem.options.is_causal, scale=problem.options.scale,
    )  # fmt: skip
    return dq, dk, dv
