"""The operators that PyTorch sees: schemas, fakes, autograd. What runs is chosen inside, by `dispatch`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..merge import accumulator_dtype
from ..patterns import DilatedPattern
from ..types import Document, HeadOffsets, MixingGrad, Options, Padding, Shape
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
    tensors = (query, key, value)
    where = (query.dtype, device or str(query.device), key_padding_mask is not None, all(map(foldable, tensors)))
    options = (is_causal, scale, dropout_p, padding, mixing_grad)
    suffix_mask = key_padding_mask if padding == "zeros" else None
    pattern = (tuple(segment_lengths), tuple(dilation_rates), head_offsets)
    if cu_seqlens is None and key_starts is None and suffix_mask is None:  # sizes say it all
        return _problem_of_sizes(query.shape, key.shape, value.shape[3], key_start, pattern, options, where)
    shape = _shape(query.shape, key.shape, value.shape[3])
    documents = read_documents(
        shape, key_start=key_start, key_starts=key_starts, cu_seqlens=cu_seqlens, suffix_mask=suffix_mask
    )
    return _problem(pattern, shape, _options(query.shape[3], *options), documents, where)


def _shape(query: torch.Size, key: torch.Size, value_dim: int) -> Shape:
    return Shape(query[0], query[1], key[1], query[2], key[2], query[3], value_dim)


def _options(
    head_dim: int, is_causal: bool, scale: float | None, dropout_p: float, padding: str, mixing_grad: str
) -> Options:
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    return Options(is_causal, scale, dropout_p, cast(Padding, padding), cast(MixingGrad, mixing_grad))


@lru_cache(maxsize=256)
def _problem_of_sizes(
    query: torch.Size, key: torch.Size, value_dim: int, key_start: int, pattern: Any, options: Any, where: Any
) -> Problem:
    shape = _shape(query, key, value_dim)
    documents = read_documents(shape, key_start=key_start, key_starts=None, cu_seqlens=None, suffix_mask=None)
    return _problem(pattern, shape, _options(query[3], *options), documents, where)


@lru_cache(maxsize=256)
def _problem(
    pattern: tuple[tuple[int, ...], tuple[int, ...], HeadOffsets],
    shape: Shape,
    options: Options,
    documents: tuple[Document, ...],
    where: tuple[torch.dtype, str, bool, bool],
) -> Problem:
    """One Problem for equal calls, so that what it works out (plan, pattern) is worked out once."""
    return Problem(DilatedPattern(*pattern), shape, options, documents, *where)


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
    saved = ctx.saved_tensors  # once: under checkpointing every access recomputes
    if grad_out is None:
        grad_out = torch.zeros_like(saved[3])
    through = torch.is_grad_enabled() or _observed(grad_out, *saved[:3], grad_lse)
    arguments = grad_out, grad_lse, *saved, *ctx.rest
    found = seen(attention_backward, _TransformedBackward, arguments) if through else _backward(*arguments)
    return *found, *empty


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


def transformed(
    operator: Callable[..., Any],
    differentiate: Callable[..., Any],
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
) -> type[torch.autograd.Function]:
    """An operator as `torch.func.grad` and its kin take it; PyTorch gives an operator another form of function."""
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *inputs: operator(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(differentiate),
    }
    return type("Transformed", (torch.autograd.Function,), members)


def seen(operator: Callable[..., Any], transformed: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> Any:
    """``operator(*arguments)`` where somebody has to see it, `torch.func.grad` perhaps."""
    if not torch.compiler.is_compiling():
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() == torch._C._functorch.TransformType.Grad:
            return transformed.apply(*arguments)
    return operator(*arguments)


attention_forward = _register("forward", _forward, _fake_forward)
attention_backward = _register("backward", _backward, _fake_backward)
torch.library.register_autograd("dilated_attention_pytorch::backward", _refuse)
torch.library.register_autograd("dilated_attention_pytorch::forward", _differentiate, setup_context=_setup_context)
_Transformed = transformed(attention_forward, _differentiate, _setup_context)
_TransformedBackward = transformed(attention_backward, _refuse)


class _Attention(torch.autograd.Function):
    """The differentiable operator, past PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad_out, grad_lse)


def _observed(*given: Tensor | None) -> bool:
    """Whether somebody has to see an operator: a compiler or tracer, a mode, a transform, a subclass, a profiler."""
    tensors = [tensor for tensor in given if tensor is not None]
    return (
        torch.compiler.is_compiling()
        or any(type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter for tensor in tensors)
        # Gradients in a batch (is_grads_batched=True) come from a transform without an interpreter.
        or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
        or tensors[0].is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def call_straight(
    operator: Callable[..., Any], function: type[torch.autograd.Function], transformed: type[torch.autograd.Function],
    forward: Callable[..., Any], arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``operator(*arguments)``, query, key and value first, without the dispatcher where nobody has to see it.

    On the way through the dispatcher every argument is boxed and unboxed several times, which is more work for the
    host than the launch of a kernel. ``function`` is the operator as an autograd function, ``transformed`` the same
    for `torch.func`, ``forward`` what it runs.

    Raises:
        RuntimeError: forward-mode differentiation, for which the operators would give a derivative of zero.
    """
    tensors = arguments[:3]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "attention has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); "
            "use torch.autograd.grad"
        )
    if _observed(*tensors):
        return cast(tuple[Tensor, Tensor], seen(operator, transformed, arguments))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return cast(tuple[Tensor, Tensor], function.apply(*arguments))
    return cast(tuple[Tensor, Tensor], forward(*arguments))


def attention(
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
    """`attention_forward`, by `call_straight`."""
    arguments = (
        query, key, value, key_padding_mask, cu_seqlens, key_starts, seed, segment_lengths, dilation_rates, key_start,
        is_causal, scale, dropout_p, head_offsets, padding, mixing_grad, backend,
    )  # fmt: skip
    return call_straight(attention_forward, _Attention, _Transformed, _forward, arguments)
