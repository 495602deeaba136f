"""Positions of tiles and patches in the plane: sine-cosine ones computed, learned ones resized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_COORDINATE_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def grid_cells(coords: Tensor, *, tile_size: int, grid: int, padding: Tensor | None = None) -> Tensor:
    """Cells ``(B, L, 2)`` int64 of the tiles whose corners are at ``coords (B, L, 2)``, in pixels.

    Where ``padding (B, L)`` is True, coordinates may be anything and the cell is 0.

    Raises:
        ValueError: a shape or dtype that cannot be coordinates, or a tile outside the grid, NaN included.

    >>> grid_cells(torch.tensor([[[0.0, 511.0], [1024.0, 256.0]]]), tile_size=256, grid=8)
    tensor([[[0, 1],
             [4, 1]]])
    """
    if coords.dtype not in _COORDINATE_DTYPES:
        raise ValueError(
            f"coords has dtype {coords.dtype}; give pixels as float32, float64, int32 or int64, which do not round them"
        )
    if coords.dim() != 3 or coords.shape[2] != 2:
        raise ValueError(f"coords has shape {tuple(coords.shape)}; give (batch, tiles, 2), two coordinates a tile")
    cells = torch.div(coords, tile_size, rounding_mode="floor")
    if padding is not None:
        cells = cells.masked_fill(padding[..., None], 0)
    # A model that is compiled does not look: there, as in any lookup, an index out of range fails by itself.
    if not (torch.compiler.is_compiling() or coords.is_meta):
        outside = ~((cells >= 0) & (cells < grid)).all(-1)  # NaN is neither
        if bool(outside.any()):
            row, tile = outside.nonzero()[0].tolist()
            raise ValueError(
                f"coords of tile {tile} of batch row {row} are {coords[row, tile].tolist()} ({int(outside.sum())} such "
                f"in all); give pixels of at least 0 and below {grid * tile_size}, the {grid} x {grid} grid of tiles "
                f"of {tile_size}"
            )
    return cells.long()


def sincos_table(grid: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions along one axis, ``(grid, width)``: sines of ``p * 10000**(-2 i / width)``, then their cosines."""
    exact = torch.float32 if device.type == "mps" else torch.float64
    frequency = 10000.0 ** (-2 * torch.arange(width // 2, device=device, dtype=exact) / width)
    angles = torch.arange(grid, device=device, dtype=exact)[:, None] * frequency
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(dtype)


def plane_positions(cells: Tensor, grid: int, width: int, dtype: torch.dtype) -> Tensor:
    """Positions ``(..., width)`` of cells ``(..., 2)``: first that of the second coordinate, then that of the first.

    >>> plane_positions(torch.tensor([[0, 0]]), 8, 8, torch.float32)
    tensor([[0., 0., 1., 1., 0., 0., 1., 1.]])
    """
    table = sincos_table(grid, width // 2, device=cells.device, dtype=dtype)
    return torch.cat((table[cells[..., 1]], table[cells[..., 0]]), dim=-1)


def resize_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Learned positions ``(1, n * n, E)`` of a square for ``height x width`` patches, ``(1, height * width, E)``.

    Bicubic, from the square's positions as LongViT takes them: at steps a little smaller than the ratio of the sizes,
    by the 0.1 that it adds to the new size against rounding.
    """
    side = square_side(positions.shape[1])
    if (height, width) == (side, side):
        return positions
    square = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    factors = ((height + 0.1) / side, (width + 0.1) / side)
    return F.interpolate(square, scale_factor=factors, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)


def square_side(count: int) -> int:
    """Side of a square of ``count`` patches; another count is a ValueError."""
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"there are {count} positions; give those of a square of patches")
    return side
