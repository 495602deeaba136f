"""Measures of locality: against plain loops over cells."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dilated_attention_pytorch.ordering import GRID_ORDERS
from dilated_attention_pytorch.ordering.locality import attended_distance, neighbours_inside, segment_map

GRIDS = [(5, 7), (6, 6), (3, 4, 5)]


def cells(order: torch.Tensor, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    every = list(itertools.product(*map(range, shape)))
    return [every[i] for i in order.tolist()]


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("curve", GRID_ORDERS)
def test_measures_equal_loops_over_cells(shape: tuple[int, ...], curve: str) -> None:
    order = GRID_ORDERS[curve](*shape)
    places, length = cells(order, shape), 9
    where = {cell: i // length for i, cell in enumerate(places)}
    assert all(int(segment_map(order, shape, length)[cell]) == segment for cell, segment in where.items())
    pairs = [(a, b) for a in where for b in where if max(abs(x - y) for x, y in zip(a, b, strict=True)) == 1]
    inside = sum(where[a] == where[b] for a, b in pairs)
    assert neighbours_inside(order, shape, length) == pytest.approx(inside / len(pairs))

    distances = []
    for w, r in ((9, 1), (20, 3)):
        for i, a in enumerate(places):
            for j, b in enumerate(places):
                if i // w == j // w and i % w % r == j % w % r:
                    distances.append(math.dist(a, b))
    assert attended_distance(order, shape, [9, 20], [1, 3]) == pytest.approx(sum(distances) / len(distances))


def test_an_order_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a grid of \(3, 4\) has 12"):
        attended_distance(torch.arange(11), (3, 4), [4], [1])
