"""The formula, block by block: every option, every dtype, every device, in memory O(block x w / r).

For one branch and one block of active query rows the keys are the active rows of the same segments. P = exp(s - lse)
over those keys is a partial result, joined by `merge`. The backward pass needs nothing but the final (out, lse): in
every branch P = exp(s - lse) with the final lse, and dS = P * (dP - delta) with delta = rowsum(dO * O) - dLSE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merge import accumulator_dtype, add_zero_keys_, merge_
from .philox import keep_mask
from .problem import Part, Problem

BLOCK = 512


@dataclass(frozen=True, slots=True)
class _Block:
    """Active query rows of one branch and head offset, and the keys that any of them attends to."""

    branch: int
    batch: slice
    heads: Tensor
    kv_heads: Tensor
    query_rows: Tensor  # in rows of the query
    key_rows: Tensor
    allowed: Tensor  # (b, 1, query rows, key rows) bool
    zero_keys: Tensor  # (query rows,)
    keep: Tensor | None  # (b, heads, query rows, key rows) bool, under dropout


def unsupported(problem: Problem, *, backward: bool = False, grad_lse: bool = False) -> str | None:
    """Why this backend cannot compute the problem: it always can."""
    return None


def peak_bytes(problem: Problem, *, backward: bool = False) -> int:
    """Predicted bytes allocated beyond the inputs at the peak: accumulators, result, and one block's temporaries."""
    shape = problem.shape
    size, acc = problem.dtype.itemsize, accumulator_dtype(problem.dtype).itemsize
    rows, keys = shape.batch * shape.query_rows * shape.heads, shape.batch * shape.key_rows * shape.kv_heads
    widths = rows * shape.head_dim + keys * (shape.head_dim + shape.value_dim) if backward else rows * shape.value_dim
    sums = (widths + rows) * acc + (widths * size if size != acc else 0)
    if problem.has_mask:
        sums += keys * (shape.head_dim + shape.value_dim) * size
    block = 0
    for branch in problem.pattern.branches:
        batches = max((document.batches for document in problem.documents), default=0)
        heads = -(-shape.heads // branch.dilation_rate)
        active = -(-min(branch.segment_length, shape.key_rows) // branch.dilation_rate)
        queries = min(BLOCK, -(-shape.query_rows // branch.dilation_rate))
        aligned = queries % active == 0 or active % queries == 0
        span = min(-(-shape.key_rows // branch.dilation_rate), max(queries, active) + (0 if aligned else active))
        # Scores, weights and their products, of the block's size each (counted in runs, not derived).
        block = max(block, batches * heads * queries * span * acc * (6 if backward else 5))
    return sums + block


def _blocks(
    problem: Problem, branches: Sequence[int], mask: Tensor | None, seed: int | None, device: torch.device
) -> Iterator[_Block]:
    shape, options = problem.shape, problem.options
    shared = all(d.batches == shape.batch for d in problem.documents)
    batches = [slice(0, shape.batch)] if shared else [slice(b, b + 1) for b in range(shape.batch)]
    all_rows = torch.arange(shape.key_rows, device=device)
    part = problem.part or Part(shape.heads, 0, ((0, shape.key_rows),))
    whole_rows = part.rows(device)
    first_query = shape.key_rows - shape.query_rows
    for batch in batches:
        position = torch.full((shape.key_rows,), -1, device=device)
        document = torch.full((shape.key_rows,), -1, device=device)
        length = torch.zeros(shape.key_rows, dtype=torch.int64, device=device)
        for index, d in enumerate(problem.documents):
            if d.batch <= batch.start < d.batch + d.batches:
                here = slice(d.row, d.row + d.rows)
                position[here] = all_rows[: d.rows] + d.position
                document[here], length[here] = index, d.length
        for index in branches:
            w, r = problem.pattern.segment_lengths[index], problem.pattern.dilation_rates[index]
            number = position // w - (position // w).min()
            segment = document * (number.max() + 1) + number  # the pieces of a shard may lie far apart
            offsets = [problem.pattern.head_offset(h, r, shape.heads) for h in range(shape.heads)]
            for offset in sorted(set(offsets)):
                heads = torch.tensor([h for h in range(shape.heads) if offsets[h] == offset], device=device)
                active = all_rows[(position >= 0) & (position % w % r == offset)]
                if not (active >= first_query).any():
                    continue
                for query_rows in active[active >= first_query].split(BLOCK):
                    # Segments ascend with the rows, so the keys of these rows are one range of the active ones.
                    low = torch.searchsorted(segment[active], segment[query_rows[0]])
                    high = torch.searchsorted(segment[active], segment[query_rows[-1]], right=True)
                    key_rows = active[int(low) : int(high)]
                    allowed = segment[query_rows, None] == segment[key_rows]
                    if options.is_causal:
                        allowed &= key_rows <= query_rows[:, None]
                    allowed = allowed[None, None]
                    if mask is not None:
                        allowed = allowed & ~mask[batch][:, key_rows][:, None, None, :]
                    zero_keys = torch.zeros_like(query_rows)
                    if options.padding == "zeros" and not options.is_causal:
                        zero_keys = _zero_keys(position[query_rows], length[query_rows], w, r, offset)
                    keep = None
                    if seed is not None:
                        entries = torch.arange(shape.batch, device=device)[batch]
                        keep = keep_mask(
                            seed, options.dropout_p, branch=part.branch + index,
                            batch_heads=entries[:, None] * part.heads + part.head + heads,
                            query_rows=whole_rows[query_rows], key_rows=whole_rows[key_rows],
                        )  # fmt: skip
                    kv_heads = heads * shape.kv_heads // shape.heads
                    yield _Block(
                        index,
                        batch,
                        heads,
                        kv_heads,
                        query_rows - first_query,
                        key_rows,
                        allowed,
                        zero_keys,
                        keep,
                    )


def _zero_keys(position: Tensor, length: Tensor, w: int, r: int, offset: int) -> Tensor:
    """Zero keys that padding="zeros" adds for rows at these positions of documents of these lengths."""
    start = position // w * w
    slots = -(-length.clamp(max=w) // r)
    real = (-((start + offset - (start + w).minimum(length)) // r)).clamp(min=0)
    return torch.where(start < length, slots - real, 0)


def _take(tensor: Tensor, batch: slice, rows: Tensor, heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, heads, rows, D) of a (B, N, H, D) tensor, a copy."""
    return tensor[batch][:, rows][:, :, heads].transpose(1, 2).to(dtype)


def _scores(q: Tensor, k: Tensor, block: _Block, problem: Problem, acc: torch.dtype) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(acc) * problem.options.scale
    return scores.masked_fill_(~block.allowed, -torch.inf)


def without_masked(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows that nobody may look at, as zeros: 0 * NaN would leak."""
    return tensors if mask is None else tuple(t.masked_fill(mask[:, :, None, None], 0) for t in tensors)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
    matmul_dtype: torch.dtype | None = None,
    branches: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Nq, H, Dv), lse (B, Nq, H)).

    Products are taken in ``matmul_dtype``, by default that of the accumulators; the input's own dtype gives the error
    of an eager implementation, which is what tolerances are measured by. ``branches`` takes only some of them.
    """
    acc = accumulator_dtype(query.dtype)
    work = matmul_dtype or acc
    key, value = without_masked(mask, key, value)
    shape = problem.shape
    out = query.new_zeros(shape.batch, shape.query_rows, shape.heads, shape.value_dim, dtype=acc)
    lse = query.new_full(out.shape[:3], -torch.inf, dtype=acc)
    for block in _blocks(problem, branches or range(len(problem.pattern.branches)), mask, seed, query.device):
        q = _take(query, block.batch, block.query_rows, block.heads, work)
        k = _take(key, block.batch, block.key_rows, block.kv_heads, work)
        v = _take(value, block.batch, block.key_rows, block.kv_heads, work)
        scores = _scores(q, k, block, problem, acc)
        block_lse = torch.logsumexp(scores, -1)
        p = torch.exp(scores - block_lse.masked_fill(block_lse == -torch.inf, 0.0).unsqueeze(-1))
        if block.keep is not None:
            p = p * block.keep.to(acc) / (1 - problem.options.dropout_p)
        block_out = (p.to(work) @ v).to(acc)
        here = (block.query_rows[:, None], block.heads)
        new_out, new_lse = out[block.batch][:, *here], lse[block.batch][:, *here]
        merge_(new_out, new_lse, block_out.transpose(1, 2), block_lse.transpose(1, 2))
        add_zero_keys_(new_out, new_lse, block.zero_keys[:, None])
        out[block.batch][:, *here], lse[block.batch][:, *here] = new_out, new_lse
    return out.to(query.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    *,
    mask: Tensor | None = None,
    seed: int | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the final (out, lse); ``grad_lse`` is (B, Nq, H)."""
    acc = accumulator_dtype(query.dtype)
    work = matmul_dtype or acc
    sums = tuple(torch.zeros_like(t, dtype=acc, memory_format=torch.contiguous_format) for t in (query, key, value))
    everything = range(len(problem.pattern.branches))
    parts: list[tuple[Sequence[int], Tensor]] = [(everything, out)]
    if problem.options.mixing_grad == "detached":
        # Each branch is differentiated with its own output; the weights exp(branch lse - lse) are constants.
        parts = [
            (
                [i],
                forward(query, key, value, problem, mask=mask, seed=seed, matmul_dtype=work, branches=[i])[0],
            )
            for i in everything
        ]
    key, value = without_masked(mask, key, value)
    for branches, part_out in parts:
        delta = (grad_out.to(acc) * part_out.to(acc)).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse.to(acc)
        for block in _blocks(problem, branches, mask, seed, query.device):
            _backward_block(block, problem, grad_out, delta, query, key, value, lse, sums, work)
    return sums[0].to(query.dtype), sums[1].to(query.dtype), sums[2].to(query.dtype)


def _backward_block(
    block: _Block,
    problem: Problem,
    grad_out: Tensor,
    delta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    sums: tuple[Tensor, ...],
    work: torch.dtype,
) -> None:
    """Add one block's share to the sums of dQ, dK and dV."""
    acc = sums[0].dtype
    q = _take(query, block.batch, block.query_rows, block.heads, work)
    k = _take(key, block.batch, block.key_rows, block.kv_heads, work)
    v = _take(value, block.batch, block.key_rows, block.kv_heads, work)
    do = _take(grad_out, block.batch, block.query_rows, block.heads, work)
    row_lse = _take(lse.unsqueeze(-1), block.batch, block.query_rows, block.heads, acc)
    row_delta = _take(delta.unsqueeze(-1), block.batch, block.query_rows, block.heads, acc)
    scores = _scores(q, k, block, problem, acc)
    p = torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, torch.inf))
    dp, dropped = (do @ v.transpose(-1, -2)).to(acc), p
    if block.keep is not None:
        factor = block.keep.to(acc) / (1 - problem.options.dropout_p)
        dp, dropped = dp * factor, p * factor
    ds = (p * (dp - row_delta) * problem.options.scale).to(work)
    shares = (ds @ k, ds.transpose(-1, -2) @ q, dropped.to(work).transpose(-1, -2) @ do)
    places = (
        (block.query_rows, block.heads),
        (block.key_rows, block.kv_heads),
        (block.key_rows, block.kv_heads),
    )
    entries = torch.arange(query.shape[0], device=query.device)[block.batch]
    for total, share, (rows, heads) in zip(sums, shares, places, strict=True):
        # Query heads that share a key head add to the same place: accumulate, deterministically.
        index = (entries[:, None, None], rows[None, :, None], heads[None, None, :])
        total.index_put_(index, share.transpose(1, 2).to(acc), accumulate=True)
