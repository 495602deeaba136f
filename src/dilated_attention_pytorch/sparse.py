"""The public functions of block-sparse attention: check what was given, hand the rest to the operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backends.arguments import checked_tensors
from .backends.ops import attention
from .backends.sparse.dispatch import check_sparse_backend
from .backends.sparse.gate import check_gate, sparse_gate
from .backends.sparse.ops import sparse_attention as attend
from .backends.sparse.selection import pattern_tensors as tensors_of
from .backends.sparse.selection import sparse_select
from .parallel.streaming import Streaming
from .patterns import ContentTopK, DilatedPattern, Union
from .types import AttentionOutput

if TYPE_CHECKING:
    from .parallel import ContextParallel


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Any,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
    gate: Tensor | None = None,
    backend: str = "auto",
    parallel: ContextParallel | None = None,
) -> Tensor:
    """Attention over the blocks of keys that a pattern lists for each block of queries, as one softmax.

    Block j of a document holds its positions ``[j * block_size, (j + 1) * block_size)``, whatever rows they lie in.
    A query attends to every key of the blocks that its own block lists; with ``is_causal`` to those of them that are
    not after it.

    Args:
        query: (B, N_q, H, D), float64, float32, bfloat16 or float16. With N_q < N the rows are the last N_q rows.
        key: (B, N, H_kv, D); H must be a multiple of H_kv (grouped-query attention).
        value: (B, N, H_kv, D_v).
        pattern: `LocalWindow`, `GlobalLocal`, `DilatedBlocks`, `Hierarchical`, `RandomBlocks`, `BlockList`,
            `ContentTopK`, or a `Union` of them.
        is_causal: a row attends to rows at or before its own.
        scale: factor of the scores, 1 / sqrt(D) by default.
        dropout_p: probability with which each attended pair is dropped, drawn from the default generator of the
            device. The log-sum-exp is that without dropout.
        key_padding_mask: (B, N) bool, True = ignore this key, as in nn.MultiheadAttention.
        cu_seqlens: (documents + 1,) int32 or int64, for B = 1: rows cu_seqlens[i] to cu_seqlens[i + 1] are document
            i; positions and blocks start anew in each.
        key_start: position of key row 0 in its document, an int or (B,) int64, as for `dilated_attention`.
        gate: (B, H, N_q, blocks) floating, for `ContentTopK` alone: ``g - stopgrad(g)`` is added to the scores that a
            row keeps in a block, g being its number for that block of its document. No result changes, and
            neither does the choice; the gate gets the gradient of the scores. Backend "reference" only, which
            "auto" then takes. The gate itself takes N_q x N / block_size numbers a head.
        backend: "auto", "gluon", "sdpa", "triton" or "reference".
        parallel: a `ContextParallel` of which every rank gives its rows (`ContextParallel.shard`) and gets the result
            for them; N, cu_seqlens and key_start are those of the whole sequence. Strategies "gather" (which "auto"
            takes) and "ring"; no dropout, no gate, no `DilatedPattern` in a union that counts a pair once.

    Returns:
        (B, N_q, H, D_v) in the dtype of the query; 0 for a row without any key.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or a backend that cannot compute them.

    Under torch.autocast the inputs are cast to its dtype. Differentiable once. Deterministic on the CPU.

    >>> import torch
    >>> from dilated_attention_pytorch import LocalWindow, sparse_attention
    >>> query = key = value = torch.randn(1, 100, 4, 16)
    >>> sparse_attention(query, key, value, LocalWindow(32, block_size=16), is_causal=True).shape
    torch.Size([1, 100, 4, 16])
    """
    return sparse_attention_with_lse(
        query,
        key,
        value,
        pattern,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        key_start=key_start,
        gate=gate,
        backend=backend,
        parallel=parallel,
    ).out


def sparse_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Any,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
    gate: Tensor | None = None,
    backend: str = "auto",
    parallel: ContextParallel | None = None,
) -> AttentionOutput:
    """`sparse_attention` together with the log-sum-exp that joins it with other partial results.

    Arguments and errors as for `sparse_attention`.

    Returns:
        AttentionOutput(out (B, N_q, H, D_v), lse (B, H, N_q)): lse is the natural logarithm of the softmax
        denominator, float32 (float64 for float64 inputs), -inf for a row without any key. Both are differentiable.

    >>> import torch
    >>> from dilated_attention_pytorch import LocalWindow, sparse_attention_with_lse
    >>> x = torch.zeros(1, 48, 1, 16)
    >>> sparse_attention_with_lse(x, x, x, LocalWindow(0, block_size=16)).lse.exp().round().unique()
    tensor([16.])
    """
    check_pattern(pattern)
    check_sparse_backend(backend)
    if isinstance(parallel, Streaming):
        raise ValueError("parallel is a Streaming, which streams dilated attention alone; leave it out")
    arguments = checked_tensors(
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
    if gate is not None:
        if not isinstance(pattern, ContentTopK):
            raise ValueError(f"gate is given, and pattern is a {type(pattern).__name__}; give a ContentTopK alone")
        if parallel is not None:
            raise ValueError("gate is given, and parallel too; a gate needs all rows on one device: leave out one")
        check_gate(gate, arguments["query"], backend)
        return _attend(arguments, pattern, "reference", gate)
    if isinstance(pattern, Union) and pattern.multiplicity:
        return _joined([_attend(arguments, member, backend, parallel=parallel) for member in pattern.patterns])
    return _attend(arguments, pattern, backend, parallel=parallel)


def check_pattern(pattern: Any) -> None:
    """Raise ValueError for what is no block-sparse pattern."""
    if isinstance(pattern, DilatedPattern):
        raise ValueError("pattern is a DilatedPattern; call dilated_attention, or put it in a Union with others")
    if isinstance(pattern, type) or not hasattr(pattern, "entries"):
        raise ValueError(f"pattern is {pattern!r}; give a block-sparse pattern such as LocalWindow(1024)")


def _attend(
    arguments: dict[str, Any],
    pattern: Any,
    backend: str,
    gate: Tensor | None = None,
    *,
    parallel: ContextParallel | None = None,
) -> AttentionOutput:
    """One pattern, through its operator or over ranks."""
    if isinstance(pattern, DilatedPattern):
        branches: dict[str, Any] = {
            "segment_lengths": pattern.segment_lengths,
            "dilation_rates": pattern.dilation_rates,
            "head_offsets": pattern.head_offsets,
            "padding": "mask",
            "mixing_grad": "exact",
        }
        if parallel is not None:
            out, lse = parallel.attend(arguments | branches, backend)
        else:
            out, lse = attention(**arguments, **branches, seed=_seed(arguments), backend=backend)
    elif parallel is not None:
        out, lse = parallel.attend_sparse(arguments, pattern, backend)
    else:
        seed, lists = _seed(arguments), pattern_tensors(**_selecting(arguments), pattern=pattern)
        out, lse = attend(**arguments, seed=seed, lists=lists, pattern=pattern.code, backend=backend)
        if gate is not None:
            out, lse = sparse_gate(gate, out, lse, **arguments, seed=seed, lists=lists, pattern=pattern.code)
    return AttentionOutput(out, lse.transpose(1, 2))


def _seed(arguments: dict[str, Any]) -> Tensor | None:
    """Dropout's; every member of a union draws its own."""
    return torch.randint(2**62, (1,), device=arguments["query"].device) if arguments["dropout_p"] else None


def _selecting(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a choice of blocks depends on."""
    names = ("query", "key", "key_padding_mask", "cu_seqlens", "key_starts", "key_start", "is_causal", "scale")
    return {name: arguments[name] for name in names}


def pattern_tensors(
    query: Tensor,
    key: Tensor,
    pattern: Any,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_starts: Tensor | None = None,
    key_start: int = 0,
    is_causal: bool = False,
    scale: float | None = None,
) -> list[Tensor]:
    """Tensors that go with a pattern's code: explicit lists, and what the content of query and key selects."""
    return tensors_of(
        pattern,
        lambda member: sparse_select(
            query.detach(), key.detach(), key_padding_mask, cu_seqlens, key_starts, member.code, key_start, is_causal,
            scale,
        ),
    )  # fmt: skip


def _joined(parts: list[AttentionOutput]) -> AttentionOutput:
    """Partial results over the parts of a multiset of keys as one; differentiable, unlike `merge`."""
    lses = torch.stack([part.lse for part in parts])
    largest = lses.detach().amax(0)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = (lses - shift).exp()
    total = weights.sum(0)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    lse = (safe.log() + shift).masked_fill(empty, -torch.inf)
    shares = (weights / safe).transpose(2, 3).unsqueeze(-1)  # (parts, B, N, H, 1)
    out = sum(share * part.out.to(share.dtype) for share, part in zip(shares, parts, strict=True))
    assert isinstance(out, Tensor)
    return AttentionOutput(out.to(parts[0].out.dtype), lse)


class SparseAttention(nn.Module):
    """:func:`sparse_attention` with its pattern and options stored; it has no parameters.

    Args:
        pattern: a block-sparse pattern.
        is_causal: whether a query attends only to keys at or before it; the call can override it.
        scale: factor on the scores, by default ``1 / sqrt(D)``.
        dropout: probability with which an attention weight is dropped, in training mode only.
        backend: as for :func:`sparse_attention`.

    Raises:
        ValueError: a pattern or an option that is not allowed; the message says what is.

    >>> from dilated_attention_pytorch import LocalWindow, SparseAttention
    >>> attention = SparseAttention(LocalWindow(64, block_size=64), is_causal=True)
    >>> query = key = value = torch.randn(2, 256, 8, 16)
    >>> attention(query, key, value).shape
    torch.Size([2, 256, 8, 16])
    """

    def __init__(
        self,
        pattern: Any,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout!r}; give a probability of at least 0 and below 1")
        check_pattern(pattern)
        check_sparse_backend(backend)
        self.pattern = pattern
        self.is_causal = is_causal
        self.scale = scale
        self.dropout = dropout
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        key_start: int | Tensor = 0,
        gate: Tensor | None = None,
        parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Query ``(B, Nq, H, D)``, key ``(B, Nk, G, D)``, value ``(B, Nk, G, D_v)`` to ``(B, Nq, H, D_v)``.

        ``is_causal`` None takes the value given at construction. The others, and what raises, as for
        :func:`sparse_attention`.
        """
        return sparse_attention(
            query,
            key,
            value,
            self.pattern,
            is_causal=self.is_causal if is_causal is None else is_causal,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            key_start=key_start,
            gate=gate,
            backend=self.backend,
            parallel=parallel,
        )

    def extra_repr(self) -> str:
        """Pattern, and the options that differ from their defaults."""
        options = {
            "is_causal": (self.is_causal, False),
            "scale": (self.scale, None),
            "dropout": (self.dropout, 0.0),
            "backend": (self.backend, "auto"),
        }
        parts = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([repr(self.pattern), *parts])
