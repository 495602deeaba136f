"""Size classes: bounded waste, few classes, order kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch.memory import Bucketing


@settings(max_examples=60, deadline=None, database=None)
@given(size=st.integers(1, 1 << 50), more=st.integers(0, 1 << 20), waste=st.sampled_from([0.25, 0.2, 0.125, 0.01]))
def test_waste_is_bounded_and_order_is_kept(size: int, more: int, waste: float):
    classes = Bucketing(max_waste=waste)
    found = classes.size(size)
    assert size <= found <= size * (1 + waste)
    assert classes.size(found) == found
    assert classes.size(size + more) >= found


@pytest.mark.parametrize(("waste", "most"), [(0.25, 4), (0.125, 8), (0.2, 8), (0.01, 128)])
def test_classes_of_an_octave_are_few(waste: float, most: int):
    classes = Bucketing(max_waste=waste)
    assert len({classes.size(n) for n in range((1 << 14) + 1, (1 << 15) + 1)}) == most


def test_powers_of_two_are_classes():
    assert all(Bucketing().size(1 << n) == 1 << n for n in range(40))


@pytest.mark.parametrize("waste", [0.0, -0.1, 0.26, 1.0, float("nan")])
def test_other_shares_are_refused(waste: float):
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.25"):
        Bucketing(max_waste=waste)
