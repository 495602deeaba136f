"""Projections of normalised rows, that keep their input alone for the backward pass.

PyTorch keeps the result of every norm and of GELU, under autocast in float32 and again in half precision: for a slide
of 45,680 tiles some GiB a layer. Here the input is kept, and what is pointwise is computed again in the backward pass,
as in selective recomputation (arXiv 2205.05198, section 5); on CUDA by one kernel, in float32 within.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import has_triton

_WIDEST = 16384
"""A row is held by one program of the kernel."""


def _on_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= _WIDEST and has_triton()


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, dtype: torch.dtype) -> Tensor:
    if _on_kernel(x):
        from ..kernels.norm import norm_forward

        return norm_forward(x, weight, bias, eps, gelu=gelu, dtype=dtype)
    inner = torch.promote_types(x.dtype, weight.dtype)
    values = F.gelu(x) if gelu else x
    return F.layer_norm(values.to(inner), x.shape[-1:], weight.to(inner), bias.to(inner), eps).to(dtype)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, and the forward pass again in the dtype of ``grad``."""
    if _on_kernel(x):
        from ..kernels.norm import norm_backward

        return norm_backward(grad, x, weight, bias, eps, gelu=gelu)
    inner, shape = torch.promote_types(x.dtype, weight.dtype), list(x.shape[-1:])
    values = (F.gelu(x) if gelu else x).to(inner)
    out, mean, inverse = torch.native_layer_norm(values, shape, weight.to(inner), bias.to(inner), eps)
    grad_values, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(inner), values, shape, mean, inverse, weight.to(inner), bias.to(inner), [True, True, True]
    )
    if gelu:
        grad_values = torch.ops.aten.gelu_backward(grad_values.to(x.dtype), x)
    return grad_values.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), out.to(grad.dtype)


class _NormLinear(torch.autograd.Function):
    """Linears of norm(x) or of norm(gelu(x)): ``linears`` is weight, bias, weight, bias, ..."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool, dtype: torch.dtype, *linears: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, bias, *linears)
        ctx.eps, ctx.gelu, ctx.dtype = eps, gelu, dtype
        with torch.autocast(x.device.type, enabled=False):
            normalised = _forward(x, weight, bias, eps, gelu, dtype)
            cast = [tensor.to(dtype) for tensor in linears]
            return tuple(F.linear(normalised, w, b) for w, b in zip(cast[::2], cast[1::2], strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *linears = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a backward pass that can itself be differentiated
            values = (F.gelu(x) if ctx.gelu else x).to(weight.dtype)
            normalised = F.layer_norm(values, x.shape[-1:], weight, bias, ctx.eps).to(ctx.dtype)
            cast = [tensor.to(ctx.dtype) for tensor in linears]
            outs = [F.linear(normalised, w, b) for w, b in zip(cast[::2], cast[1::2], strict=True)]
            leaves = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
            leaves += [t for t, needed in zip(linears, ctx.needs_input_grad[6:], strict=True) if needed]
            found = iter(torch.autograd.grad(outs, leaves, grads, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        with torch.autocast(x.device.type, enabled=False):
            flows = [grad.to(ctx.dtype) for grad in grads]
            total = flows[0] @ linears[0].to(ctx.dtype)
            for flow, matrix in zip(flows[1:], linears[2::2], strict=True):
                total += flow @ matrix.to(ctx.dtype)
            grad_x, grad_weight, grad_bias, normalised = _backward(total, x, weight, bias, ctx.eps, ctx.gelu)
            rows = normalised.flatten(0, -2)
            of_linears: list[Tensor | None] = []
            for flow, matrix in zip(flows, linears[::2], strict=True):
                flat = flow.flatten(0, -2)
                of_linears += [(flat.T @ rows).to(matrix.dtype), flat.sum(0).to(matrix.dtype)]
        return (grad_x, grad_weight, grad_bias, None, None, None, *of_linears)


def norm_linear(x: Tensor, norm: nn.Module, linears: Sequence[nn.Linear], *, gelu: bool = False) -> tuple[Tensor, ...]:
    """``[linear(norm(x)) for linear in linears]``, or of ``norm(gelu(x))``, with only x kept for the backward pass.

    Under autocast the norm's result is rounded once, to autocast's dtype, as it is otherwise on entering a linear; the
    GELU within is not rounded at all on CUDA. Modules that were replaced or carry hooks (adapters, quantisation) are
    called as they are, and so is everything on a CPU, and under torch.compile, which fuses by itself.

    Args:
        x: ``(..., width)``.
        norm: a LayerNorm over the width, with weight and bias.
        linears: one or more, all with biases.

    >>> norm, linear = nn.LayerNorm(8), nn.Linear(8, 4)
    >>> x = torch.randn(2, 5, 8)
    >>> torch.allclose(norm_linear(x, norm, [linear], gelu=True)[0], linear(norm(F.gelu(x))), atol=1e-6)
    True
    """
    if torch.compiler.is_compiling() or not _recomputes(x) or not _plain(norm, linears):
        normalised = norm(F.gelu(x) if gelu else x)
        return tuple(linear(normalised) for linear in linears)
    assert isinstance(norm, nn.LayerNorm)
    kind = x.device.type
    dtype = linears[0].weight.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, gelu, dtype, *tensors)


def _recomputes(x: Tensor) -> bool:
    """On a CPU memory is not what is scarce: there computing GELU again made a training step 16 % longer."""
    return x.is_cuda


def _plain(norm: nn.Module, linears: Sequence[nn.Linear]) -> bool:
    """Whether these are PyTorch's own modules with weight and bias, and nobody listens to their calls."""
    modules = [norm, *linears]
    return (
        type(norm) is nn.LayerNorm
        and norm.elementwise_affine
        and all(type(linear) is nn.Linear for linear in linears)
        and all(type(p) is nn.Parameter for m in modules for p in (m.weight, m.bias))
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)
    )
