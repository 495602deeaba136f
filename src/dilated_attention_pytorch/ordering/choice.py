"""The ordering of a grid by the name of its curve, and which curve to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from .coordinates import Curve, checked_curve
from .hilbert import checked_shape, hilbert_order
from .locality import neighbours_inside
from .ordering import HilbertOrdering
from .other_orders import GRID_ORDERS, raster_order

_FEWEST_CELLS = 1024


@lru_cache(maxsize=16)
def grid_ordering(curve: Curve, *shape: int, skip_first: int = 0) -> HilbertOrdering | None:
    """The ordering of a grid's cells along a curve; None for "raster", the order they are given in.

    The last 16 are kept.

    Args:
        curve: "hilbert", "morton", "snake" or "raster".
        shape: (height, width) or (depth, height, width).
        skip_first: rows before the cells that stay there, 1 for a class token.

    Raises:
        ValueError: another curve, or a shape that is no grid.

    >>> grid_ordering("snake", 2, 3).positions().tolist()
    [0, 1, 2, 5, 4, 3]
    """
    if checked_curve(curve) == "raster":
        return None
    if curve == "hilbert":
        return HilbertOrdering(shape, skip_first=skip_first)
    return HilbertOrdering(permutation=GRID_ORDERS[curve](*shape), skip_first=skip_first)


def recommend_ordering(*shape: int, segment_lengths: Sequence[int], is_causal: bool = False) -> Curve:
    """The order in which the shortest segments keep more neighbours in space: "hilbert", or "raster", the identity.

    Neighbours are the 8 cells around a cell of a plane, the 26 in a volume; "hilbert" has to keep at least 0.02 more of
    them, as a share of all. On photographs (4,240 patches) it then also kept more of what dense attention by content
    looks at. A model of 64 pixels did not become more accurate by it, so grids of fewer than 1,024 cells stay as they
    are (see the page on Hilbert orderings).

    Args:
        shape: (height, width) or (depth, height, width) of the grid of patches, tiles or voxels.
        segment_lengths: those of the pattern, in rows of the sequence.
        is_causal: whether attention is; along a curve a row has no past, so the answer is "raster".

    Raises:
        ValueError: a shape that is no grid, or segment lengths below 1.

    >>> recommend_ordering(64, 64, segment_lengths=(256, 4096))
    'hilbert'
    >>> recommend_ordering(64, 64, segment_lengths=(4096,))  # one segment holds all
    'raster'
    """
    sizes = checked_shape(shape)
    if (
        not isinstance(segment_lengths, Sequence)
        or not segment_lengths
        or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in segment_lengths)
    ):
        raise ValueError(f"segment_lengths is {segment_lengths!r}; give integers of at least 1")
    if is_causal or math.prod(sizes) < _FEWEST_CELLS:
        return "raster"
    shortest = min(segment_lengths)
    raster, hilbert = (neighbours_inside(order(*sizes), sizes, shortest) for order in (raster_order, hilbert_order))
    return "hilbert" if hilbert >= raster + 0.02 else "raster"
