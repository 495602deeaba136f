"""The plain oracle itself, on curves that can be checked by eye."""

from __future__ import annotations

from dilated_attention_pytorch.kernels.hilbert.base import hilbert_cells, hilbert_order, skilling_index


def test_small_curves():
    assert hilbert_cells(2, 2) == [(0, 0), (0, 1), (1, 1), (1, 0)]
    assert hilbert_cells(1, 3) == [(0, 0), (1, 0), (2, 0)]
    assert hilbert_cells(3, 1) == [(0, 0), (0, 1), (0, 2)]
    assert hilbert_cells(2, 3) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (2, 0)]
    assert hilbert_cells(3, 3) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0)]
    gray = [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1), (1, 0, 0)]
    assert hilbert_cells(2, 2, 2) == gray
    assert hilbert_order(2, 2) == [0, 2, 3, 1]


def test_skilling_index_counts_the_cells_of_the_order():
    assert [skilling_index(cell, 3) for cell in hilbert_cells(8, 8)] == list(range(64))
    assert [skilling_index(cell, 2) for cell in hilbert_cells(4, 4, 4)] == list(range(64))
    assert sorted(skilling_index((i >> 6, i >> 4 & 3, i >> 2 & 3, i & 3), 2) for i in range(256)) == list(range(256))
