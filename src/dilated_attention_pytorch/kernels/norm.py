"""LayerNorm, with GELU before it or not, in one pass over the rows: nothing in between is ever in memory.

The plain twin is `torch.nn.functional.layer_norm` of `torch.nn.functional.gelu`, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024
"""Of the backward pass, each with sums of its own for the gradients of weight and bias."""


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _normalised(x, inside, eps, WIDTH: tl.constexpr):
    """(x - mean) / deviation of a row, 0 outside, and 1 / deviation."""
    centred = tl.where(inside, x - tl.sum(x, 0) / WIDTH, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    return centred * scale, scale


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, weight, bias, out, rows, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    inside = columns < WIDTH
    values = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        values = _gelu(values)
    normalised, _ = _normalised(values, inside, eps, WIDTH)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (normalised * scale + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad, x, weight, bias, grad_x, out, grad_weight, grad_bias, rows, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    first, programs, columns = tl.program_id(0), tl.num_programs(0), tl.arange(0, PADDED)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    sum_weight, sum_bias = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
    place = first.to(tl.int64) * WIDTH + columns
    for _ in range(first, rows, programs):
        given = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        values = given
        if GELU:
            values = _gelu(given)
        normalised, inverse = _normalised(values, inside, eps, WIDTH)
        tl.store(out + place, (normalised * scale + shift).to(out.dtype.element_ty), mask=inside)
        flow = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        sum_weight += flow * normalised
        sum_bias += flow
        flow *= scale
        along, mean = tl.sum(flow * normalised, 0) / WIDTH, tl.sum(flow, 0) / WIDTH
        result = (flow - normalised * along - mean) * inverse
        if GELU:
            result *= _gelu_slope(given)
        tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=inside)
        place += programs * WIDTH
    tl.store(grad_weight + first * WIDTH + columns, sum_weight, mask=inside)
    tl.store(grad_bias + first * WIDTH + columns, sum_bias, mask=inside)


def _warps(padded: int) -> int:
    return min(max(padded // 512, 1), 16)


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, gelu: bool, dtype: torch.dtype) -> Tensor:
    """LayerNorm of x, or of GELU of x, over the last dimension, in ``dtype``; computed in float32."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    rows, padded = x.numel() // width, triton.next_power_of_2(width)
    if rows:
        with torch.cuda.device_of(x):
            _forward_kernel[(rows,)](x, weight, bias, out, rows, eps, width, padded, gelu, num_warps=_warps(padded))
    return out


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, gelu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gradients of x, weight and bias, and the result of the forward pass again, in the dtype of ``grad``)."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x, out = torch.empty_like(x), torch.empty_like(grad)
    width = x.shape[-1]
    rows, padded = x.numel() // width, triton.next_power_of_2(width)
    programs = max(min(rows, _PROGRAMS), 1)
    sums = torch.zeros(2, programs, width, device=x.device, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                grad, x, weight, bias, grad_x, out, sums[0], sums[1], rows, eps, width, padded, gelu,
                num_warps=_warps(padded),
            )  # fmt: skip
    grad_weight, grad_bias = sums.sum(1)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), out
