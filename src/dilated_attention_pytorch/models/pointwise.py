"""Projections of normalised rows, that keep their input alone for the backward pass.

PyTorch keeps the result of every norm and of GELU, under autocast in float32 and again in half precision: for a slide
of 45,680 tiles some GiB a layer. Here the input is kept, and what is pointwise is computed again in the backward pass,
as in selective recomputation (arXiv 2205.05198, section 5); on CUDA by one kernel, in float32 within.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import has_triton

_WIDEST = 16384
"""A row is held by one program of the kernel."""


def _on_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= _WIDEST and has_triton()


class Stream(NamedTuple):
    """A residual stream and what is still to be added to it: whoever normalises it adds in the same pass.

    ``x`` and ``update`` are ``(..., width)``. ``factor``, where there is one, multiplies the update: one float32
    (float64 for float64) for each of equally many consecutive rows.
    """

    x: Tensor
    update: Tensor | None = None
    factor: Tensor | None = None

    def total(self) -> Tensor:
        """``x + factor * update`` in the dtype of x."""
        if self.update is None:
            return self.x
        return (self.x + _scaled(self.update, self.factor)).to(self.x.dtype)


def _scaled(update: Tensor, factor: Tensor | None) -> Tensor:
    if factor is None:
        return update
    return (update.reshape(len(factor), -1, update.shape[-1]) * factor[:, None, None]).view_as(update)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """All of them in ``dtype``, by one launch: one each is more work for the host than a projection."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast


def _forward(
    stream: Stream, weight: Tensor, bias: Tensor, eps: float, gelu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The stream's sum, and its norm in ``dtype``."""
    x = stream.x
    if _on_kernel(x):
        from ..kernels.norm import norm_forward

        return norm_forward(x, weight, bias, eps, gelu=gelu, dtype=dtype, update=stream.update, factor=stream.factor)
    total = stream.total()
    inner = torch.promote_types(x.dtype, weight.dtype)
    values = F.gelu(total) if gelu else total
    return total, F.layer_norm(values.to(inner), x.shape[-1:], weight.to(inner), bias.to(inner), eps).to(dtype)


class _Gradients(NamedTuple):
    """Gradients, and the norm again in the dtype of what flows to it."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    normalised: Tensor
    update: Tensor | None


def _backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, factor: Tensor | None, update_dtype: torch.dtype | None,
    weight: Tensor, bias: Tensor, eps: float, gelu: bool,
) -> _Gradients:  # fmt: skip
    if _on_kernel(total):
        from ..kernels.norm import norm_backward

        found = norm_backward(
            grad, total, weight, bias, eps, gelu=gelu, grad_total=grad_total, factor=factor, update_dtype=update_dtype
        )
        return _Gradients(*found)
    inner, shape = torch.promote_types(total.dtype, weight.dtype), list(total.shape[-1:])
    values = (F.gelu(total) if gelu else total).to(inner)
    out, mean, inverse = torch.native_layer_norm(values, shape, weight.to(inner), bias.to(inner), eps)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad.to(inner), values, shape, mean, inverse, weight.to(inner), bias.to(inner), [True, True, True]
    )
    if gelu:
        grad_x = torch.ops.aten.gelu_backward(grad_x.to(total.dtype), total)
    if grad_total is not None:
        grad_x = grad_x + grad_total
    grad_update = None if update_dtype is None else _scaled(grad_x, factor).to(update_dtype)
    return _Gradients(
        grad_x.to(total.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), out.to(grad.dtype), grad_update
    )


class _NormLinear(torch.autograd.Function):
    """(sum of the stream, linears of its norm or of norm(gelu(x))): ``linears`` is weight, bias, weight, bias, ...

    Without an update the sum is left out: it is the input.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
        gelu: bool, dtype: torch.dtype, *linears: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.eps, ctx.gelu, ctx.dtype, ctx.update_dtype = eps, gelu, dtype, None if update is None else update.dtype
        with torch.autocast(x.device.type, enabled=False):
            total, normalised = _forward(Stream(x, update, factor), weight, bias, eps, gelu, dtype)
            ctx.save_for_backward(total, factor, weight, bias, *linears)
            cast = _cast(linears, dtype)
            outs = tuple(F.linear(normalised, w, b) for w, b in zip(cast[::2], cast[1::2], strict=True))
        return outs if update is None else (total, *outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, factor, weight, bias, *linears = ctx.saved_tensors
        grad_total = None
        if ctx.update_dtype is not None:
            grad_total, *grads = grads  # type: ignore[assignment]  # the rest as a list
        if torch.is_grad_enabled():  # create_graph=True: a backward pass that can itself be differentiated
            return _differentiable_backward(ctx, grad_total, grads, total, factor, weight, bias, linears)
        with torch.autocast(total.device.type, enabled=False):
            flows = [grad.to(ctx.dtype) for grad in grads]
            matrices = _cast(linears[::2], ctx.dtype)
            flow_in = flows[0] @ matrices[0]
            for flow, matrix in zip(flows[1:], matrices[1:], strict=True):
                flow_in += flow @ matrix
            found = _backward(
                flow_in, grad_total, total, factor, ctx.update_dtype, weight, bias, ctx.eps, ctx.gelu
            )  # fmt: skip
            rows = found.normalised.flatten(0, -2)
            flat = [flow.flatten(0, -2) for flow in flows]
            of_matrices = _cast([flow.T @ rows for flow in flat], linears[0].dtype)
            of_biases = [flow.sum(0, dtype=linears[1].dtype) for flow in flat]
            of_linears = [grad for pair in zip(of_matrices, of_biases, strict=True) for grad in pair]
        return (found.x, found.update, None, found.weight, found.bias, None, None, None, *of_linears)


def _differentiable_backward(
    ctx: Any, grad_total: Tensor | None, grads: Sequence[Tensor], total: Tensor, factor: Tensor | None, weight: Tensor,
    bias: Tensor, linears: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    # Views of their own, so that only what is computed here is differentiated: the sum may itself depend on a weight.
    total, weight, bias, *linears = (tensor.view_as(tensor) for tensor in (total, weight, bias, *linears))
    values = (F.gelu(total) if ctx.gelu else total).to(weight.dtype)
    normalised = F.layer_norm(values, total.shape[-1:], weight, bias, ctx.eps).to(ctx.dtype)
    cast = [tensor.to(ctx.dtype) for tensor in linears]
    outs = [F.linear(normalised, w, b) for w, b in zip(cast[::2], cast[1::2], strict=True)]
    needed = [total.requires_grad, *ctx.needs_input_grad[3:5], *ctx.needs_input_grad[8:]]
    candidates = (total, weight, bias, *linears)
    leaves = [tensor for tensor, wanted in zip(candidates, needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(outs, leaves, grads, create_graph=True))
    of_total, *others = (next(found) if wanted else None for wanted in needed)
    if of_total is not None and grad_total is not None:
        of_total = of_total + grad_total
    of_update = None
    if of_total is not None and ctx.needs_input_grad[1]:
        of_update = _scaled(of_total, factor).to(ctx.update_dtype)
    of_x = of_total if ctx.needs_input_grad[0] else None
    return (of_x, of_update, None, *others[:2], None, None, None, *others[2:])


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
    return _NormLinear.apply(x, None, None, *_parameters(x, norm, linears, gelu))


def add_norm_linear(stream: Stream, norm: nn.Module, linears: Sequence[nn.Linear]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of a residual stream, and `norm_linear` of it; the sum is kept for the backward pass, the update not.

    >>> norm, linear = nn.LayerNorm(8), nn.Linear(8, 4)
    >>> x, update = torch.randn(2, 2, 5, 8)
    >>> total, (out,) = add_norm_linear(Stream(x, update), norm, [linear])
    >>> torch.equal(total, x + update), torch.allclose(out, linear(norm(x + update)), atol=1e-6)
    (True, True)
    """
    x = stream.x
    plain = not torch.compiler.is_compiling() and _recomputes(x) and _plain(norm, linears)
    if stream.update is None or not plain:
        total = stream.total()
        return total, norm_linear(total, norm, linears)
    total, *outs = _NormLinear.apply(*stream, *_parameters(x, norm, linears, False))
    return total, tuple(outs)


def _parameters(x: Tensor, norm: nn.Module, linears: Sequence[nn.Linear], gelu: bool) -> tuple[Any, ...]:
    """What `_NormLinear` takes behind the stream."""
    assert isinstance(norm, nn.LayerNorm)
    kind = x.device.type
    dtype = linears[0].weight.dtype
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    return norm.weight, norm.bias, norm.eps, gelu, dtype, *tensors


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
