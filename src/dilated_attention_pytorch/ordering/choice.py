"""The ordering of a grid by the name of its curve."""

from __future__ import annotations

from functools import lru_cache

from .coordinates import Curve, checked_curve
from .ordering import HilbertOrdering
from .other_orders import GRID_ORDERS


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
