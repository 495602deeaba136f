"""Orders of points that do not fill a grid: tiles of a slide, a point cloud, the tokens left after pruning."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .keys import KEYS, LIMITS

Curve = Literal["hilbert", "morton", "snake", "raster"]

_FLOAT_BITS = {2: 16, 3: 15}


def hilbert_order_from_coordinates(
    coordinates: Tensor, *, bits: int | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The order in which a Hilbert curve meets points, those of one cell in the order given.

    Coordinates are (row, column) or (slice, row, column), as the sizes in `hilbert_order`, whose order all cells of a
    grid of side 2**bits have here too.

    Args:
        coordinates: (N, 2) or (N, 3), or (B, N, 2) or (B, N, 3) for a batch. Integers, at least 0, are cells; floating
            point numbers, negative ones too, are scaled to the grid of side 2**bits, entry by entry of the batch, the
            same for every axis.
        bits: bits of a cell's coordinate, up to 31 in 2-D and 21 in 3-D. By default enough for the largest integer,
            rounded up to a multiple of 2 or 3 (so that the order does not depend on what else is in the batch; the
            limits bound that), and for floating point numbers 16 in 2-D and 15 in 3-D.
        key_padding_mask: (B, N) bool, True = padding, for a batch whose entries differ in number; (N,) without a
            batch. Such rows stay behind the others, in the order given, and their coordinates may be anything.

    Returns:
        (N,) or (B, N) int64: which row comes first, second, ... Values are checked, which waits for a GPU.

    Raises:
        ValueError: a shape, dtype, coordinate (NaN, infinite, negative, too large) or number of bits that does not fit.

    >>> hilbert_order_from_coordinates(torch.tensor([[3, 0], [0, 0], [3, 0], [0, 3]])).tolist()
    [1, 0, 2, 3]
    """
    return order_from_coordinates(coordinates, bits=bits, key_padding_mask=key_padding_mask)


def order_from_coordinates(
    coordinates: Tensor, *, curve: Curve = "hilbert", bits: int | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """`hilbert_order_from_coordinates` for any of the curves, to compare them."""
    checked_curve(curve)
    _check(coordinates, bits, key_padding_mask)
    points = coordinates if coordinates.dim() == 3 else coordinates[None]
    hidden = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    if key_padding_mask is not None:
        hidden = key_padding_mask.view(points.shape[:2])
    if not points.numel():
        order = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
    else:
        cells, bits = _scaled(points, hidden, bits) if points.is_floating_point() else _checked(points, hidden, bits)
        keys = KEYS[curve](cells.flip(-1).unbind(-1), bits)
        order = keys.argsort(dim=1, stable=True)
        if key_padding_mask is not None:
            order = order.gather(1, hidden.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    return order if coordinates.dim() == 3 else order[0]


def checked_curve(name: str) -> Curve:
    """The name of a curve, or the ValueError that lists them."""
    if name not in get_args(Curve):
        raise ValueError(f"the curve is {name!r}; choose one of {', '.join(map(repr, get_args(Curve)))}")
    return name  # type: ignore[return-value]  # one of them


def _check(coordinates: Tensor, bits: int | None, mask: Tensor | None) -> None:
    if not isinstance(coordinates, Tensor):
        raise ValueError(f"coordinates is of type {type(coordinates).__name__}; give a torch.Tensor")
    if coordinates.dim() not in (2, 3) or coordinates.shape[-1] not in LIMITS:
        raise ValueError(
            f"coordinates has shape {tuple(coordinates.shape)}; give (N, 2), (N, 3), (B, N, 2) or (B, N, 3)"
        )
    if coordinates.dtype == torch.bool or coordinates.is_complex():
        raise ValueError(f"coordinates has dtype {coordinates.dtype}; give integers or floating point numbers")
    limit = LIMITS[coordinates.shape[-1]]
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= limit):
        raise ValueError(f"bits is {bits!r}; give an integer from 1 to {limit} in {coordinates.shape[-1]}-D")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != coordinates.shape[:-1]:
        given = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"key_padding_mask is {given}; give bool {tuple(coordinates.shape[:-1])}, True = padding")
    if mask.device != coordinates.device:
        raise ValueError(
            f"key_padding_mask is on {mask.device}, coordinates are on {coordinates.device}; give one device"
        )


def _checked(points: Tensor, hidden: Tensor, bits: int | None) -> tuple[Tensor, int]:
    """Integer cells, 0 where hidden, and the bits they need."""
    if points.dtype == torch.uint64:
        raise ValueError("coordinates has dtype torch.uint64; give int64")
    cells = points.to(torch.int64).masked_fill(hidden[..., None], 0)
    lowest, highest = (int(value) for value in torch.stack(cells.aminmax()))
    dimensions = points.shape[-1]
    limit = LIMITS[dimensions]
    allowed = limit if bits is None else bits
    if lowest < 0 or highest >> allowed:
        wrong = lowest if lowest < 0 else highest
        more = "" if allowed == limit else f", or more bits, up to {limit}"
        raise ValueError(
            f"coordinates has {wrong}; integers must be at least 0 and below 2**{allowed} in {dimensions}-D{more}"
        )
    if bits is None:
        bits = min(max(-(-highest.bit_length() // dimensions), 1) * dimensions, limit)
    return cells, bits


def _scaled(points: Tensor, hidden: Tensor, bits: int | None) -> tuple[Tensor, int]:
    """Integer cells of the smallest cube (or square) around the points of an entry, which has 2**bits cells a side."""
    bits = _FLOAT_BITS[points.shape[-1]] if bits is None else bits
    halves = points.to(torch.float64) / 2  # so that no difference overflows
    if not bool((halves.isfinite() | hidden[..., None]).all()):
        wrong = points[~(halves.isfinite() | hidden[..., None])][0].item()
        raise ValueError(f"coordinates has {wrong}; every coordinate must be finite (mask rows of padding)")
    low = halves.masked_fill(hidden[..., None], torch.inf).amin(1, keepdim=True)
    high = halves.masked_fill(hidden[..., None], -torch.inf).amax(1, keepdim=True)
    extent = (high - low).amax(-1, keepdim=True)
    share = ((halves - low) / extent).masked_fill(hidden[..., None] | ~(extent > 0), 0)
    return (share * 2**bits).floor().clamp(max=2**bits - 1).to(torch.int64), bits
