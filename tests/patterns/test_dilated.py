"""Patterns validate themselves, place heads as LongNet's two formulas do, and choose segments for a length."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.types import Branch


@pytest.mark.parametrize(
    ("arguments", "given_and_allowed"),
    [
        (
            ((16, 32, 64), (1, 2)),
            ["dilation_rates has 2 entries", "segment_lengths has 3", "one rate a segment length"],
        ),
        (((16,), (1, 2)), ["segment_lengths has 1 entry", "dilation_rates has 2"]),
        (((), ()), ["segment_lengths is empty", "at least one branch"]),
        (((16,), ()), ["dilation_rates is empty", "at least one branch"]),
        (((16, 0), (1, 1)), ["segment_lengths has 0", "at least 1"]),
        (((16, -4), (1, 1)), ["segment_lengths has -4", "at least 1"]),
        (((16,), (0,)), ["dilation_rates has 0", "at least 1"]),
        (((16, 32), (1, -2)), ["dilation_rates has -2", "at least 1"]),
        (((16, 32), (1, 33)), ["dilation rate 33", "segment length 32", "1 to the segment length"]),
        (((16.0,), (1,)), ["segment_lengths has 16.0", "float", "integers"]),
        (((16,), (True,)), ["dilation_rates has True", "bool", "integers"]),
        ((16, 1), ["segment_lengths is 16", "list or tuple"]),
        (("16", (1,)), ["segment_lengths is '16'", "list or tuple"]),
        (((16,), (1,), "spaced"), ["head_offsets is 'spaced'", "'contiguous'", "'interleaved'"]),
        (((16,), (1,), None), ["head_offsets is None", "'contiguous'"]),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_pattern_says_what_was_given_and_what_is_allowed(arguments, given_and_allowed):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the fragments are checked below
        DilatedPattern(*arguments)
    for fragment in given_and_allowed:
        assert fragment in str(caught.value)


def test_a_pattern_is_a_frozen_value():
    pattern = DilatedPattern([16, 32], [1, 2])
    assert pattern == DilatedPattern((16, 32), (1, 2))
    assert hash(pattern) == hash(DilatedPattern((16, 32), (1, 2)))
    assert pattern != DilatedPattern((16, 32), (1, 2), "interleaved")
    assert pattern.branches == (Branch(16, 1), Branch(32, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.segment_lengths = (1, 2)


@pytest.mark.parametrize(
    ("head_offsets", "heads", "rate", "offsets"),
    [
        ("contiguous", 4, 2, [0, 0, 1, 1]),
        ("contiguous", 4, 4, [0, 1, 2, 3]),
        ("contiguous", 6, 4, [0, 0, 1, 1, 2, 2]),
        ("contiguous", 5, 3, [0, 0, 1, 1, 2]),
        ("contiguous", 2, 8, [0, 1]),
        ("contiguous", 3, 1, [0, 0, 0]),
        ("interleaved", 4, 2, [0, 1, 0, 1]),
        ("interleaved", 5, 3, [0, 1, 2, 0, 1]),
        ("interleaved", 2, 8, [0, 1]),
    ],
)
def test_offsets_of_heads(head_offsets, heads, rate, offsets):
    pattern = DilatedPattern((8,), (rate,), head_offsets)
    assert [pattern.head_offset(head, rate, heads) for head in range(heads)] == offsets


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(("contiguous", "interleaved")))
def test_every_offset_is_a_residue(heads, rate, head_offsets):
    pattern = DilatedPattern((rate,), (rate,), head_offsets)
    offsets = [pattern.head_offset(head, rate, heads) for head in range(heads)]
    assert min(offsets) == 0
    assert max(offsets) < rate
    if heads % rate == 0:
        assert sorted(offsets) == sorted(list(range(rate)) * (heads // rate))


def test_the_patterns_of_the_papers():
    longnet = DilatedPattern.geometric(32768)
    assert longnet.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert longnet.dilation_rates == (1, 2, 4, 8, 16)
    # Prov-GigaPath's slide encoder: np.linspace(10, 20, 5) as exponents of 2, for a million tokens.
    gigapath = DilatedPattern.geometric(2**20, rule="gigapath")
    assert gigapath.segment_lengths == (1024, 5792, 32768, 185363, 1048576)
    assert gigapath.dilation_rates == (1, 2, 4, 8, 16)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.integers(1, 2**22),
    st.sampled_from(("longnet", "gigapath")),
    st.none() | st.integers(1, 5000),
    st.integers(2, 5),
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 20),
)
def test_geometric_patterns_are_valid_and_grow(seq_len, rule, first_segment, ratio, num_branches, max_rate):
    pattern = DilatedPattern.geometric(
        seq_len, rule=rule, first_segment=first_segment, ratio=ratio, num_branches=num_branches, max_rate=max_rate
    )
    lengths, rates = pattern.segment_lengths, pattern.dilation_rates
    assert list(lengths) == sorted(lengths)
    assert list(rates) == sorted(rates)
    assert rates[0] == 1
    assert max(rates) <= (max_rate or max(rates))
    if num_branches:
        assert len(lengths) == num_branches
    if rule == "longnet":
        assert all(b == a * ratio for a, b in pairwise(lengths))
        if num_branches is None:
            assert lengths[-1] >= seq_len
            assert len(lengths) == 1 or lengths[-2] < seq_len
    else:
        assert max(lengths) <= seq_len


@pytest.mark.parametrize(
    ("arguments", "given_and_allowed"),
    [
        ({"seq_len": 0}, ["seq_len is 0", "at least 1"]),
        ({"seq_len": 4096.0}, ["seq_len is 4096.0", "integer"]),
        ({"seq_len": 4096, "first_segment": -1}, ["first_segment is -1", "at least 1"]),
        ({"seq_len": 4096, "num_branches": 0}, ["num_branches is 0", "at least 1"]),
        ({"seq_len": 4096, "max_rate": 0}, ["max_rate is 0", "at least 1"]),
        ({"seq_len": 4096, "ratio": 1}, ["ratio is 1", "at least 2"]),
        ({"seq_len": 4096, "rule": "linear"}, ["rule is 'linear'", "'longnet'", "'gigapath'"]),
    ],
    ids=str,
)
def test_a_wrong_rule_says_what_was_given_and_what_is_allowed(arguments, given_and_allowed):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the fragments are checked below
        DilatedPattern.geometric(**arguments)
    for fragment in given_and_allowed:
        assert fragment in str(caught.value)
