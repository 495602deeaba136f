"""PyTorch's fused attention kernels on zero-copy views of the original tensors, joined by their log-sum-exp.

What the kernels cannot say is carried by a few extra columns of the head dim (then, and only then, the tensors are
copied): a key mask by one column whose product is a huge negative score, the gradient of the lse by columns with
dO' = 1 and O' = -dLSE, a value dim that differs from the head dim or an unaligned one by columns of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..merge import accumulator_dtype, add_zero_keys_, merge_
from ..types import Call, Plan
from .problem import Problem
from .vendor import Kernel, find_kernel
from .views import foldable, key_view, query_view

_SMALLEST_CHUNK = 1 << 13


def _mask_factor(dtype: torch.dtype) -> float:
    """A number whose negated square is the product q . k of a masked key; exact in the dtype."""
    return 2.0**15 if dtype == torch.float16 else 2.0**40


def _width(problem: Problem, *, grad_lse: bool) -> int:
    """Head dim that carries everything the problem needs."""
    columns = int(problem.has_mask) + (_lse_columns(problem.dtype) if grad_lse else 0)
    return max(problem.shape.head_dim, problem.shape.value_dim) + columns


def _lse_columns(dtype: torch.dtype) -> int:
    """Columns that hold a float32 gradient of the lse: three numbers of 8 (or 11) bits reach 24 bits."""
    return 3 if dtype in (torch.bfloat16, torch.float16) else 1


def kernel_for(problem: Problem, *, grad_lse: bool = False) -> Kernel | str:
    """The vendor kernel for this problem, or why there is none."""
    return find_kernel(problem.device, problem.dtype, _width(problem, grad_lse=grad_lse))


def unsupported(problem: Problem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem (or its backward with a gradient of the lse), or None."""
    if problem.options.dropout_p:
        return "the vendor kernels draw dropout masks of their own, which no other backend can reproduce"
    least = 2.0**-20 if problem.dtype == torch.float16 else 2.0**-60
    if problem.has_mask and not least <= problem.options.scale <= 2.0**40:
        return f"a key_padding_mask goes in as a column of huge scores, out of range at scale={problem.options.scale}"
    kernel = kernel_for(problem, grad_lse=grad_lse)
    return kernel if isinstance(kernel, str) else None


def peak_bytes(problem: Problem, *, backward: bool = False) -> int:
    """Predicted bytes allocated beyond the inputs at the peak, the result included."""
    shape, size, acc = problem.shape, problem.dtype.itemsize, accumulator_dtype(problem.dtype).itemsize
    kernel = kernel_for(problem)
    assert isinstance(kernel, Kernel), kernel
    width = _round_up(kernel, _width(problem, grad_lse=False))
    rows, keys = shape.batch * shape.query_rows * shape.heads, shape.batch * shape.key_rows * shape.kv_heads
    copies = 0
    if problem.has_mask or width != shape.head_dim:
        copies += (rows + keys) * width * size
    if problem.has_mask or width != shape.value_dim:
        copies += keys * width * size
    apart = problem.device == "cpu" and any(call.dilation_rate > 1 for call in problem.plan.calls)
    parts = joined = keyed = 0  # most rows of a first result, of one that is joined, and most key rows
    for n, call in enumerate(problem.plan.calls):
        if n < problem.plan.covers_first == 1 and size == acc:
            continue  # its result is the accumulator
        for chunk in _chunks(call, _limit(problem), kernel.max_problems):
            parts = max(parts, chunk.rows)
            joined = max(joined, chunk.rows if n >= problem.plan.covers_first else 0)
            keyed = max(keyed, chunk.outer * chunk.inner * chunk.key_len)
    if not backward:
        own = rows * (width + 1) * acc + _cpu_tiles(problem, width)
        join = joined * (width * (size + (acc if size != acc else 0)) + 4 * acc) + apart * 2 * keyed * width * size
        cast = rows * shape.value_dim * size if size != acc or width != shape.value_dim else 0
        return copies + own + max(parts * (width * size + acc), join, cast)
    copies += 2 * rows * width * size if width != shape.value_dim else 0
    own = (rows + 2 * keys) * width * acc
    cast = (rows * shape.head_dim + keys * (shape.head_dim + shape.value_dim)) * size
    cast = cast if size != acc or width != shape.head_dim else 0
    # On the CPU the kernel copies strided out and grad_out, and `_close` copies query, key and value.
    inside = 3 * parts + 2 * keyed if problem.device == "cpu" else 0
    return copies + own + max((parts + 2 * keyed + inside) * width * size, cast)


def _cpu_tiles(problem: Problem, width: int) -> int:
    """Bytes of the tile that each thread of the CPU kernel works in (its sizes as of PyTorch 2.13)."""
    if problem.device != "cpu" or not problem.plan.calls:
        return 0
    longest = max(call.query_len for call in problem.plan.calls)
    rows = 256 if longest >= 768 else 64 if longest >= 192 else 32
    return torch.get_num_threads() * rows * (512 + 2 + width) * accumulator_dtype(problem.dtype).itemsize


def _chunks(call: Call, limit: int, most: int) -> Iterator[Call]:
    """Cut a call so that a partial result holds at most ``limit`` rows and no axis more than ``most`` problems."""
    inner = max(1, min(call.inner, most, limit // call.query_len))
    outer = max(1, min(call.outer, most, limit // (inner * call.query_len)))
    for i in range(0, call.outer, outer):
        for j in range(0, call.inner, inner):
            row = i * call.outer_row + j * call.inner_row
            yield replace(
                call,
                outer=min(outer, call.outer - i),
                inner=min(inner, call.inner - j),
                batch=call.batch + i * call.outer_batch,
                query_row=call.query_row + row,
                key_row=call.key_row + row,
                head=call.head + j * call.inner_head,
                kv_head=call.kv_head + j * call.inner_kv_head,
            )


def _limit(problem: Problem) -> int:
    """Rows a partial result may hold: a sixteenth of the output on the CPU, where smaller calls cost nothing."""
    rows = problem.shape.batch * problem.shape.query_rows * problem.shape.heads
    return max(_SMALLEST_CHUNK, rows // 16) if problem.device == "cpu" else rows


def _pad(tensor: Tensor, width: int) -> Tensor:
    """The tensor itself, or a copy with columns of zeros up to ``width``."""
    if tensor.shape[3] == width and tensor.stride(3) == 1:
        return tensor
    padded = tensor.new_zeros(*tensor.shape[:3], width)
    padded[..., : tensor.shape[3]] = tensor
    return padded


def _carry(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, mask: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value with the head dim of the kernel; a mask becomes a column of query and key."""
    if mask is None:
        return _pad(query, width), _pad(key, width), _pad(value, width)
    hidden = mask[:, :, None, None]
    key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)  # 0 * NaN would leak
    column, factor = max(problem.shape.head_dim, problem.shape.value_dim), _mask_factor(query.dtype)
    query, key = _pad(query, width), _pad(key, width)
    query[..., column] = factor
    key[..., column] = torch.where(mask, -factor, 0.0).to(key.dtype).unsqueeze(-1)
    return query, key, _pad(value, width)


def _carry_grad_lse(grad_out: Tensor, out: Tensor, grad_lse: Tensor) -> None:
    """Write the gradient of the lse into the last columns of padded copies of grad_out and out.

    delta = rowsum(dO * O) - dLSE, as columns that meet zeros everywhere else. A power of two keeps what float16
    cannot hold in range.
    """
    width = out.shape[3]
    first, largest = width - _lse_columns(out.dtype), torch.finfo(out.dtype).max / 4
    factor = (grad_lse.abs().amax() / largest).clamp(min=1).log2().ceil().exp2()
    grad_out[..., first:] = factor.to(out.dtype)
    rest = grad_lse / factor
    for column in range(first, width):
        out[..., column] = -rest
        rest = rest + out[..., column]


def _round_up(kernel: Kernel, width: int) -> int:
    return -(-width // kernel.dim_multiple) * kernel.dim_multiple


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H))."""
    kernel = kernel_for(problem)
    assert isinstance(kernel, Kernel), kernel
    width = _round_up(kernel, _width(problem, grad_lse=False))
    carried = _carry(query, key, value, problem, mask, width)
    out, lse = _run(kernel, *carried, problem, problem.plan, mask)
    return out[..., : value.shape[3]].to(query.dtype).contiguous(), lse


def _close(view: Tensor, call: Call) -> Tensor:
    """The view, or on the CPU a copy of rows that lie apart.

    There a kernel reads a key many times, and rows a power of two apart share few cache sets: the copy of a chunk
    costs less than the misses (the forward of a LongNet pattern took 1.2 times as long without).
    """
    return view.contiguous() if view.device.type == "cpu" and call.dilation_rate > 1 else view


def _no_keys(mask: Tensor, key: Tensor, call: Call) -> Tensor:
    """Which query rows of a call have every key masked: bool, (outer, inner, query rows or 1)."""
    hidden = key_view(mask.contiguous()[:, :, None, None].expand(*key.shape[:3], 1), call)[..., 0]
    if call.is_causal:
        return (~hidden).cumsum(-1, dtype=torch.int32) == 0
    return hidden.all(-1, keepdim=True)


def _run(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, problem: Problem, plan: Plan, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All calls of a plan, joined in the accumulators' dtype."""
    acc = accumulator_dtype(query.dtype)
    rows, limit = query.shape[:3], _limit(problem)
    out: Tensor | None = None
    lse = query.new_empty(rows, dtype=acc) if plan.covers_first else query.new_full(rows, -torch.inf, dtype=acc)
    if not plan.covers_first:
        out = query.new_zeros(query.shape, dtype=acc)
    for n, call in enumerate(plan.calls):
        fresh = n < plan.covers_first
        # The kernel's own output becomes the accumulator where it can: then the first branch costs no copy.
        adopt = fresh and plan.covers_first == 1 and query.dtype == acc and query.is_contiguous()
        for part in _chunks(call, call.rows if adopt else limit, kernel.max_problems):
            part_out, part_lse = kernel.forward(
                query_view(query, part),
                _close(key_view(key, part), part),
                _close(key_view(value, part), part),
                part.is_causal,
                problem.options.scale,
            )
            if mask is not None:
                part_lse = part_lse.masked_fill(_no_keys(mask, key, part), -torch.inf)
            if part.zero_keys:
                part_out = part_out.to(acc)
                add_zero_keys_(part_out, part_lse, part.zero_keys)
            if fresh and out is None:
                out = _adopted(part_out, query, acc)
                if out is not None:
                    query_view(lse.unsqueeze(-1), part)[..., 0].copy_(part_lse)
                    del part_out, part_lse
                    continue
                out = query.new_empty(query.shape, dtype=acc)
            assert out is not None
            out_view, lse_view = query_view(out, part), query_view(lse.unsqueeze(-1), part)[..., 0]
            if fresh:
                out_view.copy_(part_out)
                lse_view.copy_(part_lse)
            else:
                merge_(out_view, lse_view, part_out, part_lse)
            del part_out, part_lse  # before the next call allocates its own
    assert out is not None  # calls that cover every row made it
    return out, lse


def _adopted(result: Tensor, like: Tensor, acc: torch.dtype) -> Tensor | None:
    """A kernel's (outer, inner, rows, D) result as a whole (B, N, heads, D) accumulator, if it lies like one."""
    by_row = result.transpose(1, 2)
    whole = result.numel() == like.numel() and result.dtype == acc and by_row.is_contiguous()
    return by_row.view(like.shape) if whole else None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the final (out, lse); ``grad_lse`` is (B, Nq, H)."""
    kernel = kernel_for(problem, grad_lse=grad_lse is not None)
    assert isinstance(kernel, Kernel), kernel
    width = _round_up(kernel, _width(problem, grad_lse=grad_lse is not None))
    if not foldable(grad_out):
        grad_out = grad_out.contiguous()
    if mask is not None:  # a row without keys: exp(s - inf) is 0 where exp(s + inf) is not
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    query_, key_, value_ = _carry(query, key, value, problem, mask, width)
    grad_out_ = _pad(grad_out, width)
    if problem.options.mixing_grad == "exact":
        out_ = _pad(out, width)
        if grad_lse is not None:
            _carry_grad_lse(grad_out_, out_, grad_lse)
        parts = [(problem.plan, out_)]
    else:
        # Each branch is differentiated with its own output; the weights exp(branch lse - lse) are constants.
        parts = []
        for index in range(len(problem.pattern.branches)):
            alone = problem.branch(index).plan
            parts.append((alone, _run(kernel, query_, key_, value_, problem, alone, mask)[0].to(query.dtype)))
    sums: list[Tensor | None] = [None, None, None]
    shape = problem.shape
    same_rows = shape.heads == shape.kv_heads and shape.query_rows == shape.key_rows
    for index, (plan, out_) in enumerate(parts):
        covering = plan.covers_first if index == 0 else 0
        for n, whole in enumerate(plan.calls):
            fresh = n < covering
            adopt = fresh and same_rows and covering == 1 and query_.is_contiguous()
            for part in _chunks(whole, whole.rows if adopt else _limit(problem), kernel.max_problems):
                grads = kernel.backward(
                    query_view(grad_out_, part),
                    _close(query_view(query_, part), part),
                    _close(key_view(key_, part), part),
                    _close(key_view(value_, part), part),
                    query_view(out_, part),
                    query_view(lse.unsqueeze(-1), part)[..., 0],
                    part.is_causal,
                    problem.options.scale,
                )
                sums[0] = _add(sums[0], query_, grads[0], part, query_view, fresh)
                sums[1] = _add(sums[1], key_, grads[1], part, key_view, fresh and same_rows)
                sums[2] = _add(sums[2], value_, grads[2], part, key_view, fresh and same_rows)
                del grads  # before the next call allocates its own
    dims = ((sums[0], query), (sums[1], key), (sums[2], value))
    dq, dk, dv = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) if total is None
        else total[..., : t.shape[3]].to(t.dtype).contiguous()
        for total, t in dims
    )  # fmt: skip
    return dq, dk, dv


def _add(
    total: Tensor | None,
    like: Tensor,
    grad: Tensor,
    call: Call,
    view: Callable[[Tensor, Call], Tensor],
    fresh: bool,
) -> Tensor:
    """Add a call's gradient to ``total`` at the call's rows; ``fresh`` rows hold nothing yet."""
    acc = accumulator_dtype(like.dtype)
    if total is None:
        adopted = _adopted(grad, like, acc) if fresh else None
        if adopted is not None:
            return adopted
        total = (torch.empty_like if fresh else torch.zeros_like)(
            like, dtype=acc, memory_format=torch.contiguous_format
        )
    if view is key_view and call.inner > 1 and call.inner_kv_head == call.inner_row == 0:
        # Query heads that share these key rows: one view cannot be written through twice.
        grad, call = grad.sum(1, keepdim=True, dtype=acc), replace(call, inner=1)
    place = view(total, call)
    if fresh:
        place.copy_(grad)
    else:
        place.add_(grad)
    return total
