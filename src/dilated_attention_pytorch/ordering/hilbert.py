"""The Hilbert curve through a grid of any size, without a step in Python for a cell.

Boxes of equal sizes have the same curve, up to a turn and a reflection. So a box is put together from the curves of
its parts, and parts of equal sizes are computed once: a grid of N cells costs a few passes over N numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """A box within a box: its own sizes, and for each of its axes the outer axis it lies along and the direction."""

    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    signs: tuple[int, ...]
    origin: tuple[int, ...]


def hilbert_order(*shape: int, device: torch.device | str | None = None) -> Tensor:
    """The order in which a Hilbert curve visits the cells of a (height, width) or (depth, height, width) grid.

    Sizes may be any. In 2-D the curve is the generalised one (Jakub Červený, "gilbert"): steps go to one of the four
    neighbours, but for a single diagonal step where the longer side is odd and the shorter one even, for no curve from
    corner to corner along that side can avoid it. In 3-D the steps are to one of the six neighbours if all sizes are
    even; otherwise a few are diagonal within a plane, which `count_jumps` counts. Squares and cubes whose side is a
    power of two have the classical curve. It starts at cell 0 and ends at the other end of the longest side.

    Args:
        shape: two or three sizes, at least 1 each.
        device: of the result.

    Returns:
        (cells,) int64: row-major indices of the cells, in the order of the curve. ``tokens[:, order]`` follows it.

    Raises:
        ValueError: another number of sizes, or a size that is no positive integer.

    >>> hilbert_order(4, 4).tolist()
    [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    """
    sizes = checked_shape(shape)[::-1]  # columns first
    axes = sorted(range(len(sizes)), key=lambda axis: -sizes[axis])  # the longest first; stable
    coordinates = _curve(tuple(sizes[axis] for axis in axes), torch.device(device or "cpu"), {})
    strides = [1, sizes[0], sizes[0] * sizes[1]]
    index = torch.zeros(coordinates[0].shape, dtype=torch.int64, device=coordinates[0].device)
    for axis, coordinate in zip(axes, coordinates, strict=True):
        index.add_(coordinate, alpha=strides[axis])
    return index


def count_jumps(order: Tensor, shape: Sequence[int]) -> int:
    """How many steps of an order of a grid do not go to a neighbour along one axis.

    >>> count_jumps(hilbert_order(6, 10), (6, 10)), count_jumps(hilbert_order(6, 9), (6, 9))
    (0, 1)
    """
    return int((step_lengths(order, shape) != 1).sum())


def step_lengths(order: Tensor, shape: Sequence[int]) -> Tensor:
    """(cells - 1,) int64: the squared Euclidean length of every step of an order of a grid."""
    squares = torch.zeros(max(len(order) - 1, 0), dtype=torch.int64, device=order.device)
    rest = order
    for size in reversed(checked_shape(shape)):
        squares += (rest % size).diff().square()
        rest = rest // size
    return squares


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a grid, or the ValueError that says what is wrong with them."""
    given = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
    if len(given) not in (2, 3):
        raise ValueError(f"the grid is {given}; give (height, width) or (depth, height, width)")
    for size in given:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 2**31:
            raise ValueError(f"the grid is {given}; every size must be an integer of at least 1 (and below 2**31)")
    return given


def _curve(sizes: tuple[int, ...], device: torch.device, known: dict[tuple[int, ...], list[Tensor]]) -> list[Tensor]:
    """int32 coordinates along each axis, in the order of the curve from the origin to the other end of axis 0."""
    if sizes not in known:
        if sum(size > 1 for size in sizes) <= 1:
            cells = max(sizes) if min(sizes) else 0
            steps = [torch.arange(cells, dtype=torch.int32, device=device)]
            rest = [torch.zeros(cells, dtype=torch.int32, device=device)]
            longest = sizes.index(max(sizes))
            known[sizes] = [(steps if axis == longest else rest)[0] for axis in range(len(sizes))]
        else:
            pieces: list[list[Tensor]] = [[] for _ in sizes]
            for part in _parts(sizes):
                if min(part.sizes):
                    inner = _curve(part.sizes, device, known)
                    for coordinate, axis, sign in zip(inner, part.axes, part.signs, strict=True):
                        at = part.origin[axis]
                        pieces[axis].append(coordinate + at if sign > 0 else at - coordinate)
            known[sizes] = [torch.cat(column) for column in pieces]
    return known[sizes]


def _parts(sizes: tuple[int, ...]) -> list[Part]:
    """The boxes that the curve visits one after the other; a box of no cells may be among them."""
    if len(sizes) == 2:
        return _parts_of_rectangle(*sizes)
    side = sizes[0]
    if sizes == (side, side, side) and side & (side - 1) == 0:
        return _parts_of_cube(side // 2)
    return _parts_of_box(*sizes)


def _half(size: int) -> int:
    """About half, and even where it can be: then the curve through a part ends on the side where the next begins."""
    half = size // 2
    return half + 1 if half % 2 and size > 2 else half


def _parts_of_rectangle(w: int, h: int) -> list[Part]:
    a, b = _half(w), _half(h)
    if 2 * w > 3 * h:
        return [Part((a, h), (0, 1), (1, 1), (0, 0)), Part((w - a, h), (0, 1), (1, 1), (a, 0))]
    return [
        Part((b, a), (1, 0), (1, 1), (0, 0)),
        Part((w, h - b), (0, 1), (1, 1), (0, b)),
        Part((b, w - a), (1, 0), (-1, -1), (w - 1, b - 1)),
    ]


def _parts_of_box(w: int, h: int, d: int) -> list[Part]:
    a, b, c = _half(w), _half(h), _half(d)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return [
            Part((a, h, d), (0, 1, 2), (1, 1, 1), (0, 0, 0)),
            Part((w - a, h, d), (0, 1, 2), (1, 1, 1), (a, 0, 0)),
        ]
    if 3 * h > 4 * d:  # too flat to cut across its depth
        return [
            Part((b, d, a), (1, 2, 0), (1, 1, 1), (0, 0, 0)),
            Part((w, h - b, d), (0, 1, 2), (1, 1, 1), (0, b, 0)),
            Part((b, d, w - a), (1, 2, 0), (-1, 1, -1), (w - 1, b - 1, 0)),
        ]
    if 3 * d > 4 * h:
        return [
            Part((c, a, h), (2, 0, 1), (1, 1, 1), (0, 0, 0)),
            Part((w, h, d - c), (0, 1, 2), (1, 1, 1), (0, 0, c)),
            Part((c, w - a, h), (2, 0, 1), (-1, -1, 1), (w - 1, 0, c - 1)),
        ]
    return [
        Part((b, c, a), (1, 2, 0), (1, 1, 1), (0, 0, 0)),
        Part((d, a, h - b), (2, 0, 1), (1, 1, 1), (0, b, 0)),
        Part((w, b, d - c), (0, 1, 2), (1, -1, -1), (0, b - 1, d - 1)),
        Part((d, w - a, h - b), (2, 0, 1), (-1, -1, 1), (w - 1, b, d - 1)),
        Part((b, c, w - a), (1, 2, 0), (-1, 1, -1), (w - 1, b - 1, 0)),
    ]


def _parts_of_cube(half: int) -> list[Part]:
    """The octants of the classical curve, as Skilling's transform visits them."""
    octants = (  # which one, the axes it lies along, and the directions
        ((0, 0, 0), (2, 0, 1), (1, 1, 1)),
        ((0, 0, 1), (1, 0, 2), (1, 1, 1)),
        ((0, 1, 1), (0, 1, 2), (1, 1, 1)),
        ((0, 1, 0), (2, 1, 0), (-1, 1, -1)),
        ((1, 1, 0), (2, 1, 0), (1, 1, 1)),
        ((1, 1, 1), (0, 1, 2), (1, 1, 1)),
        ((1, 0, 1), (1, 0, 2), (-1, -1, 1)),
        ((1, 0, 0), (2, 0, 1), (-1, -1, 1)),
    )
    parts = []
    for place, axes, signs in octants:
        origin = [half * place[axis] for axis in range(3)]
        for axis, sign in zip(axes, signs, strict=True):
            origin[axis] += half - 1 if sign < 0 else 0
        parts.append(Part((half,) * 3, axes, signs, tuple(origin)))
    return parts
