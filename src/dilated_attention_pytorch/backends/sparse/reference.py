"""The formula, one query tile at a time: every option, every dtype, every device, in memory O(block row).

The keys of a tile are those of the blocks that its rows list; P = exp(s - lse) over them. The backward pass needs
the final (out, lse): dS = P * (dP - delta) with delta = rowsum(dO * O) - dLSE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...merge import accumulator_dtype, merge_
from ...patterns.blocks import BlockPlan, spread
from ..philox import keep_mask
from ..reference import without_masked
from .problem import SparseProblem


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows of one query tile for heads with one list, and the keys of the blocks that they list."""

    batch: int
    heads: Tensor
    kv_heads: Tensor
    query_rows: Tensor
    key_rows: Tensor
    key_blocks: Tensor  # (key rows,) the block of its document that each key lies in
    allowed: Tensor  # (heads or 1, query rows, key rows) bool
    keep: Tensor | None  # (heads, query rows, key rows) bool, under dropout


def unsupported(problem: SparseProblem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem: it always can."""
    return None


def _seen(
    plan: BlockPlan, entries: slice, part: Tensor, heads: Tensor, query: Tensor, key: Tensor, total: int
) -> Tensor:
    """(heads or 1, queries, keys) bool: which rows of a tile see which keys, causality left out.

    ``part`` (keys,) says which of the entries a key belongs to; ``query`` and ``key`` are positions.
    """
    if plan.whole is None:
        return torch.ones(1, len(query), len(key), dtype=torch.bool, device=key.device)
    seen = plan.whole[entries][part].expand(1, len(query), -1)
    if plan.row_bits is not None:
        row = torch.arange(len(query), device=key.device)
        words = plan.row_bits[entries][part].T[row // 32]  # (queries, keys)
        seen = seen | (words >> (row % 32)[:, None] & 1).bool()
    for pattern in plan.dilated:
        for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
            offset = torch.tensor([pattern.head_offset(h, r, total) for h in heads.tolist()], device=key.device)[
                :, None
            ]
            active = (query % w % r == offset)[:, :, None] & (key % w % r == offset)[:, None, :]
            seen = seen | (active & (query[:, None] // w == key // w))
    return seen


def _together(plan: BlockPlan, first: int, last: int) -> Iterator[slice]:
    """Entries whose keys go into one softmax: all of a tile, but one by one where its rows select for themselves.

    Then a row's result must not depend, not even in its rounding, on what other rows of the tile have selected: a
    block that a row does not see merges into it without a trace.
    """
    if plan.row_bits is None and first < last:
        yield slice(first, last)
    elif plan.row_bits is not None:
        yield from (slice(entry, entry + 1) for entry in range(first, last))


def _tiles(problem: SparseProblem, mask: Tensor | None, seed: int | None, device: torch.device) -> Iterator[_Tile]:
    shape, options, plan = problem.shape, problem.options, problem.plan
    everything = torch.arange(shape.heads, device=device)
    groups = everything[:, None] if plan.per_head else everything[None]
    pointers, query_tiles = plan.row_pointer.tolist(), plan.query_tiles.tolist()
    first_query = shape.key_rows - shape.query_rows
    for heads, pointer in zip(groups, pointers, strict=True):
        for tile, (batch, first, position, count) in enumerate(query_tiles):
            for entries in _together(plan, pointer[tile], pointer[tile + 1]):
                key_tiles = plan.key_tiles[plan.columns[entries]].long()
                part, key_rows = spread(key_tiles[:, 1], key_tiles[:, 3])
                key_positions = key_rows + (key_tiles[:, 2] - key_tiles[:, 1])[part]
                steps = torch.arange(count, device=device)
                query_rows, query_positions = first + steps, position + steps
                allowed = _seen(plan, entries, part, heads, query_positions, key_positions, shape.heads)
                if options.is_causal:
                    allowed = allowed & (key_positions <= query_positions[:, None])
                if mask is not None:
                    allowed = allowed & ~mask[batch, key_rows]
                keep = None
                if options.dropout_p:
                    assert seed is not None
                    keep = keep_mask(
                        seed, options.dropout_p, branch=0, batch_heads=batch * shape.heads + heads,
                        query_rows=first_query + query_rows, key_rows=key_rows,
                    )  # fmt: skip
                yield _Tile(
                    batch, heads, heads * shape.kv_heads // shape.heads, query_rows, key_rows,
                    key_positions // plan.block_size, allowed, keep,
                )  # fmt: skip


def _take(tensor: Tensor, batch: int, rows: Tensor, heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(heads, rows, D) of a (B, N, H, D) tensor, a copy."""
    return tensor[batch, rows][:, heads].transpose(0, 1).to(dtype)


def _scores(q: Tensor, k: Tensor, tile: _Tile, problem: SparseProblem, acc: torch.dtype) -> Tensor:
    return ((q @ k.mT).to(acc) * problem.options.scale).masked_fill_(~tile.allowed, -torch.inf)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: SparseProblem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H))."""
    acc = accumulator_dtype(query.dtype)
    key, value = without_masked(mask, key, value)
    shape = problem.shape
    out = query.new_zeros(shape.batch, shape.query_rows, shape.heads, shape.value_dim, dtype=acc)
    lse = query.new_full(out.shape[:3], -torch.inf, dtype=acc)
    for tile in _tiles(problem, mask, seed, query.device):
        q = _take(query, tile.batch, tile.query_rows, tile.heads, acc)
        k = _take(key, tile.batch, tile.key_rows, tile.kv_heads, acc)
        v = _take(value, tile.batch, tile.key_rows, tile.kv_heads, acc)
        scores = _scores(q, k, tile, problem, acc)
        tile_lse = torch.logsumexp(scores, -1)
        p = torch.exp(scores - tile_lse.masked_fill(tile_lse == -torch.inf, 0.0).unsqueeze(-1))
        if tile.keep is not None:
            p = p * tile.keep.to(acc) / (1 - problem.options.dropout_p)
        here = (tile.query_rows[:, None], tile.heads)
        joined, joined_lse = out[tile.batch][here], lse[tile.batch][here]
        merge_(joined, joined_lse, (p @ v).transpose(0, 1), tile_lse.T)
        out[tile.batch][here], lse[tile.batch][here] = joined, joined_lse
    return out.to(query.dtype), lse


class _Gradients(NamedTuple):
    """What the backward pass of one tile comes to: P after dropout, and dS of the scaled scores."""

    q: Tensor
    k: Tensor
    grad_out: Tensor
    p: Tensor
    ds: Tensor


def _gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: SparseProblem,
    mask: Tensor | None,
    seed: int | None,
) -> Iterator[tuple[_Tile, _Gradients]]:
    """Every tile with its gradients, from the final (out, lse)."""
    acc = accumulator_dtype(query.dtype)
    key, value = without_masked(mask, key, value)
    delta = (grad_out.to(acc) * out.to(acc)).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse.to(acc)
    for tile in _tiles(problem, mask, seed, query.device):
        q = _take(query, tile.batch, tile.query_rows, tile.heads, acc)
        k = _take(key, tile.batch, tile.key_rows, tile.kv_heads, acc)
        v = _take(value, tile.batch, tile.key_rows, tile.kv_heads, acc)
        do = _take(grad_out, tile.batch, tile.query_rows, tile.heads, acc)
        row_lse = _take(lse.unsqueeze(-1), tile.batch, tile.query_rows, tile.heads, acc)
        row_delta = _take(delta.unsqueeze(-1), tile.batch, tile.query_rows, tile.heads, acc)
        p = torch.exp(_scores(q, k, tile, problem, acc) - row_lse.masked_fill(row_lse == -torch.inf, torch.inf))
        dp, dropped = do @ v.mT, p
        if tile.keep is not None:
            factor = tile.keep.to(acc) / (1 - problem.options.dropout_p)
            dp, dropped = dp * factor, p * factor
        yield tile, _Gradients(q, k, do, dropped, p * (dp - row_delta))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: SparseProblem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the final (out, lse); ``grad_lse`` is (B, Nq, H)."""
    acc, scale = accumulator_dtype(query.dtype), problem.options.scale
    sums = [torch.zeros_like(t, dtype=acc, memory_format=torch.contiguous_format) for t in (query, key, value)]
    found = _gradients(grad_out, grad_lse, query, key, value, out, lse, problem, mask, seed)
    for tile, (q, k, do, p, ds) in found:
        ds = ds * scale
        shares = (ds @ k, ds.mT @ q, p.mT @ do)
        places = ((tile.query_rows, tile.heads), *((tile.key_rows, tile.kv_heads),) * 2)
        for total, share, (rows, heads) in zip(sums, shares, places, strict=True):
            # Query heads that share a key head add to the same place: accumulate, deterministically.
            total[tile.batch].index_put_((rows[None, :], heads[:, None]), share, accumulate=True)
    return sums[0].to(query.dtype), sums[1].to(query.dtype), sums[2].to(query.dtype)


def gate_gradient(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: SparseProblem,
    blocks: int,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """(B, H, Nq, blocks): gradient of numbers added to all scores of a row in a block, in the accumulator's dtype."""
    shape = problem.shape
    total = query.new_zeros(
        shape.batch, shape.heads, shape.query_rows, blocks, dtype=accumulator_dtype(query.dtype)
    )  # fmt: skip
    found = _gradients(grad_out, grad_lse, query, key, value, out, lse, problem, mask, seed)
    for tile, (_, _, _, _, ds) in found:
        place = (tile.heads[:, None, None], tile.query_rows[:, None], tile.key_blocks)
        total[tile.batch].index_put_(place, ds, accumulate=True)
    return total
