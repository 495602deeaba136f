"""What a block-sparse pattern loses against dense attention, on the user's own query, key and value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.sparse.ops import sparse_problem
from ..functional import dilated_attention_with_lse
from ..patterns import ContentTopK, GlobalLocal, Hierarchical, LocalWindow, RandomBlocks, Union
from ..patterns.blocks import BlockPlan
from ..sparse import pattern_tensors, sparse_attention_with_lse


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A pattern measured against dense attention; tensors are (H,), float64, means over batch and rows."""

    pattern: Any
    recall: Tensor
    """Share of the dense softmax's weight that lies on pairs of the pattern."""
    error: Tensor
    """Norm of the difference to the dense output, relative to the norm of the dense output."""
    work: float
    """Pairs that are computed, relative to those of dense attention (causal: of its triangle)."""


def measure_quality(
    query: Tensor, key: Tensor, value: Tensor, pattern: Any, *, is_causal: bool = False, scale: float | None = None
) -> Quality:
    """Recall of attention weight, output error and work of a pattern, per head, without an N x N tensor.

    The share of a row's dense weight that a pattern keeps is exp(lse of the pattern - dense lse).

    Args:
        query, key, value: as for `sparse_attention`.
        pattern: a block-sparse pattern; a pair counts once in it.
        is_causal, scale: as for `sparse_attention`.

    Raises:
        ValueError: a union that counts pairs several times.

    >>> import torch
    >>> from dilated_attention_pytorch import LocalWindow
    >>> q, k, v = torch.randn(3, 1, 128, 2, 16)
    >>> found = measure_quality(q, k, v, LocalWindow(16, block_size=16))
    >>> bool((found.recall > 0.2).all()), round(found.work, 3)
    (True, 0.344)
    """
    if isinstance(pattern, Union) and pattern.multiplicity:
        raise ValueError("the union counts pairs several times, so it keeps no share of dense attention")
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    with torch.no_grad():
        dense = dilated_attention_with_lse(query, key, value, (key.shape[1],), (1,), **options)
        return _against(dense.out.double(), dense.lse.double(), query, key, value, pattern, options)


def _against(
    dense: Tensor, dense_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, pattern: Any, options: dict[str, Any]
) -> Quality:
    out, lse = sparse_attention_with_lse(query, key, value, pattern, **options)
    recall = (lse.double() - dense_lse).exp().mean((0, 2))
    difference = (out.double() - dense).square().sum((0, 1, 3)).sqrt()
    error = difference / dense.square().sum((0, 1, 3)).sqrt()
    lists = pattern_tensors(query, key, pattern, **options)
    problem = sparse_problem(
        query, key, value, None, None, None, lists, pattern.code, 0, options["is_causal"], options["scale"], 0.0
    )  # fmt: skip
    queries, keys = query.shape[1], key.shape[1]
    pairs = queries * keys - (queries * (queries - 1) // 2 if options["is_causal"] else 0)
    work = _pairs(problem.plan, is_causal=options["is_causal"]) / (query.shape[0] * pairs * len(problem.plan.counts))
    return Quality(pattern=pattern, recall=recall, error=error, work=work)


def _pairs(plan: BlockPlan, *, is_causal: bool) -> int:
    """(query, key) pairs of the lists, over all rows of its row pointer; pairs of dilated members in whole blocks."""
    tile = plan.query_tiles[plan.entry_rows % plan.query_tiles.shape[0]].long()
    other = plan.key_tiles[plan.columns.long()].long()
    rows, keys = tile[:, 3], other[:, 3]
    if plan.row_bits is not None and plan.whole is not None:
        shifts = torch.arange(32, device=plan.row_bits.device)
        selected = (plan.row_bits[..., None] >> shifts & 1).sum((1, 2))
        rows = torch.where(plan.whole, rows, selected)
    pairs = rows * keys
    if is_causal:
        below = tile[:, 2] - other[:, 2]  # keys of the own block before its first query
        own = tile[:, 2] // plan.block_size == other[:, 2] // plan.block_size
        pairs = torch.where(own, rows * below + rows * (rows + 1) // 2, pairs)
    return int(pairs.sum())


def candidate_patterns(rows: int, *, block_size: int = 64) -> list[Any]:
    """Patterns of growing work for sequences of ``rows`` tokens: windows, global tokens, levels, random, content."""
    blocks = max(1, rows // block_size)
    sizes = [1 << n for n in range(blocks.bit_length()) if 1 << n <= blocks // 2] or [1]
    found: list[Any] = [LocalWindow(0, block_size)]
    for size in sizes:
        window = size * block_size
        found.append(LocalWindow(window, block_size))
        found.append(GlobalLocal(window // 2 // block_size * block_size, window, block_size=block_size))
        found.append(Hierarchical(((window, block_size), (blocks * block_size, 8 * block_size)), block_size))
        found.append(Union((LocalWindow(0, block_size), RandomBlocks(2 * size, block_size=block_size))))
        found += [ContentTopK(size, 1, 1, pooling, block_size) for pooling in ("mean", "moments", "sub_means")]
    return found


def search_patterns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    budget: float,
    candidates: Iterable[Any] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> list[Quality]:
    """Measure the candidates that cost at most ``budget`` of dense attention; the highest mean recall comes first.

    Args:
        query, key, value: as for `sparse_attention`; one or two sequences of the user's own activations will do.
        budget: largest `Quality.work`, above 0 and at most 1. The cost of selecting blocks by content is left out.
        candidates: patterns to try, by default `candidate_patterns`.
        is_causal, scale: as for `sparse_attention`.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 256, 2, 16)
    >>> best = search_patterns(q, k, v, budget=0.5, is_causal=True)  # the best first
    >>> best[0].work <= 0.5
    True
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}; give a share of dense attention's work, above 0 and at most 1")
    tried = candidate_patterns(key.shape[1]) if candidates is None else candidates
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    with torch.no_grad():
        dense = dilated_attention_with_lse(query, key, value, (key.shape[1],), (1,), **options)
        out, lse = dense.out.double(), dense.lse.double()
        found = [_against(out, lse, query, key, value, pattern, options) for pattern in tried]
    fit = sorted((q for q in found if q.work <= budget), key=lambda q: -float(q.recall.mean()))
    if not fit:
        least = min((q.work for q in found), default=None)
        raise ValueError(f"no candidate costs at most {budget}, the cheapest costs {least}; raise the budget")
    return fit
