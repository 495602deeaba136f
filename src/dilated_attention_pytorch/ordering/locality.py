"""How compact the segments of an order are: measures on a grid, to choose an order by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .hilbert import checked_shape


def cell_places(order: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, 2) or (N, 3) float64: where in the grid the cells of an order lie.

    >>> cell_places(torch.tensor([0, 1, 3, 2]), (2, 2)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]
    """
    sizes = checked_shape(tuple(shape))
    if order.shape != (torch.Size(sizes).numel(),):
        raise ValueError(f"the order has shape {tuple(order.shape)}; a grid of {sizes} has {torch.Size(sizes).numel()}")
    return torch.stack(torch.unravel_index(order, sizes), -1).double()


def attended_distance(
    order: Tensor, shape: Sequence[int], segment_lengths: Sequence[int], dilation_rates: Sequence[int]
) -> float:
    """Mean distance in cells between a query and a key that it attends to, over all branches and offsets of heads.

    >>> from dilated_attention_pytorch.ordering import hilbert_order, raster_order
    >>> attended_distance(raster_order(8, 8), (8, 8), [16], [1])  # two rows of eight
    2.712...
    >>> attended_distance(hilbert_order(8, 8), (8, 8), [16], [1])  # squares of four by four
    1.822...
    """
    places = cell_places(order, shape)
    total = pairs = 0.0
    for length, rate in zip(segment_lengths, dilation_rates, strict=True):
        for segment in places.split(length):
            for offset in range(rate):
                active = segment[offset::rate]
                for queries in active.split(1024):
                    total += float(torch.cdist(queries, active).sum())
                    pairs += len(queries) * len(active)
    return total / pairs


def neighbours_inside(order: Tensor, shape: Sequence[int], segment_length: int) -> float:
    """The share of neighbours in space (8 around a cell of a plane, 26 in a volume) that are in a cell's segment.

    >>> from dilated_attention_pytorch.ordering import hilbert_order, raster_order
    >>> round(neighbours_inside(raster_order(8, 8), (8, 8), 16), 3)
    0.638
    >>> round(neighbours_inside(hilbert_order(8, 8), (8, 8), 16), 3)
    0.8
    """
    segments = segment_map(order, shape, segment_length)
    inside = there = 0
    for step in torch.cartesian_prod(*[torch.arange(-1, 2)] * len(shape)).tolist():
        if not any(step):
            continue
        one = segments[tuple(slice(max(s, 0), size + min(s, 0)) for s, size in zip(step, shape, strict=True))]
        other = segments[tuple(slice(max(-s, 0), size + min(-s, 0)) for s, size in zip(step, shape, strict=True))]
        inside, there = inside + int((one == other).sum()), there + one.numel()
    return inside / max(there, 1)


def segment_map(order: Tensor, shape: Sequence[int], segment_length: int) -> Tensor:
    """The segment of every cell: int64 of the grid's shape."""
    number = torch.arange(len(order), device=order.device) // segment_length
    return torch.empty_like(order).scatter_(0, order, number).view(tuple(shape))
