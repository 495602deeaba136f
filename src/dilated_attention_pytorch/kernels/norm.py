"""LayerNorm, behind a residual sum or behind GELU, in one pass over the rows: nothing in between is ever in memory.

The plain twin is `torch.nn.functional.layer_norm` of ``x + factor * update`` or of `torch.nn.functional.gelu`, in
float32. The sum is rounded to the dtype of x before it is normalised, as where it is written and read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 2048
"""Of the backward pass at most, each with sums of its own for the gradients of weight and bias."""


@triton.jit
def _normal(x):
    """The normal distribution up to x, and its density times sqrt(2 pi).

    erf by Abramowitz and Stegun's formula 7.1.26, within 1.5e-7: half an ulp of the largest value, and it shares its
    exponential with the density, which GELU's slope needs.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.5 * bell * t * (0.254829592 + t * (-0.284496736 + t * series))
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
def _normalised(x, inside, eps, WIDTH: tl.constexpr):
    """(x - mean) / deviation of a row, 0 outside, and 1 / deviation."""
    centred = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    return centred * scale, scale


@triton.jit(do_not_specialize=["rows_per_factor"])
def _forward_kernel(
    x, update, factor, weight, bias, total, out, rows_per_factor, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """out = norm(total), total = x + factor * update; without ``update`` norm(x), or norm(gelu(x))."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    inside = columns < WIDTH
    place = row * WIDTH + columns
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if update is not None:
        added = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        if factor is not None:
            added *= tl.load(factor + row // rows_per_factor)
        rounded = (values + added).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if GELU:
        values *= _normal(values)[0]
    normalised, _ = _normalised(values, inside, eps, WIDTH)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (normalised * scale + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_factor"])
def _backward_kernel(
    grad, grad_total, x, factor, weight, bias, grad_x, grad_update, out, grad_weight, grad_bias, rows, rows_per_factor,
    eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """``x`` is what was normalised, before GELU; ``grad_total`` is added to its gradient."""
    first, programs, columns = tl.program_id(0), tl.num_programs(0), tl.arange(0, PADDED)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    sum_weight, sum_bias = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    place = first.to(tl.int64) * WIDTH + columns
    for row in range(first, rows, programs):
        given = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        flow = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        values = given
        below, bell = _normal(given)  # which the compiler leaves out without GELU
        if GELU:
            values = given * below
        normalised, inverse = _normalised(values, inside, eps, WIDTH)
        tl.store(out + place, (normalised * scale + shift).to(out.dtype.element_ty), mask=inside)
        sum_weight += flow * normalised
        sum_bias += flow
        flow *= scale
        along, mean = tl.sum(flow * normalised, 0) / WIDTH, tl.sum(flow, 0) / WIDTH
        result = (flow - normalised * along - mean) * inverse
        if GELU:
            result *= below + given * bell * 0.3989422804014327
        if grad_total is not None:
            result += tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=inside)
        if grad_update is not None:
            if factor is not None:
                result *= tl.load(factor + row // rows_per_factor)
            tl.store(grad_update + place, result.to(grad_update.dtype.element_ty), mask=inside)
        place += programs * WIDTH
    tl.store(grad_weight + first * WIDTH + columns, sum_weight, mask=inside)
    tl.store(grad_bias + first * WIDTH + columns, sum_bias, mask=inside)


def _sizes(width: int) -> tuple[int, int]:
    """Columns of a tile, and warps for one row in the forward pass."""
    padded = triton.next_power_of_2(width)
    return padded, min(max(padded // 1024, 1), 16)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, gelu: bool, dtype: torch.dtype,
    update: Tensor | None = None, factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x + factor * update`` (or x, without ``update``), and LayerNorm of it, or of its GELU, in ``dtype``.

    ``factor`` is float32: one for each of equally many consecutive rows.
    """
    x = x.contiguous()
    out, total = torch.empty_like(x, dtype=dtype), x
    if update is not None:
        update, total = update.contiguous(), torch.empty_like(x)
    width = x.shape[-1]
    rows, (padded, warps) = x.numel() // width, _sizes(width)
    if rows:
        with torch.cuda.device_of(x):
            _forward_kernel[(rows,)](
                x, update, factor, weight, bias, total, out, 1 if factor is None else rows // factor.numel(), eps,
                width, padded, gelu, num_warps=warps,
            )  # fmt: skip
    return total, out


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, gelu: bool, grad_total: Tensor | None = None,
    factor: Tensor | None = None, update_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias, the normalised rows again in the dtype of ``grad``, and the update's gradient.

    ``x`` is the sum that `norm_forward` returns, ``grad_total`` what flows to it besides, ``update_dtype`` the dtype of
    the update, None without one.
    """
    x, grad = x.contiguous(), grad.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x, out = torch.empty_like(x), torch.empty_like(grad)
    same = factor is None and update_dtype == x.dtype
    grad_update = None if update_dtype is None or same else torch.empty_like(x, dtype=update_dtype)
    width = x.shape[-1]
    rows, (padded, warps) = x.numel() // width, _sizes(width)
    programs = min(rows, _PROGRAMS if padded <= 1024 else _PROGRAMS // 2)
    sums = torch.empty(2, programs, width, device=x.device, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                grad, grad_total, x, factor, weight, bias, grad_x, grad_update, out, sums[0], sums[1], rows,
                1 if factor is None else rows // factor.numel(), eps, width, padded, gelu, num_warps=min(4 * warps, 16),
            )  # fmt: skip
    grad_weight, grad_bias = sums.sum(1)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), out, grad_x if same else grad_update
