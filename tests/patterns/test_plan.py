"""Plans: every (row, head, branch) once, the right pairs, as few calls as the views allow, and no copies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.backends.views import key_view, query_view
from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.patterns.plan import affine_runs, count_active, plan, segment_groups
from dilated_attention_pytorch.testing import multiplicity
from dilated_attention_pytorch.types import Document, Shape


def enumerate_pairs(made):
    """(branch, batch, query row, head) -> sorted key rows, and the same triple -> zero keys, from a plan's calls."""
    pairs, zeros = {}, Counter()
    for c in made.calls:
        for i in range(c.outer):
            for j in range(c.inner):
                step = i * c.outer_row + j * c.inner_row
                batch, head = c.batch + i * c.outer_batch, c.head + j * c.inner_head
                first_query, first_key = c.query_row + step, c.key_row + step
                assert c.kv_head + j * c.inner_kv_head == head * made.shape.kv_heads // made.shape.heads
                # A folded outer axis runs over the rows of all batch entries.
                batch, first_query = batch + first_query // made.shape.query_rows, first_query % made.shape.query_rows
                first_key %= made.shape.key_rows
                for a in range(c.query_len):
                    keys = range(a + 1 if c.is_causal else c.key_len)
                    place = (c.branch, batch, first_query + a * c.dilation_rate, head)
                    rows = [first_key + b * c.dilation_rate for b in keys]
                    assert not set(rows) & set(pairs.get(place, ()))
                    pairs[place] = sorted([*pairs.get(place, ()), *rows])
                    zeros[place] += c.zero_keys
    return pairs, zeros


@st.composite
def problems(draw):
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    rows = integer(1, 60)
    kv_heads = integer(1, 3)
    shape = Shape(integer(1, 3), integer(1, rows), rows, kv_heads * integer(1, 3), kv_heads, 8, 8)
    count = integer(1, 3)
    lengths = tuple(integer(1, 70) for _ in range(count))
    rates = tuple(integer(1, min(w, 9)) for w in lengths)
    pattern = DilatedPattern(lengths, rates, draw(st.sampled_from(["contiguous", "interleaved"])))
    start = integer(-rows + 1, 80)
    return pattern, shape, start, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=150, deadline=None, database=None)
@given(problems())
def test_calls_enumerate_the_definition(problem):
    pattern, shape, start, is_causal, fold = problem
    skip = max(0, -start)
    document = Document(0, shape.batch, skip, shape.key_rows - skip, start + skip, start + shape.key_rows)
    made = plan(pattern, shape, (document,), is_causal=is_causal, zeros=False, fold=fold)
    position = torch.arange(shape.key_rows) + start
    allowed = multiplicity(
        pattern, shape.heads, position, torch.zeros_like(position), shape.query_rows, is_causal=is_causal
    )
    pairs, zeros = enumerate_pairs(made)
    assert not any(zeros.values())
    expected = {
        (i, b, q, h): allowed[i, h, q].nonzero()[:, 0].tolist()
        for i in range(len(pattern.branches))
        for b in range(shape.batch)
        for q in range(shape.query_rows)
        for h in range(shape.heads)
        if allowed[i, h, q].any()
    }
    assert pairs == expected
    assert made.pairs == sum(map(len, expected.values()))
    if made.covers_first:
        first = Counter()
        for call in made.calls[: made.covers_first]:
            first[call.branch] += call.rows
        assert list(first.values()) == [shape.batch * shape.query_rows * shape.heads]


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 16])
@pytest.mark.parametrize("rate", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("head_offsets", ["contiguous", "interleaved"])
def test_a_dividing_branch_takes_as_few_calls_as_offsets_or_heads_of_one(heads, rate, batch, head_offsets):
    shape = Shape(batch, 256, 256, heads, heads, 8, 8)
    document = Document(0, batch, 0, 256, 0, 256)
    made = plan(DilatedPattern((64,), (rate,), head_offsets), shape, (document,), is_causal=True, zeros=True)
    used = len({h // -(-heads // rate) if head_offsets == "contiguous" else h % rate for h in range(heads)})
    if heads % rate == 0 or rate % heads == 0:
        assert len(made.calls) == min(used, -(-heads // rate))
    assert sum(call.rows for call in made.calls) == batch * 256 * heads // rate if heads >= rate else True


def test_views_share_the_memory_of_the_tensors():
    shape = Shape(2, 96, 96, 8, 4, 16, 16)
    document = Document(0, 2, 0, 96, 0, 96)
    made = plan(DilatedPattern((20, 48, 96), (1, 3, 8)), shape, (document,), is_causal=False, zeros=False)
    query, key = torch.randn(2, 96, 8, 16), torch.randn(2, 96, 4, 16)
    for call in made.calls:
        for view, tensor, length in ((query_view, query, call.query_len), (key_view, key, call.key_len)):
            found = view(tensor, call)
            assert found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            assert found.shape == (call.outer, call.inner, length, 16)


def test_plans_of_long_sequences_are_short():
    shape = Shape(1, 1 << 20, 1 << 20, 16, 16, 128, 128)
    document = Document(0, 1, 0, 1 << 20, 0, 1 << 20)
    pattern = DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
    made = plan(pattern, shape, (document,), is_causal=False, zeros=False)
    assert len(made.calls) == 1 + 2 + 4 + 2 + 1


@settings(max_examples=200, database=None)
@given(st.integers(1, 30), st.sets(st.integers(0, 200), min_size=2, max_size=4))
def test_segment_groups_partition_at_the_marks(length, marks):
    marks = tuple(sorted(marks))
    groups = list(segment_groups(length, marks))
    segments = [s for first, count in groups for s in range(first, first + count)]
    assert segments == list(range(marks[0] // length, -(-marks[-1] // length)))
    for first, count in groups:
        inside = [m for m in marks if first * length < m < (first + count) * length and m % length]
        assert count == 1 or not inside


@settings(max_examples=200, database=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_count_active(low, high, rate):
    for residue in range(rate):
        assert count_active(low, high, residue, rate) == sum(p % rate == residue for p in range(low, high))


def test_affine_runs_never_step_down():
    from dilated_attention_pytorch.patterns.plan import _Item

    items = [_Item(h, h, row, row, 2, 2, 0) for h, row in enumerate([5, 6, 7, 3, 4, 9])]
    runs = affine_runs(items)
    assert [(run.first.key_row, run.step[2], run.length) for run in runs] == [(5, 1, 3), (3, 1, 2), (9, 0, 1)]
