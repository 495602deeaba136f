"""Which order is recommended, and orderings by name."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import HilbertOrdering, recommend_ordering
from dilated_attention_pytorch.ordering import GRID_ORDERS, grid_ordering


@pytest.mark.parametrize(
    ("shape", "segment_lengths", "expected"),
    [
        ((64, 64), (256, 1024), "hilbert"),
        ((60, 90), (1024, 256), "hilbert"),
        ((16, 16, 16), (256,), "hilbert"),
        ((64, 64), (4096,), "raster"),  # all neighbours are in the one segment
        ((1, 4096), (256,), "raster"),  # no second direction
        ((4096, 1), (256,), "raster"),
        ((8, 8), (16,), "raster"),  # few cells
        ((16, 256), (1,), "raster"),  # no neighbour is in a segment of one
    ],
)
def test_recommended_where_segments_keep_more_neighbours(shape, segment_lengths, expected):
    assert recommend_ordering(*shape, segment_lengths=segment_lengths) == expected
    assert recommend_ordering(*shape, segment_lengths=segment_lengths, is_causal=True) == "raster"


def test_what_is_no_pattern_or_grid_is_refused():
    with pytest.raises(ValueError, match=r"segment_lengths is \(\); give integers"):
        recommend_ordering(4, 4, segment_lengths=())
    with pytest.raises(ValueError, match=r"segment_lengths is \(0,\)"):
        recommend_ordering(4, 4, segment_lengths=(0,))
    with pytest.raises(ValueError, match=r"the grid is \(4,\); give"):
        recommend_ordering(4, segment_lengths=(2,))


@pytest.mark.parametrize("curve", GRID_ORDERS)
@pytest.mark.parametrize("skip_first", [0, 1])
def test_orderings_by_name(curve, skip_first):
    ordering = grid_ordering(curve, 5, 6, skip_first=skip_first)
    if curve == "raster":
        assert ordering is None
        return
    assert isinstance(ordering, HilbertOrdering)
    first = torch.arange(skip_first)
    assert torch.equal(ordering.positions(), torch.cat((first, skip_first + GRID_ORDERS[curve](5, 6))))
