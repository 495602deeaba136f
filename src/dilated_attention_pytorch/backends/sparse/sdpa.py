"""PyTorch's fused attention kernels on tiles of keys: views where lists are windows, gathered tiles elsewhere.

Query tiles that list equally many key tiles become the problems of one call. A causal diagonal block is a call of its
own, a square, and so are tiles that a document fills in part; they join by their log-sum-exp. What the kernels cannot
say is carried by columns of the head dim, as in `backends.sdpa`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...merge import accumulator_dtype, merge_
from .. import sdpa
from ..vendor import Kernel
from . import chosen_calls
from .problem import SparseProblem
from .tiled import Part, layout, parts


def unsupported(problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem (or its backward with a gradient of the lse), or None."""
    reason = sdpa.unsupported(problem.carrier, backward=backward, grad_lse=grad_lse)
    if reason is None and problem.selection is None and problem.plan.whole is not None:
        return "the pattern shows parts of blocks, and the vendor kernels take whole ones"
    return reason


def _kernel(problem: SparseProblem, *, grad_lse: bool) -> tuple[Kernel, int]:
    """The vendor kernel and the head dim that it gets."""
    kernel = sdpa.kernel_for(problem.carrier, grad_lse=grad_lse)
    assert isinstance(kernel, Kernel), kernel
    return kernel, sdpa._round_up(kernel, sdpa._width(problem.carrier, grad_lse=grad_lse))


def _no_keys(hidden: Tensor, part: Part) -> Tensor:
    """(1, problems, query rows or 1): which query rows of a part have every key masked; ``hidden`` is tiled."""
    masked = part.take(hidden)[..., 0]
    if part.is_causal:
        return (~masked).cumsum(-1, dtype=torch.int32) == 0
    return masked.all(-1, keepdim=True)


def _queries(tiled: Tensor, part: Part) -> Tensor:
    """(1, problems, rows, D) of a (heads, tiles, b, D) tensor of query rows, a copy; a square takes its own rows."""
    found = tiled.flatten(0, 1)[part.rows].unsqueeze(0)
    return found[:, :, part.low : part.high] if part.is_causal else found


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
    kernel, width = _kernel(problem, grad_lse=False)
    if problem.selection is not None:
        found = forward(query, key, value, problem.listed, mask=mask)
        return chosen_calls.joined(kernel, width, query, key, value, *found, problem, mask)
    shape, plan, acc = problem.shape, problem.plan, accumulator_dtype(query.dtype)
    own = layout(plan.query_tiles, plan.block_size, shape.query_rows)
    other = layout(plan.key_tiles, plan.block_size, shape.key_rows)
    carried = sdpa._carry(query, key, value, problem.carrier, mask, width)
    q, k, v = (where.tiled(t) for where, t in zip((own, other, other), carried, strict=True))
    hidden = None
    if mask is not None:
        hidden = other.tiled(mask[:, :, None, None].expand(*key.shape[:3], 1))
    out = q.new_zeros(q.shape, dtype=acc)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=acc)
    flat_out, flat_lse = out.flatten(0, 1), lse.flatten(0, 1)
    for part in parts(plan, shape.heads, shape.kv_heads, width, is_causal=problem.options.is_causal):
        part_out, part_lse = kernel.forward(
            _queries(q, part), part.take(k), part.take(v), part.is_causal, problem.options.scale
        )
        if hidden is not None:
            part_lse = part_lse.masked_fill(_no_keys(hidden, part), -torch.inf)
        if part.fresh and hidden is None:
            flat_out[part.rows], flat_lse[part.rows] = part_out[0].to(acc), part_lse[0].to(acc)
            continue
        rows = slice(part.low, part.high) if part.is_causal else slice(None)
        joined, joined_lse = flat_out[part.rows], flat_lse[part.rows]
        merge_(joined[:, rows], joined_lse[:, rows], part_out[0], part_lse[0])
        flat_out[part.rows], flat_lse[part.rows] = joined, joined_lse
    restored = own.restored(out[..., : shape.value_dim], query)
    return restored.to(query.dtype), own.restored(lse.unsqueeze(-1), query, -torch.inf)[..., 0]


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
    kernel, width = _kernel(problem, grad_lse=grad_lse is not None)
    if problem.selection is not None:
        tensors = grad_out, grad_lse, query, key, value, out, lse
        gradients = backward(*tensors, problem.listed, mask=mask)
        return chosen_calls.add_chosen(kernel, width, *tensors, gradients, problem, mask)
    shape, plan, acc = problem.shape, problem.plan, accumulator_dtype(query.dtype)
    own = layout(plan.query_tiles, plan.block_size, shape.query_rows)
    other = layout(plan.key_tiles, plan.block_size, shape.key_rows)
    carried = sdpa._carry(query, key, value, problem.carrier, mask, width)
    grad_out, out = sdpa._pad(grad_out, width), sdpa._pad(out, width)
    if grad_lse is not None:
        sdpa._carry_grad_lse(grad_out, out, grad_lse)
    q, k, v, do, o = (
        where.tiled(t) for where, t in zip((own, other, other, own, own), (*carried, grad_out, out), strict=True)
    )  # fmt: skip
    # A row without keys, or of no document: exp(s - inf) is 0 where exp(s + inf) is not.
    final = own.tiled(lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
    final = final[..., 0].masked_fill(~own.exists, torch.inf)
    dq, dk, dv = (torch.zeros_like(t, dtype=acc) for t in (q, k, v))
    for part in parts(plan, shape.heads, shape.kv_heads, width, is_causal=problem.options.is_causal):
        grads = kernel.backward(
            _queries(do, part),
            _queries(q, part),
            part.take(k),
            part.take(v),
            _queries(o, part),
            _queries(final.unsqueeze(-1), part)[..., 0],
            part.is_causal,
            problem.options.scale,
        )
        rows = slice(part.low, part.high)
        place = dq.flatten(0, 1)[part.rows]
        (place[:, rows] if part.is_causal else place).add_(grads[0][0])
        dq.flatten(0, 1)[part.rows] = place
        keys = part.keys.reshape(-1)
        for total, grad in ((dk, grads[1]), (dv, grads[2])):
            if part.keys.shape[1] > 1 or part.high - part.low == plan.block_size:
                total.flatten(0, 1).index_add_(0, keys, grad.to(acc).reshape(len(keys), *total.shape[2:]))
            else:
                total.flatten(0, 1)[:, rows].index_add_(0, keys, grad[0].to(acc))
    return (
        own.restored(dq[..., : shape.head_dim], query).to(query.dtype),
        other.restored(dk[..., : shape.head_dim], key).to(key.dtype),
        other.restored(dv[..., : shape.value_dim], value).to(value.dtype),
    )
