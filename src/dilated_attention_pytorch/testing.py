"""Oracles and input makers for tests: the definition written out densely, and the tolerance that goes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.philox import keep_mask
from .patterns import DilatedPattern
from .types import AttentionOutput


def multiplicity(
    pattern: DilatedPattern,
    num_heads: int,
    position: Tensor,
    document: Tensor,
    num_queries: int,
    *,
    is_causal: bool = False,
    hidden: Tensor | None = None,
) -> Tensor:
    """Which branch lets which query row of which head attend to which key row: (branches, H, N_q, N) bool.

    ``position`` and ``document`` (N,) say where the key rows lie; rows at negative positions lie in no document.
    """
    n = position.shape[0]
    query = torch.arange(n - num_queries, n)
    allowed = (document[query, None] == document) & (position[query, None] >= 0) & (position >= 0)
    if is_causal:
        allowed &= position <= position[query, None]
    if hidden is not None:
        allowed &= ~hidden
    result = torch.zeros(len(pattern.branches), num_heads, num_queries, n, dtype=torch.bool)
    for i, branch in enumerate(pattern.branches):
        w, r = branch.segment_length, branch.dilation_rate
        segment = position // w
        for h in range(num_heads):
            active = (position % w) % r == pattern.head_offset(h, r, num_heads)
            result[i, h] = allowed & active & active[query, None] & (segment == segment[query, None])
    return result


def _zero_keys(pattern: DilatedPattern, num_heads: int, position: Tensor, length: Tensor) -> Tensor:
    """Zero keys that torchscale's padding shows a row: (branches, H, N_q), counted slot by slot."""
    counts = torch.zeros(len(pattern.branches), num_heads, position.shape[0])
    for i, branch in enumerate(pattern.branches):
        for h in range(num_heads):
            offset = pattern.head_offset(h, branch.dilation_rate, num_heads)
            for q, (n, total) in enumerate(zip(position.tolist(), length.tolist(), strict=True)):
                if n < 0 or n % branch.segment_length % branch.dilation_rate != offset:
                    continue
                w = min(branch.segment_length, total)
                start = n // branch.segment_length * branch.segment_length
                slots = range(offset, branch.dilation_rate * math.ceil(w / branch.dilation_rate), branch.dilation_rate)
                if start < total:
                    counts[i, h, q] = sum(t >= w or start + t >= total for t in slots)
    return counts


def oracle(
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
    head_offsets: str = "contiguous",
    padding: str = "mask",
    mixing_grad: str = "exact",
    seed: int | None = None,
) -> AttentionOutput:
    """The definition, dense and differentiable, in the dtype of its inputs (float64 for an oracle). CPU, small N.

    Products are taken in the input's dtype, softmax and mixing in float32 or better, as an eager implementation
    would; ``seed`` is that of the dropout mask.
    """
    pattern = DilatedPattern(tuple(segment_lengths), tuple(dilation_rates), head_offsets)  # type: ignore[arg-type]
    (batch, num_queries, heads, dim), n = query.shape, key.shape[1]
    acc = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    outs, lses = [], []
    for b in range(batch):
        position, document = torch.arange(n), torch.zeros(n, dtype=torch.int64)
        if cu_seqlens is not None:
            for i, (first, last) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
                position[first:last] -= first
                document[first:last] = i
        else:
            position = position + (int(key_start[b]) if isinstance(key_start, Tensor) else key_start)
        hidden = key_padding_mask[b] if key_padding_mask is not None else torch.zeros(n, dtype=torch.bool)
        length = torch.bincount(document)[document] + position[0] - hidden.sum()
        m = multiplicity(pattern, heads, position, document, num_queries, is_causal=is_causal, hidden=hidden)
        zeros = torch.zeros(m.shape[:3])
        if padding == "zeros" and not is_causal:
            zeros = _zero_keys(pattern, heads, position[n - num_queries :], length[n - num_queries :])
        keep = torch.ones_like(m)
        if dropout_p:
            assert seed is not None
            rows, batch_heads = torch.arange(n), b * heads + torch.arange(heads)
            keep = torch.stack(
                [
                    keep_mask(seed, dropout_p, branch=i, batch_heads=batch_heads, query_rows=rows[n - num_queries :], key_rows=rows)
                    for i in range(len(pattern.branches))
                ]
            )  # fmt: skip
        group = heads // key.shape[2]
        q = query[b].transpose(0, 1)
        k, v = (
            t[b].masked_fill(hidden[:, None, None], 0).transpose(0, 1).repeat_interleave(group, 0)
            for t in (key, value)
        )
        scores = (q @ k.transpose(-1, -2)).to(acc) * scale
        out, lse = _mix(scores, v, m, zeros, keep.to(acc) / (1 - dropout_p), mixing_grad == "detached")
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    return AttentionOutput(torch.stack(outs), torch.stack(lses))


def _mix(
    scores: Tensor, v: Tensor, m: Tensor, zeros: Tensor, keep: Tensor, detached: bool
) -> tuple[Tensor, Tensor]:
    """Softmax over the multiset of keys and zero keys; detached: per branch, mixed by constant weights."""
    acc = scores.dtype

    def softmax(m: Tensor, zeros: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """m and keep (branches, H, Nq, N): out, lse over all of these branches."""
        count = m.sum(0)
        weight = torch.where(count > 0, count, 1).to(acc).log().masked_fill(count == 0, -torch.inf)
        logits = torch.cat([scores + weight, zeros.sum(0).to(acc).log().unsqueeze(-1)], -1)
        empty = (logits == -torch.inf).all(-1)
        lse = torch.logsumexp(logits.masked_fill(empty.unsqueeze(-1), 0.0), -1).masked_fill(empty, -torch.inf)
        shown = scores.masked_fill(count == 0, -torch.inf) - lse.masked_fill(empty, 0.0).unsqueeze(-1)
        p = torch.exp(shown) * (m * keep).sum(0).to(acc)
        return (p.to(v.dtype) @ v).to(acc), lse

    out, lse = softmax(m, zeros, keep)
    if detached:
        parts = [softmax(m[i : i + 1], zeros[i : i + 1], keep[i : i + 1]) for i in range(m.shape[0])]
        weights = [torch.exp(part_lse - lse).detach().nan_to_num(nan=0.0) for _, part_lse in parts]
        out = torch.stack([w.unsqueeze(-1) * part_out for w, (part_out, _) in zip(weights, parts, strict=True)]).sum(0)
        lse = lse.detach()
    return out.to(v.dtype), lse


def error_bound(gold: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """Bound B: twice the error of an eager implementation in ``dtype``, plus 4 eps of the largest gold value."""
    finite = torch.isfinite(gold)
    eager_error = (eager.double() - gold)[finite].abs().max() if finite.any() else torch.tensor(0.0)
    largest = gold[finite].abs().max() if finite.any() else torch.tensor(0.0)
    return float(2 * eager_error + 4 * torch.finfo(dtype).eps * largest)


def max_error(actual: Tensor, gold: Tensor) -> float:
    """Largest difference; inf where one is finite and the other is not, so that a NaN never passes."""
    same = actual.double() == gold
    difference = torch.where(same, 0.0, (actual.double() - gold).abs())
    return float(difference.nan_to_num(nan=torch.inf).max())
