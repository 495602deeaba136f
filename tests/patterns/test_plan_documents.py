"""Plans of packed, padded and evicted documents, pair by pair, against the definition and nothing of the library."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.backends.documents import read_documents
from dilated_attention_pytorch.backends.views import key_view, query_view
from dilated_attention_pytorch.patterns.plan import plan
from dilated_attention_pytorch.types import Call, Plan, Shape


def make(
    pattern, shape: Shape, *, key_start=0, cuts=None, masked=None, is_causal=False, zeros=False, fold=False
) -> Plan:
    """The plan of documents given by integers; ``masked`` rows end each batch row."""
    suffix = None
    if masked is not None:
        suffix = torch.arange(shape.key_rows) >= shape.key_rows - torch.tensor(masked)[:, None]
    documents = read_documents(
        shape,
        key_start=0 if isinstance(key_start, tuple) else key_start,
        key_starts=torch.tensor(key_start) if isinstance(key_start, tuple) else None,
        cu_seqlens=None if cuts is None else torch.tensor([0, *cuts, shape.key_rows]),
        suffix_mask=suffix,
    )
    return plan(pattern, shape, documents, is_causal=is_causal, zeros=zeros, fold=fold)


def rows_of(call: Call, shape: Shape):
    """(batch, head, kv head, query rows, key rows) of every problem of a call; folded segments run into the batch."""
    for i, j in product(range(call.outer), range(call.inner)):
        shift, r = i * call.outer_row + j * call.inner_row, call.dilation_rate
        more, query = divmod(call.query_row + shift, shape.query_rows)
        key = (call.key_row + shift) % shape.key_rows
        yield (
            call.batch + i * call.outer_batch + more,
            call.head + j * call.inner_head,
            call.kv_head + j * call.inner_kv_head,
            range(query, query + r * call.query_len, r),
            range(key, key + r * call.key_len, r),
        )


def offset_of(pattern: DilatedPattern, head: int, heads: int, rate: int) -> int:
    return head // -(-heads // rate) if pattern.head_offsets == "contiguous" else head % rate


@st.composite
def problems(draw: st.DrawFn):
    def integer(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    rows, packed, kv_heads = integer(1, 26), draw(st.booleans()), integer(1, 4)
    batch = 1 if packed else integer(1, 3)
    shape = Shape(batch, integer(1, rows), rows, kv_heads * integer(1, 3), kv_heads, 8, 8)
    lengths = tuple(integer(1, 30) for _ in range(integer(1, 3)))
    rates = tuple(integer(1, min(length, 7)) for length in lengths)
    pattern = DilatedPattern(lengths, rates, draw(st.sampled_from(("contiguous", "interleaved"))))
    if packed:
        return pattern, shape, {"cuts": tuple(sorted(integer(0, rows) for _ in range(integer(0, 3))))}
    starts = (0, integer(-rows, 40), tuple(integer(-rows, 9) for _ in range(batch)))
    return pattern, shape, {"key_start": draw(st.sampled_from(starts))}


def places(shape: Shape, options) -> list[tuple[int, int, int, int, int]]:
    """(batch, document, key row, position, length of the document) of every key row that lies in a document."""
    found, start = [], options.get("key_start", 0)
    for b in range(shape.batch):
        begin = start[b] if isinstance(start, tuple) else start
        for index, (first, last) in enumerate(pairwise([0, *options.get("cuts", ()), shape.key_rows])):
            rows = range(first, last)
            found += [(b, index, n, n - first + begin, last - first + begin) for n in rows if n - first + begin >= 0]
    return found


@settings(max_examples=120, deadline=None, database=None)
@given(problem=problems(), is_causal=st.booleans(), fold=st.booleans())
def test_calls_hold_every_pair_of_the_definition_once(problem, is_causal, fold):
    pattern, shape, options = problem
    found: Counter = Counter()
    made = make(pattern, shape, is_causal=is_causal, fold=fold, **options)
    for call in made.calls:
        for *place, queries, keys in rows_of(call, shape):
            for (n, query), (m, key) in product(enumerate(queries), enumerate(keys)):
                if not call.is_causal or m <= n:
                    found[call.branch, *place, query, key] += 1
    expected: Counter = Counter()
    shift, where = shape.key_rows - shape.query_rows, places(shape, options)
    for (i, branch), h in product(enumerate(pattern.branches), range(shape.heads)):
        w, r = branch.segment_length, branch.dilation_rate
        offset = offset_of(pattern, h, shape.heads, r)
        active = [place for place in where if place[3] % w % r == offset]
        for (b, document, query, n, _), (c, other, key, m, _) in product(active, active):
            if (b, document, n // w) == (c, other, m // w) and query >= shift and (m <= n or not is_causal):
                expected[i, b, h, h * shape.kv_heads // shape.heads, query - shift, key] += 1
    assert found == expected
    assert made.pairs == expected.total()


@settings(max_examples=120, deadline=None, database=None)
@given(problem=problems(), data=st.data())
def test_zero_keys_are_the_slots_that_padding_fills(problem, data):
    pattern, shape, options = problem
    masked = (0,) * shape.batch
    if "cuts" not in options:
        masked = tuple(data.draw(st.integers(0, shape.key_rows)) for _ in range(shape.batch))
    made = make(pattern, shape, zeros=True, masked=None if "cuts" in options else masked, **options)
    found: Counter = Counter()
    for call in made.calls:
        for b, h, _, queries, _ in rows_of(call, shape):
            found.update({(call.branch, b, h, row): call.zero_keys for row in queries})
    expected: Counter = Counter()
    shift = shape.key_rows - shape.query_rows
    for b, _, row, n, length in places(shape, options):
        for (i, branch), h in product(enumerate(pattern.branches), range(shape.heads)):
            w, r, real = branch.segment_length, branch.dilation_rate, length - masked[b]
            offset, low = offset_of(pattern, h, shape.heads, r), n // w * w
            if row >= shift and n % w % r == offset and low < real:
                # torchscale cuts the real rows into segments of w' and fills each to a multiple of the rate.
                slots = range(offset, -(-min(w, real) // r) * r, r)
                expected[i, b, h, row - shift] += sum(t >= min(w, real) or low + t >= real for t in slots)
    assert +found == +expected


@settings(max_examples=60, deadline=None, database=None)
@given(problem=problems(), fold=st.booleans())
def test_views_show_the_rows_of_their_problems(problem, fold):
    pattern, shape, options = problem
    query = torch.arange(shape.batch * shape.query_rows * shape.heads).view(shape.batch, -1, shape.heads, 1)
    key = torch.arange(shape.batch * shape.key_rows * shape.kv_heads).view(shape.batch, -1, shape.kv_heads, 1)
    for call in make(pattern, shape, fold=fold, **options).calls:
        shown = query_view(query, call).flatten(0, 1).squeeze(-1), key_view(key, call).flatten(0, 1).squeeze(-1)
        for q, k, (b, h, g, queries, keys) in zip(*shown, rows_of(call, shape), strict=True):
            # Where batch and segments share an axis, rows beyond the last one are those of the next batch entry.
            assert q.tolist() == [int(query[b, row, h, 0]) for row in queries]
            assert k.tolist() == [int(key[b, row, g, 0]) for row in keys]
