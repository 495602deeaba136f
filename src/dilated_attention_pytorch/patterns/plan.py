"""Translate a dilated pattern into fused calls on affine views: integers in, integers out.

A branch at one head offset is an affine view of the original tensors (no gather, no padding, no scatter). Two ways to
put heads into one call exist: all heads of one offset, which share their rows, or one head of every offset, whose
rows start one apart. Whatever has unequal row counts (a short tail, a rate that does not divide its segment) or is
not affine (grouped key/value heads) falls into runs of its own; the order of heads that gives fewest runs wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ..types import Branch, Call, Document, Plan, Shape
from .dilated import DilatedPattern


class _Item(NamedTuple):
    """One head's share of one segment: its first rows, its lengths, its zero keys."""

    head: int
    kv_head: int
    query_row: int
    key_row: int
    query_len: int
    key_len: int
    zero_keys: int


class _Run(NamedTuple):
    """Items that one affine view holds: the first, the step to the next (head, kv head, row), and how many."""

    first: _Item
    step: tuple[int, int, int]
    length: int


def segment_groups(segment_length: int, marks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first segment, count) groups from the first to the last of the sorted positions ``marks``.

    A segment that a mark cuts is a group of its own; segments that no mark cuts are alike and share one.
    """
    segment = marks[0] // segment_length
    for mark in marks:
        whole, cut = divmod(mark, segment_length)
        if segment < whole:
            yield segment, whole - segment
            segment = whole
        if cut and segment == whole:
            yield segment, 1
            segment += 1


def count_active(low: int, high: int, residue: int, rate: int) -> int:
    """How many positions p with low <= p < high have p % rate == residue."""
    return max(0, -((low + (residue - low) % rate - high) // rate))


def affine_runs(items: list[_Item]) -> list[_Run]:
    """Cut ``items``, in the order given, into affine runs with steps that a strided view can take, greedily."""
    runs: list[_Run] = []
    for item in items:
        if runs:
            first, step, length = runs[-1]
            last_head, last_kv, last_row = (
                first.head + step[0] * (length - 1),
                first.kv_head + step[1] * (length - 1),
                first.key_row + step[2] * (length - 1),
            )
            delta = (item.head - last_head, item.kv_head - last_kv, item.key_row - last_row)
            # query_row - key_row is one constant for the whole plan, so equal key steps are equal query steps.
            if first[4:] == item[4:] and min(delta) >= 0 and (length == 1 or delta == step):
                runs[-1] = _Run(first, delta, length + 1)
                continue
        runs.append(_Run(item, (0, 0, 0), 1))
    return runs


def _head_orders(pattern: DilatedPattern, rate: int, shape: Shape) -> list[list[int]]:
    """Orders of the heads worth trying: by offset, or one head of every offset after the other."""
    heads = range(shape.heads)
    offset = [pattern.head_offset(h, rate, shape.heads) for h in heads]
    rank: list[int] = []  # how many earlier heads share the offset
    seen: dict[int, int] = {}
    for h in heads:
        rank.append(seen.get(offset[h], 0))
        seen[offset[h]] = rank[h] + 1
    group = shape.heads // shape.kv_heads
    orders = [sorted(heads, key=lambda h: (offset[h], h)), sorted(heads, key=lambda h: (rank[h], offset[h]))]
    if group > 1:
        orders.append(sorted(heads, key=lambda h: (offset[h], h % group, h)))
    return orders


def _group_calls(
    pattern: DilatedPattern,
    index: int,
    document: Document,
    shape: Shape,
    segment: int,
    count: int,
    *,
    is_causal: bool,
    zeros: bool,
    fold: bool,
) -> Iterator[Call]:
    """The calls of ``count`` alike segments of one branch in one document."""
    branch = pattern.branches[index]
    w, r = branch.segment_length, branch.dilation_rate
    to_row = document.row - document.position
    shift = shape.query_rows - shape.key_rows  # key row -> query row
    end = document.position + document.rows
    first_query = max(document.position, -shift - to_row)
    low, high = segment * w, min((segment + 1) * w, end)
    key_low, query_low = max(low, document.position), max(low, first_query)

    def item(head: int) -> _Item:
        residue = (low + pattern.head_offset(head, r, shape.heads)) % r
        key = key_low + (residue - key_low) % r
        query = query_low + (residue - query_low) % r
        missing = 0
        if zeros and low < document.length:
            real = count_active(low, min(low + w, document.length), residue, r)
            missing = -(-min(w, document.length) // r) - real
        return _Item(
            head,
            head * shape.kv_heads // shape.heads,
            query + to_row + shift,
            key + to_row,
            count_active(query_low, high, residue, r),
            count_active(key_low, high, residue, r),
            missing,
        )

    orders = [[i for i in map(item, order) if i.query_len] for order in _head_orders(pattern, r, shape)]
    runs = min((affine_runs(order) for order in orders), key=len)
    # One more axis of the view holds the segments, or the batch, or both where they are one affine axis. A segment
    # step that is no multiple of the rate shifts the residues from segment to segment, but the rows stay affine:
    # offsets count from the segment's start.
    batches, segments = document.batches, count
    if fold and batches > 1 and segments * w == shape.key_rows == shape.query_rows:
        outers = [(document.batch, 0, batches * segments, 0, w)]
    elif batches >= segments:
        outers = [(document.batch, s * w, batches, 1, 0) for s in range(segments)]
    else:
        outers = [(document.batch + b, 0, segments, 0, w) for b in range(batches)]
    for batch, row, outer, outer_batch, outer_row in outers:
        for first, step, inner in runs:
            shared: dict[str, int] = {
                "branch": index,
                "dilation_rate": r,
                "query_len": first.query_len,
                "outer": outer,
                "outer_batch": outer_batch,
                "outer_row": outer_row,
                "inner": inner,
                "inner_head": step[0],
                "inner_kv_head": step[1],
                "inner_row": step[2],
                "batch": batch,
                "query_row": first.query_row + row,
                "head": first.head,
                "kv_head": first.kv_head,
            }
            key_row, past = first.key_row + row, first.key_len - first.query_len
            if not is_causal or first.query_len == 1:  # a query that is the last row sees every key
                yield Call(
                    **shared,
                    key_row=key_row,
                    key_len=first.key_len,
                    is_causal=False,
                    zero_keys=first.zero_keys,
                )
                continue
            if past:  # fused kernels align causal masks at the top left: all older keys, then a square
                yield Call(**shared, key_row=key_row, key_len=past, is_causal=False, zero_keys=0)
            yield Call(**shared, key_row=key_row + past * r, key_len=first.query_len, is_causal=True, zero_keys=0)


@lru_cache(maxsize=256)
def plan(
    pattern: DilatedPattern,
    shape: Shape,
    documents: tuple[Document, ...],
    *,
    is_causal: bool,
    zeros: bool,
    fold: bool = True,
) -> Plan:
    """Plan ``pattern`` on ``documents``.

    ``zeros`` counts the zero keys of ``padding="zeros"`` (never when causal: they would lie in the future). ``fold``
    lets batch and segments share one axis of a view, which needs the batch stride to be N row strides. Branches come
    with the smallest rate first, so that a branch that covers every row can start the output.
    """
    zeros = zeros and not is_causal
    order = sorted(range(len(pattern.branches)), key=lambda i: pattern.branches[i].dilation_rate)
    calls: list[Call] = []
    for index in order:
        for document in documents:
            first_query = max(document.position, document.position + shape.key_rows - shape.query_rows - document.row)
            end = document.position + document.rows
            if first_query >= end:
                continue
            marks = {first_query, end}
            if zeros and first_query < document.length < end:
                marks.add(document.length)
            for segment, count in segment_groups(pattern.branches[index].segment_length, tuple(sorted(marks))):
                calls += _group_calls(
                    pattern,
                    index,
                    document,
                    shape,
                    segment,
                    count,
                    is_causal=is_causal,
                    zeros=zeros,
                    fold=fold,
                )
    return Plan(shape, tuple(calls))


def branch_only(pattern: DilatedPattern, index: int) -> DilatedPattern:
    """The pattern that consists of one branch of ``pattern``."""
    branch: Branch = pattern.branches[index]
    return replace(pattern, segment_lengths=(branch.segment_length,), dilation_rates=(branch.dilation_rate,))
