"""Rows of a long result against the definition in float64: where a dense oracle would never end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern

_TAIL = 10
"""One row in so many is the last one that is active in its branch."""


def check_rows(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pattern: DilatedPattern, count: int
) -> dict[str, Any]:
    """Errors of ``count`` rows active in each branch, against the definition in float64, and bound B of each.

    Bound B: twice the error of the same formula with products in the dtype of the tensors, and 4 eps of the largest
    value.

    Args:
        query, key, value, out: (1, N, H, D), not causal, wherever they are.
        lse: (1, H, N).
        pattern: of the call.
        count: rows for each branch, drawn at random from the active ones, one in ten the last of all.

    Returns:
        The worst errors, and what was looked at: for each branch rows, tails, and how many of its segments.
    """
    rows, heads, dim = query.shape[1:]
    eps = torch.finfo(query.dtype).eps
    errors, coverage, pairs = [], [], 0
    for number, (w, r) in enumerate(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)):
        generator, segments, tails, looked = torch.Generator().manual_seed(number), set(), 0, 0
        for sample in range(count):
            head = _draw(heads, generator)
            offset = pattern.head_offset(head, r, heads)
            last = (rows - 1) // w
            segment = last if sample % _TAIL == 0 else _draw(last + 1, generator)
            if min(w, rows - segment * w) <= offset:  # a short last segment has no row of this head
                segment = max(0, segment - 1)
            active = -(-(min(w, rows - segment * w) - offset) // r)
            if active <= 0:
                continue
            place = active - 1 if sample % _TAIL == 0 else _draw(active, generator)
            row = segment * w + offset + place * r
            q, (k, v) = query[0, row, head], _seen(key, value, pattern, row, head)
            scores = k.double() @ q.double() / math.sqrt(dim)
            gold = torch.softmax(scores, 0) @ v.double()
            eager = (torch.softmax((k @ q).float() / math.sqrt(dim), 0).to(v.dtype) @ v).double()
            bound = 2 * (eager - gold).abs().max() + 4 * eps * gold.abs().max()
            error = (out[0, row, head].double() - gold).abs().max()
            lse_error = (lse[0, head, row].double() - torch.logsumexp(scores, 0)).abs()
            errors.append(torch.stack([error / bound, error, lse_error]).cpu())
            segments.add(segment)
            looked, tails, pairs = looked + 1, tails + (sample % _TAIL == 0), pairs + len(k)
        coverage.append({
            "segment_length": w, "dilation_rate": r, "rows": looked, "tails": tails, "segments": len(segments),
            "of_segments": -(-rows // w),
        })  # fmt: skip
    worst = torch.stack(errors).amax(0).tolist()
    return {
        "rows": len(errors),
        "pairs": pairs,
        "worst_error_over_bound": worst[0],
        "worst_error": worst[1],
        "worst_lse_error": worst[2],
        "branches": coverage,
    }


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))


def _seen(key: Tensor, value: Tensor, pattern: DilatedPattern, row: int, head: int) -> tuple[Tensor, Tensor]:
    """The keys and values that a row attends to, once for each branch."""
    rows, heads = key.shape[1:3]
    keys, values = [], []
    for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        offset = pattern.head_offset(head, r, heads)
        if row % w % r == offset:
            first = row // w * w
            here = slice(first + offset, min(first + w, rows), r)
            keys.append(key[0, here, head])
            values.append(value[0, here, head])
    return torch.cat(keys), torch.cat(values)
