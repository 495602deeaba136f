"""The public functions: check what was given, say what is wrong with it, hand the rest to the operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import Tensor

from .backends.arguments import checked_tensors
from .backends.dispatch import check_backend
from .backends.ops import attention
from .merge import accumulator_dtype
from .parallel import ContextParallel, Streaming, check_parallel
from .patterns import DilatedPattern
from .types import AttentionOutput, HeadOffsets, MixingGrad, Padding


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
    head_offsets: HeadOffsets = "contiguous",
    padding: Padding = "mask",
    mixing_grad: MixingGrad = "exact",
    backend: str = "auto",
    parallel: ContextParallel | Streaming | None = None,
) -> Tensor:
    """LongNet's dilated attention (arXiv 2307.02486, sections 3.1 to 3.3), as one softmax over all branches.

    Branch i cuts a document into segments of ``segment_lengths[i]`` rows; in each, head h keeps the rows at offset
    o(h) modulo ``dilation_rates[i]`` and attends among them. Branches are mixed by their softmax denominators
    (equation 10), which is one softmax over the multiset of all keys that the branches show a row.

    Args:
        query: (B, N_q, H, D), float64, float32, bfloat16 or float16. With N_q < N the rows are the last N_q rows.
        key: (B, N, H_kv, D); H must be a multiple of H_kv (grouped-query attention).
        value: (B, N, H_kv, D_v).
        segment_lengths: rows per segment of every branch; may exceed N and need not divide it.
        dilation_rates: one rate per branch, 1 to the segment length.
        is_causal: a row attends to rows at or before its own (aligned at the last row, unlike SDPA, where N_q < N).
        scale: factor of the scores, 1 / sqrt(D) by default.
        dropout_p: probability with which each attended pair of each branch is dropped; drawn from the default
            generator of the device. The log-sum-exp is that without dropout.
        key_padding_mask: (B, N) bool, True = ignore this key, as in nn.MultiheadAttention.
        cu_seqlens: (documents + 1,) int32 or int64, for B = 1: rows cu_seqlens[i] to cu_seqlens[i + 1] are document i;
            positions and segments start anew in each.
        key_start: position of key row 0 in its document, an int or (B,) int64: negative under left padding (rows
            before position 0 take no part and get out 0), positive after older keys were dropped from a cache.
        head_offsets: "contiguous", o(h) = h // ceil(H / r), as torchscale; or "interleaved", h % r, the paper's.
        padding: "mask", or "zeros": short segments are filled with keys of zeros that count, as torchscale does and
            pretrained GigaPath and LongViT weights expect. Nothing when causal.
        mixing_grad: "exact", or "detached": the mixing weights are constants for the gradient, as torchscale does.
        backend: "auto", or the name of one (see `available_backends`); `explain` shows what "auto" picks.
        parallel: a `ContextParallel` of which every rank gives its rows (`ContextParallel.shard`) and gets the result
            for them; N, cu_seqlens and key_start are those of the whole sequence. Or a `Streaming`, which takes and
            gives tensors in host memory and computes chunk by chunk on its device.

    Returns:
        (B, N_q, H, D_v) in the dtype of the query; 0 for a row without any key.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or a backend that cannot compute them.

    Under torch.autocast the inputs are cast to its dtype. Differentiable once. Deterministic on the CPU.

    >>> import torch
    >>> query = key = value = torch.randn(1, 100, 4, 16)
    >>> dilated_attention(query, key, value, [32, 128], [1, 4], is_causal=True).shape
    torch.Size([1, 100, 4, 16])
    """
    return dilated_attention_with_lse(
        query,
        key,
        value,
        segment_lengths,
        dilation_rates,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        key_start=key_start,
        head_offsets=head_offsets,
        padding=padding,
        mixing_grad=mixing_grad,
        backend=backend,
        parallel=parallel,
    ).out


def dilated_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
    head_offsets: HeadOffsets = "contiguous",
    padding: Padding = "mask",
    mixing_grad: MixingGrad = "exact",
    backend: str = "auto",
    parallel: ContextParallel | Streaming | None = None,
) -> AttentionOutput:
    """`dilated_attention` together with the log-sum-exp that joins it with other partial results.

    Arguments and errors as for `dilated_attention`.

    Returns:
        AttentionOutput(out (B, N_q, H, D_v), lse (B, H, N_q)): lse is the natural logarithm of the softmax
        denominator, float32 (float64 for float64 inputs), -inf for a row without any key. Both are differentiable
        (with ``mixing_grad="detached"`` the lse is not).

    >>> import torch
    >>> x = torch.zeros(1, 8, 1, 16)
    >>> dilated_attention_with_lse(x, x, x, [4], [1]).lse.exp().round()  # every row sees the 4 keys of its segment
    tensor([[[4., 4., 4., 4., 4., 4., 4., 4.]]])
    """
    arguments = checked_arguments(
        query,
        key,
        value,
        segment_lengths,
        dilation_rates,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        key_start=key_start,
        head_offsets=head_offsets,
        padding=padding,
        mixing_grad=mixing_grad,
    )
    check_backend(backend)
    check_parallel(parallel)
    if isinstance(parallel, Streaming):
        streamed, streamed_lse = parallel.attend(arguments, backend)
        return AttentionOutput(streamed, streamed_lse.transpose(1, 2))
    if parallel is not None:
        sharded, lse = parallel.attend(arguments, backend)
        return AttentionOutput(sharded, (lse if mixing_grad == "exact" else lse.detach()).transpose(1, 2))
    seed = torch.randint(2**62, (1,), device=query.device) if dropout_p else None
    out, lse = attention(**arguments, seed=seed, backend=backend)
    return AttentionOutput(out, (lse if mixing_grad == "exact" else lse.detach()).transpose(1, 2))


def received_attention(
    query: Tensor, key: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int], **options: Any
) -> Tensor:
    """How much attention each key receives: the weights that all query rows give it, summed.

    A key's weights are what the gradient of its value is made of, so this is the gradient of the sum of an output of
    one column, computed like any gradient: no weight matrix exists, and memory grows with N.

    Args:
        query, key, segment_lengths, dilation_rates: as for `dilated_attention`.
        **options: its other options; with ``dropout_p`` the weights that survive, with zero keys
            (``padding="zeros"``) those that real keys receive.

    Returns:
        (B, H_kv, N) float32 (float64 for float64 inputs); query heads that share a key head add. Each row of a head
        with a key gives 1 in all, unless dropout or zero keys take some.

    >>> import torch
    >>> x = torch.zeros(1, 8, 1, 16)
    >>> received_attention(x, x, [4], [1])
    tensor([[[1., 1., 1., 1., 1., 1., 1., 1.]]])
    """
    if not isinstance(key, Tensor) or key.dim() != 4:
        raise ValueError(f"key is {getattr(key, 'shape', type(key).__name__)}; give a tensor (B, N, H_kv, D)")
    acc = accumulator_dtype(key.dtype)
    # Sums over many rows need the accumulators' dtype, which the value gives its gradient.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(key.device.type, enabled=False):
        query, key = _for_autograd(query), _for_autograd(key)
        options = {name: _for_autograd(option) for name, option in options.items()}
        value = key.new_zeros(*key.shape[:3], 1, dtype=acc).requires_grad_()
        q, k = query.detach().to(acc), key.detach().to(acc)
        out = dilated_attention(q, k, value, segment_lengths, dilation_rates, **options)
        (received,) = torch.autograd.grad(out, value, torch.ones_like(out))
    return received[..., 0].transpose(1, 2)


def _for_autograd(given: Any) -> Any:
    """A copy of a tensor of inference mode, which autograd refuses; all else as it is."""
    return given.clone() if isinstance(given, Tensor) and given.is_inference() else given


def checked_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
    head_offsets: HeadOffsets = "contiguous",
    padding: Padding = "mask",
    mixing_grad: MixingGrad = "exact",
) -> dict[str, Any]:
    """Arguments of the operator from those of the public functions, or the ValueError that says what is wrong."""
    pattern = _pattern(segment_lengths, dilation_rates, head_offsets)
    found = checked_tensors(
        query,
        key,
        value,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        key_start=key_start,
    )
    check_choices(padding, mixing_grad)
    return {
        **found,
        "segment_lengths": pattern.segment_lengths,
        "dilation_rates": pattern.dilation_rates,
        "head_offsets": head_offsets,
        "padding": padding,
        "mixing_grad": mixing_grad,
    }


def _pattern(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], head_offsets: HeadOffsets
) -> DilatedPattern:
    if torch.compiler.is_compiling() or not isinstance(head_offsets, str):
        return DilatedPattern(segment_lengths, dilation_rates, head_offsets)  # type: ignore[arg-type]  # makes tuples
    pair = (segment_lengths, dilation_rates)
    if any(type(values) not in (list, tuple) or any(type(value) is not int for value in values) for values in pair):
        return DilatedPattern(segment_lengths, dilation_rates, head_offsets)  # type: ignore[arg-type]
    return _pattern_of(tuple(segment_lengths), tuple(dilation_rates), head_offsets)


_pattern_of = lru_cache(maxsize=256)(DilatedPattern)
"""One record for equal patterns: making one checks it."""


def check_choices(padding: str, mixing_grad: str) -> None:
    """Raise ValueError for a value of ``padding`` or ``mixing_grad`` that does not exist."""
    for name, value, allowed in (
        ("padding", padding, get_args(Padding)),
        ("mixing_grad", mixing_grad, get_args(MixingGrad)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")
