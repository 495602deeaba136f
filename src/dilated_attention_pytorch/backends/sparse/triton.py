"""Kernels over lists of key blocks in plain Triton: every option, no gathered copies, no partial results in memory.

Blocks that rows choose for themselves go through `chosen`, which has some.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import triton as dilated
from ..tables import LONGEST, covered
from . import chosen
from .problem import SparseProblem


def unsupported(problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem, or None."""
    reason = dilated.unsupported(problem.carrier, backward=backward, grad_lse=grad_lse)
    if reason is None and problem.selection is not None:
        return chosen.unsupported(problem)
    return reason


def _common(problem: SparseProblem, mask: Tensor | None, seed: int | None, aligned: list[Tensor]) -> dict[str, Any]:
    """Arguments that every kernel takes."""
    plan = problem.plan
    unused = plan.query_tiles  # of integers, as what it stands for
    shared = dilated._shared(problem.carrier, mask, seed, aligned)
    for name in ("branches", "interleaved"):
        del shared[name]
    # A segment, or a rate, beyond every position is one of any such length.
    branches = [
        (min(branch.segment_length, LONGEST), min(branch.dilation_rate, LONGEST), pattern.head_offsets == "interleaved")
        for pattern in plan.dilated
        for branch in pattern.branches
    ]
    return {
        **shared,
        "num_branches": len(branches),
        "dilated": torch.tensor(branches, dtype=torch.int32).to(unused.device) if branches else unused,
        "query_tiles": plan.query_tiles,
        "key_tiles": plan.key_tiles,
        "whole": unused if plan.whole is None else plan.whole.to(torch.uint8),
        "row_bits": unused if plan.row_bits is None else plan.row_bits,
        "PARTLY": plan.whole is not None,
        "WORDS": 0 if plan.row_bits is None else plan.row_bits.shape[1],
        "SIZE": plan.block_size,
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: SparseProblem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H))."""
    if problem.selection is not None:
        found = forward(query, key, value, problem.listed, mask=mask, seed=seed)
        chosen.join_chosen(query, key, value, *found, problem, mask, seed)
        return found
    from ...kernels.sparse_forward import sparse_forward_kernel

    plan, heads = problem.plan, problem.shape.heads
    aligned = [dilated._aligned(t) for t in (query, key, value)]
    dim, value_dim = aligned[0].shape[3], aligned[2].shape[3]
    every_row = covered(problem.carrier, "query")
    out = dilated._result((*query.shape[:3], value_dim), query, every_row)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not every_row:
        lse.fill_(-torch.inf)
    size = dilated._sizes(dilated._padded(max(dim, value_dim)), problem.dtype.itemsize, problem.device, "forward")
    block, tiles = min(size.block, plan.block_size), plan.query_tiles.shape[0]
    if tiles:
        sparse_forward_kernel[(heads * tiles * (plan.block_size // block),)](
            *aligned, out=out, lse=lse, row_pointer=plan.row_pointer, columns=plan.columns, num_query_tiles=tiles,
            head_step=tiles + 1 if plan.per_head else 0, BLOCK=block, KEYS=min(size.others, plan.block_size),
            num_warps=size.warps, num_stages=size.stages, **_common(problem, mask, seed, aligned),
        )  # fmt: skip
    return dilated._narrow(out, problem.shape.value_dim), lse


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
        gradients = backward(*tensors, problem.listed, mask=mask, seed=seed)
        chosen.add_chosen(*tensors, gradients, problem, mask, seed)
        return gradients
    from ...kernels.sparse_backward import sparse_key_kernel, sparse_query_kernel

    shape, plan = problem.shape, problem.plan
    delta = dilated._delta(out, grad_out, grad_lse)
    aligned = [dilated._aligned(t) for t in (query, key, value, grad_out)]
    dq = dilated._result(tuple(aligned[0].shape), query, covered(problem.carrier, "query"))
    dk, dv = (dilated._result(tuple(t.shape), t, covered(problem.carrier, "key")) for t in aligned[1:3])
    common = {
        **_common(problem, mask, seed, aligned), "lse": lse, "delta": delta, "scale": problem.options.scale
    }  # fmt: skip
    dim, itemsize = dilated._padded(max(dq.shape[3], dv.shape[3])), problem.dtype.itemsize
    tiles, keys = plan.query_tiles.shape[0], plan.key_tiles.shape[0]
    if tiles and keys:
        size = dilated._sizes(dim, itemsize, problem.device, "query")
        block = min(size.block, plan.block_size)
        sparse_query_kernel[(shape.heads * tiles * (plan.block_size // block),)](
            *aligned[:3], grad_out=aligned[3], grad_query=dq, row_pointer=plan.row_pointer, columns=plan.columns,
            num_query_tiles=tiles, head_step=tiles + 1 if plan.per_head else 0, BLOCK=block,
            KEYS=min(size.others, plan.block_size), num_warps=size.warps, num_stages=size.stages, **common,
        )  # fmt: skip
        size = dilated._sizes(dim, itemsize, problem.device, "key")
        block = min(size.block, plan.block_size)
        pointer, columns, entries = plan.transposed
        sparse_key_kernel[(shape.kv_heads * keys * (plan.block_size // block),)](
            *aligned[:3], grad_out=aligned[3], grad_key=dk, grad_value=dv, row_pointer=pointer, columns=columns,
            entries=entries, num_key_tiles=keys, head_step=keys + 1 if plan.per_head else 0,
            key_rows_total=shape.key_rows, BLOCK=block, QUERIES=min(size.others, plan.block_size),
            num_warps=size.warps, num_stages=size.stages, **common,
        )  # fmt: skip
    dq, dk, dv = (dilated._narrow(t, like.shape[3]) for t, like in ((dq, query), (dk, key), (dv, value)))
    return dq, dk, dv
