"""Other orders of a grid, to compare the Hilbert curve with."""

from __future__ import annotations

import torch
from torch import Tensor

from .hilbert import checked_shape, hilbert_order
from .keys import LIMITS, morton_keys


def raster_order(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """Rows one after the other: the identity. Arguments and result as for `hilbert_order`."""
    return _grid(shape, device).flatten()


def snake_order(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """Rows one after the other, every second one backwards. Arguments and result as for `hilbert_order`.

    >>> snake_order(3, 4).tolist()
    [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    """
    cells = _grid(shape, device)
    if cells.dim() == 3:  # slices first: every second one from its last row up
        cells = torch.where(_odd(cells)[:, None, None], cells.flip(1), cells).flatten(0, 1)
    return torch.where(_odd(cells)[:, None], cells.flip(1), cells).flatten()


def morton_order(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """The Z curve: cells by the interleaved bits of their coordinates. Arguments and result as for `hilbert_order`.

    >>> morton_order(2, 4).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    sizes = checked_shape(shape)
    limit = LIMITS[len(sizes)]
    if max(sizes) > 1 << limit:
        raise ValueError(f"the grid is {sizes}; morton_order takes sizes up to 2**{limit} in {len(sizes)}-D")
    columns, rest = [], _grid(shape, device).flatten()
    for size in reversed(sizes):
        columns.append(rest % size)
        rest = rest // size
    return morton_keys(columns, limit).argsort(stable=True)


def _grid(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    sizes = checked_shape(shape)
    return torch.arange(torch.Size(sizes).numel(), device=device).view(sizes)


def _odd(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device) % 2 == 1


GRID_ORDERS = {"hilbert": hilbert_order, "morton": morton_order, "snake": snake_order, "raster": raster_order}
"""Orders of a grid, by name."""
