"""Who skipped, from marks that were read at different times."""

from __future__ import annotations

import random

import pytest

from dilated_attention_pytorch.parallel.heartbeat_marks import Marks, describe, odd_one_out


def run(skips: set[tuple[int, str]], until: int) -> Marks:
    """The marks of a rank after ``until`` steps of two exchanges forward and two backward, but for some."""
    marks = Marks()
    for step in range(until):
        for phase in ("forward", "backward"):
            for _ in range(2):
                if (step, phase) not in skips:
                    marks.add(step, phase)
    return marks


def test_ranks_that_do_the_same_have_nobody_to_accuse_however_far_apart_they_are():
    for _ in range(50):
        entries = {rank: run(set(), random.randint(1, 300)).entries() for rank in range(4)}
        assert odd_one_out(entries) is None


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("skipped", [{(5, "backward")}, {(5, "forward"), (5, "backward")}])
def test_the_rank_that_skipped_is_found(world, skipped):
    for culprit in range(world):
        entries = {r: run(skipped if r == culprit else set(), 40).entries() for r in range(world)}
        # The marks of the one who lags are those of a few exchanges before.
        found = odd_one_out(entries)
        assert found is not None
        assert found[0] == culprit
        # So too from what ranks tell each other before an exchange, at the first one that differs.
        marks = {r: run(skipped if r == culprit else set(), 6) for r in range(world)}
        while marks[culprit].count < marks[(culprit + 1) % world].count:
            marks[culprit].add(6, "forward")
        found = odd_one_out({r: describe(mark.last()) for r, mark in marks.items()})
        assert found is not None
        assert found[0] == culprit


def test_marks_are_few_and_reach_far_back():
    marks = run(set(), 5000)
    numbers = sorted(map(int, marks.entries()))
    assert marks.count == 20000
    assert len(numbers) <= 24
    assert numbers[-1] == 20000
    assert numbers[0] <= 16384
