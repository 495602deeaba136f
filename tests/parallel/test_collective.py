"""Tensors that every rank has: their values, and gradients that add up what all ranks make of them."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("world", "strategy", "layout"),
    [(1, "ring", "contiguous"), (3, "ring", "zigzag"), (4, "hybrid 2x2 ring", "contiguous")],
)
def test_sums_and_whole_tensors_let_gradients_through(pool, world, strategy, layout):
    for status, answer in pool.run("collective", world, strategy, layout):
        assert status == "done", answer
        assert answer["detached"]
        assert len(answer["errors"]) == 6
        assert max(answer["errors"]) < 1e-12
