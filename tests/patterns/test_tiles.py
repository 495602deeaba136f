"""The cell table: every row once, cells inside one segment, and strides that waste the fewest blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.patterns import DilatedPattern
from dilated_attention_pytorch.patterns.tiles import CELL_FIELDS, branch_groups, cells, class_stride, part_of
from dilated_attention_pytorch.types import Document, Shape

LONGNET = DilatedPattern((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
GIGAPATH = DilatedPattern((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))


@st.composite
def layouts(draw):
    rows = draw(st.integers(1, 60))
    queries = draw(st.integers(1, rows))
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=3)))
    documents, row = [], 0
    for stop in (*cuts, rows):
        if stop > row:
            position = draw(st.integers(0, 50))
            documents.append(Document(0, 3, row, stop - row, position, position + stop - row))
        row = stop
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    rates = [draw(st.integers(1, min(6, w))) for w in lengths]
    pattern = DilatedPattern(tuple(lengths), tuple(rates))
    return pattern, Shape(3, queries, rows, 2, 1, 8, 8), tuple(documents), draw(st.integers(1, 50))


@settings(max_examples=200, deadline=None)
@given(layouts(), st.sampled_from(["query", "key"]))
def test_every_row_once_and_its_keys_where_they_are(layout, side):
    pattern, shape, documents, span = layout
    shift = shape.query_rows - shape.key_rows
    seen = set()
    shortest = min(pattern.segment_lengths)
    for entry in cells(pattern, shape, documents, span, side):
        cell = dict(zip(CELL_FIELDS, map(int, entry), strict=True))
        assert 1 <= cell["rows"] <= span
        assert cell["position"] // shortest == (cell["position"] + cell["rows"] - 1) // shortest
        for i in range(cell["rows"]):
            key_row = cell["row"] + i - (shift if side == "query" else 0)
            own = [d for d in documents if d.row <= key_row < d.row + d.rows]
            assert cell["position"] + i == own[0].position + key_row - own[0].row
            assert (cell["batch"], key_row) not in seen
            seen.add((cell["batch"], key_row))
            begin, end = own[0].position, own[0].position + own[0].rows
            other0 = own[0].row - own[0].position
            if side == "key":
                begin, other0 = max(begin, begin - own[0].row - shift), other0 + shift
            assert (cell["other_row0"], cell["begin"], cell["end"]) == (other0, begin, end)
    asked = [d for d in documents if d.row + d.rows + shift > 0]
    first = -shift if side == "query" else 0
    assert seen == {(b, r) for d in asked for b in range(3) for r in range(max(d.row, first), d.row + d.rows)}


@pytest.mark.parametrize(
    ("pattern", "block", "longest", "stride"),
    [
        (LONGNET, 128, 131072, 16),
        (LONGNET, 128, 2048, 16),
        (GIGAPATH, 128, 65536, 8),
        (GIGAPATH, 64, 65536, 16),
        (DilatedPattern((512,), (1,)), 128, 10_000, 1),
        (DilatedPattern((7, 30), (3, 5)), 16, 1000, 1),  # one tile holds all 7 rows, whatever their class
    ],
)
def test_strides(pattern, block, longest, stride):
    assert class_stride(pattern, block, longest) == stride


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=4), st.data(), st.sampled_from([16, 128]), st.integers(1, 500)
)
def test_a_stride_divides_the_common_multiple_of_the_rates(lengths, data, block, longest):
    rates = [data.draw(st.integers(1, min(12, w))) for w in lengths]
    stride = class_stride(DilatedPattern(tuple(lengths), tuple(rates)), block, longest)
    assert 1 <= stride <= min(longest, *lengths)
    assert math.lcm(*rates) % stride == 0


@pytest.mark.parametrize(
    ("pattern", "longest", "is_causal", "groups"),
    [
        (LONGNET, 131072, False, ((0, 1, 2, 3, 4),)),
        (LONGNET, 32768, True, ((0, 1), (2,), (3, 4))),
        (LONGNET, 2048, True, ((0, 1), (2, 3, 4))),  # launches weigh more where there are few rows
        (GIGAPATH, 65536, False, ((0, 1), (2, 3, 4))),  # 1,024 rows are too few for a stride of 16
        (DilatedPattern((512,), (1,)), 10_000, True, ((0,),)),
    ],
)
def test_groups(pattern, longest, is_causal, groups):
    assert branch_groups(pattern, 128, longest, is_causal=is_causal) == groups


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9)), min_size=1, max_size=5), st.booleans())
def test_every_branch_is_in_one_group(branches, is_causal):
    pattern = DilatedPattern(tuple(max(w, r) for w, r in branches), tuple(r for _, r in branches))
    groups = branch_groups(pattern, 16, 400, is_causal=is_causal)
    assert sorted(i for group in groups for i in group) == list(range(len(branches)))
    for group in groups:
        assert part_of(pattern, group).branches == tuple(pattern.branches[i] for i in group)


def test_no_rows_no_cells_and_rows_beyond_32_bits_are_refused():
    shape = Shape(1, 4, 4, 1, 1, 8, 8)
    empty = cells(LONGNET, shape, (), 16, "query")
    assert empty.shape == (0, len(CELL_FIELDS))
    assert empty.dtype == np.int32
    far = Document(0, 1, 0, 4, 2**31, 2**31 + 4)
    with pytest.raises(ValueError, match="32 bits"):
        cells(LONGNET, shape, (far,), 16, "query")
