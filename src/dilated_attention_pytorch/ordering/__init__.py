"""In which order tokens lie: permutations of the sequence that keep neighbours in space close together."""

from .choice import grid_ordering, recommend_ordering
from .coordinates import Curve, checked_curve, hilbert_order_from_coordinates, order_from_coordinates
from .hilbert import count_jumps, hilbert_order, step_lengths
from .ordering import HilbertOrdering
from .other_orders import GRID_ORDERS, morton_order, raster_order, snake_order

__all__ = [
    "GRID_ORDERS",
    "Curve",
    "HilbertOrdering",
    "checked_curve",
    "count_jumps",
    "grid_ordering",
    "hilbert_order",
    "hilbert_order_from_coordinates",
    "morton_order",
    "order_from_coordinates",
    "raster_order",
    "recommend_ordering",
    "snake_order",
    "step_lengths",
]
