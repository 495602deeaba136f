"""A dense oracle of block-sparse attention for tests, from the definitions in `patterns.formula`, and bound B."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .backends.philox import keep_mask
from .backends.sparse.selection import sparse_select
from .patterns.content import ContentTopK
from .patterns.formula import pair_counts
from .patterns.union import Union, members_of
from .sparse import sparse_attention_with_lse
from .testing import Case, error_bound, least_bound, max_error, results
from .types import AttentionOutput


@dataclass(frozen=True, kw_only=True)
class SparseCase(Case):
    """A call of `sparse_attention`: a `Case` whose branches are not looked at, and a pattern."""

    pattern: Any
    segment_lengths: tuple[int, ...] = (1,)
    dilation_rates: tuple[int, ...] = (1,)

    def sparse_options(self) -> dict[str, Any]:
        """Arguments of `sparse_attention` but the tensors, the pattern and the backend."""
        dropped = ("segment_lengths", "dilation_rates", "head_offsets", "padding", "mixing_grad")
        return {name: value for name, value in self.options().items() if name not in dropped}


def multiset(
    pattern: Any,
    heads: int,
    batch: int,
    rows: int,
    queries: int,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_start: int | Tensor = 0,
) -> Tensor:
    """(B, H, N_q, N) int64: how often each row attends to each key row."""
    counts = torch.zeros(batch, heads, rows, rows, dtype=torch.int64)
    bounds = [0, rows] if cu_seqlens is None else cu_seqlens.tolist()
    for b in range(batch):
        start = int(key_start[b]) if isinstance(key_start, Tensor) else key_start
        for low, last in pairwise(bounds):
            first = max(low, -start)
            if first >= last:
                continue
            position = torch.arange(first, last) + start - low
            found = pair_counts(pattern, heads, position, position, int(position[-1]) + 1, is_causal=is_causal)
            counts[b, :, first:last, first:last] = found
        if key_padding_mask is not None:
            counts[b] *= ~key_padding_mask[b]
    return counts[:, :, rows - queries :]


def chosen_multiset(case: SparseCase, tensors: Sequence[Tensor], *, device: str = "cpu") -> Tensor:
    """`multiset` of a pattern with a `ContentTopK`, whose choice is the library's own on ``device``.

    That the choice is right, and what it means for pairs, are two things: this knows the second.
    """
    query, key, options = tensors[0], tensors[1], case.sparse_options()
    members = members_of(case.pattern)
    content = next(member for member in members if isinstance(member, ContentTopK))
    others = tuple(member for member in members if member is not content)
    start, mask, bounds = options["key_start"], options.get("key_padding_mask"), options.get("cu_seqlens")
    by_batch = isinstance(start, Tensor)
    selection = sparse_select(
        query.to(device), key.to(device), None if mask is None else mask.to(device), bounds,
        start if by_batch else None, content.code, 0 if by_batch else start, case.is_causal,
        case.scale,
    ).cpu()  # fmt: skip
    (batch, queries, heads, _), rows = query.shape, key.shape[1]
    where: dict[str, Any] = {"key_padding_mask": mask, "cu_seqlens": bounds, "key_start": start}
    where["is_causal"] = case.is_causal
    shape = (heads, batch, rows, queries)
    counts = multiset(Union(others), *shape, **where) if others else torch.zeros(batch, heads, queries, rows).long()
    edges = [0, rows] if bounds is None else bounds.tolist()
    for b in range(batch):
        position = torch.arange(rows) + (int(start[b]) if by_batch else start)
        document = torch.zeros(rows, dtype=torch.int64)
        for number, (low, last) in enumerate(pairwise(edges)):
            position[low:last], document[low:last] = position[low:last] - low, number
        block, mine = position // content.block_size, slice(rows - queries, rows)
        exists = (document == document[mine, None]) & (position >= 0) & (position[mine, None] >= 0)
        chooser = torch.arange(queries)
        if case.is_causal:
            exists &= position <= position[mine, None]
        else:  # the first row of a block chooses for all of them
            chooser = (exists[:, mine] & (block[mine, None] == block[mine])).int().argmax(1)
        around = (block[mine, None] - block).abs() <= content.always_local
        shown = around | (block < content.always_first)
        for column in range(content.keep):
            shown = shown | (selection[b][:, chooser, column, None] == block)
        shown = shown & exists
        counts[b] = (counts[b] > 0) | (shown if mask is None else shown & ~mask[b])
    return counts


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    hidden: Tensor | None = None,
) -> AttentionOutput:
    """Attention over a dense multiset of pairs, differentiable, in the dtype of its inputs."""
    acc = torch.promote_types(query.dtype, torch.float32)
    (batch, queries, heads, dim), rows = query.shape, key.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    if hidden is not None:
        key, value = (t.masked_fill(hidden[:, :, None, None], 0) for t in (key, value))
    q = query.transpose(1, 2)
    k, v = (t.transpose(1, 2).repeat_interleave(heads // key.shape[2], 1) for t in (key, value))
    scores = (q @ k.mT).to(acc) * scale
    shown = counts > 0
    logits = scores + torch.where(shown, counts, 1).to(acc).log()
    empty = ~shown.any(-1)
    logits = logits.masked_fill(~shown, -torch.inf).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse[..., None]).masked_fill(empty[..., None] | ~shown, 0.0)
    if dropout_p:
        assert seed is not None
        index = torch.arange(batch * heads).view(batch, heads)
        keep = keep_mask(
            seed, dropout_p, branch=0, batch_heads=index, query_rows=torch.arange(rows - queries, rows),
            key_rows=torch.arange(rows),
        )  # fmt: skip
        p = p * keep.to(acc) / (1 - dropout_p)
    out = (p.to(v.dtype) @ v).transpose(1, 2)
    return AttentionOutput(out, lse.masked_fill(empty, -torch.inf))


def summands(
    tensors: Sequence[Tensor], gold: dict[str, Tensor], counts: Tensor, case: SparseCase, *, hidden: Tensor | None
) -> dict[str, float]:
    """How large the terms are whose sums give each result: see `testing.largest_summands`, here of any pairs."""
    query, key, value, grad_out, grad_of_lse = tensors
    group, scale = query.shape[2] // key.shape[2], 1 / math.sqrt(query.shape[3]) if case.scale is None else case.scale
    if hidden is not None:
        key, value = (t.masked_fill(hidden[:, :, None, None], 0) for t in (key, value))
    q, do, o = (t.transpose(1, 2) for t in (query, grad_out, gold["out"]))
    k, v = (t.transpose(1, 2).repeat_interleave(group, 1) for t in (key, value))
    lse, d_lse = gold["lse"].nan_to_num(neginf=0.0)[..., None], grad_of_lse[..., None] * case.grad_lse
    p = torch.exp((q @ k.mT * scale).masked_fill(counts == 0, -torch.inf) - lse) * counts / (1 - case.dropout_p)
    scores = q.abs() @ k.abs().mT * abs(scale) * (counts > 0)
    p_noise = p * (scores + lse.abs()).clamp(min=1)
    terms = do.abs() @ v.abs().mT + (do.abs() * o.abs()).sum(-1, keepdim=True) + d_lse.abs()
    difference = do @ v.mT - (do * o).sum(-1, keepdim=True) + d_lse
    ds = (p * terms + p_noise * difference.abs()) * abs(scale)
    factors = {"out": (p_noise, v), "dq": (ds, k), "dk": (ds.mT, q), "dv": (p_noise.mT, do)}
    sizes = {name: float((weight * rows.abs().amax(-1).unsqueeze(2)).max()) for name, (weight, rows) in factors.items()}
    return sizes | {"lse": float(scores.max())}


def sparse_violations(
    case: SparseCase,
    backends: Sequence[str],
    *,
    device: str = "cpu",
    counts: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> list[str]:
    """Where results of ``backends`` leave bound B of the dense oracle; empty when all is well.

    ``counts`` gives the multiset of pairs of a pattern that looks at the tensors.
    """
    tensors, options = case.tensors(), case.sparse_options()
    heads, queries = case.kv_heads * case.group, case.query_rows or case.key_rows
    where: dict[str, Any] = {name: options.get(name) for name in ("key_padding_mask", "cu_seqlens")}
    where |= {"is_causal": case.is_causal, "key_start": options["key_start"]}
    found_counts = (
        multiset(case.pattern, heads, case.batch, case.key_rows, queries, **where)
        if counts is None
        else counts(tensors)
    )
    manual_seed = torch.default_generator.manual_seed if device == "cpu" else torch.cuda.manual_seed
    manual_seed(case.seed)
    seed = int(torch.randint(2**62, (1,), device=device)) if case.dropout_p else None
    oracle = partial(
        dense, counts=found_counts, scale=case.scale, dropout_p=case.dropout_p, seed=seed,
        hidden=options.get("key_padding_mask"),
    )  # fmt: skip
    exact = [t.double() for t in tensors]
    gold, eager = (results(oracle, inputs, grad_lse=case.grad_lse) for inputs in (exact, tensors))
    dtypes = {name: torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype for name in gold}
    found = []
    moved = {name: t.to(device) if name == "key_padding_mask" else t for name, t in options.items()}
    for backend in backends:
        manual_seed(case.seed)
        attend = partial(sparse_attention_with_lse, pattern=case.pattern, backend=backend, **moved)
        got = results(attend, case.tensors(device), grad_lse=case.grad_lse)
        for name, actual in got.items():
            bound = max(error_bound(gold[name], eager[name], dtypes[name]), least_bound(name, case.dtype, device))
            error = max_error(actual.cpu(), gold[name])
            if not error <= bound:
                terms = summands(exact, gold, found_counts, case, hidden=options.get("key_padding_mask"))
                bound = error_bound(gold[name], eager[name], dtypes[name], summand=terms[name])
            if not (error <= bound < math.inf and actual.dtype == dtypes[name]):
                found.append(f"{name} ({actual.dtype}) of {backend}: error {error:.3g}, bound {bound:.3g}, {case}")
    return found
