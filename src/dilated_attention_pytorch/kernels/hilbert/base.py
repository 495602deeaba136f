"""The curves in plain Python, cell by cell: what every faster implementation has to equal.

Cells are tuples (column, row) or (column, row, slice), the reverse of the order of the sizes of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Vector = tuple[int, ...]


def hilbert_cells(*shape: int) -> list[Vector]:
    """Cells of a (height, width) or (depth, height, width) grid along the curve that `hilbert_order` follows.

    It is the generalised curve, that of Jakub Červený's "gilbert", along the longest axis. A cube whose side is a
    power of two, be it the grid or a part of it, gets the classical one.
    """
    sizes = shape[::-1]
    axes = sorted(range(len(sizes)), key=lambda axis: -sizes[axis])
    edges = [tuple(sizes[axis] * (axis == other) for other in range(len(sizes))) for axis in axes]
    start = (0,) * len(sizes)
    return list(_rectangle(start, *edges) if len(sizes) == 2 else _box(start, *edges))


def hilbert_order(*shape: int) -> list[int]:
    """`hilbert_cells` as row-major indices into the grid."""
    order = []
    for cell in hilbert_cells(*shape):
        index = 0
        for size, coordinate in zip(shape, reversed(cell), strict=True):
            index = index * size + coordinate
        order.append(index)
    return order


def skilling_index(cell: Sequence[int], bits: int) -> int:
    """Place of a cell on the classical curve through a grid of side 2**bits, in any number of dimensions.

    J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004): the coordinates are turned
    into the transposed index bit by bit, from the highest down.
    """
    x = list(cell)
    for bit in range(bits - 1, 0, -1):  # undo the turns and reflections of the smaller cubes
        low = (1 << bit) - 1
        for axis in range(len(x)):
            if x[axis] >> bit & 1:
                x[0] ^= low
            else:
                exchanged = (x[0] ^ x[axis]) & low
                x[0] ^= exchanged
                x[axis] ^= exchanged
    for axis in range(1, len(x)):  # Gray code
        x[axis] ^= x[axis - 1]
    flips = 0
    for bit in range(bits - 1, 0, -1):
        if x[-1] >> bit & 1:
            flips ^= (1 << bit) - 1
    index = 0
    for bit in range(bits - 1, -1, -1):
        for coordinate in x:
            index = index << 1 | (coordinate ^ flips) >> bit & 1
    return index


def _plus(*vectors: Vector) -> Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))


def _minus(vector: Vector) -> Vector:
    return tuple(-entry for entry in vector)


def _length(edge: Vector) -> int:
    return sum(map(abs, edge))


def _unit(edge: Vector) -> Vector:
    return tuple((entry > 0) - (entry < 0) for entry in edge)


def _half(edge: Vector) -> Vector:
    """About half of an edge, of even length where it can be: a part of even length leaves on the side it should."""
    half = _length(edge) // 2
    half += half % 2 == 1 and _length(edge) > 2
    return tuple(half * entry for entry in _unit(edge))


def _line(start: Vector, edge: Vector) -> Iterator[Vector]:
    for step in range(_length(edge)):
        yield _plus(start, tuple(step * entry for entry in _unit(edge)))


def _rectangle(start: Vector, a: Vector, b: Vector) -> Iterator[Vector]:
    """Cells of the rectangle with edges a and b at ``start``, from there to the other end of a."""
    w, h = _length(a), _length(b)
    if not w or not h:
        return
    if 1 in (w, h):
        yield from _line(start, a if h == 1 else b)
        return
    a_rest, b_rest = _plus(a, _minus(_half(a))), _plus(b, _minus(_half(b)))
    if 2 * w > 3 * h:  # long: two rectangles side by side
        yield from _rectangle(start, _half(a), b)
        yield from _rectangle(_plus(start, _half(a)), a_rest, b)
        return
    yield from _rectangle(start, _half(b), _half(a))  # up, along, and down again
    yield from _rectangle(_plus(start, _half(b)), a, b_rest)
    corner = _plus(start, a, _minus(_unit(a)), _half(b), _minus(_unit(b)))
    yield from _rectangle(corner, _minus(_half(b)), _minus(a_rest))


def _box(start: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Cells of the box with edges a, b and c at ``start``, from there to the other end of a."""
    w, h, d = _length(a), _length(b), _length(c)
    if not w or not h or not d:
        return
    if sorted((w, h, d))[1] == 1:
        yield from _line(start, max(a, b, c, key=_length))
        return
    if w == h == d and w & (w - 1) == 0:
        yield from _cube(start, a, b, c)
        return
    a_half, b_half, c_half = _half(a), _half(b), _half(c)
    a_rest, b_rest, c_rest = (_plus(edge, _minus(_half(edge))) for edge in (a, b, c))
    a_end, b_half_end, c_half_end, c_end = (_plus(edge, _minus(_unit(edge))) for edge in (a, b_half, c_half, c))
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes side by side
        yield from _box(start, a_half, b, c)
        yield from _box(_plus(start, a_half), a_rest, b, c)
    elif 3 * h > 4 * d:  # flat: as the rectangle of a and b
        yield from _box(start, b_half, c, a_half)
        yield from _box(_plus(start, b_half), a, b_rest, c)
        yield from _box(_plus(start, a_end, b_half_end), _minus(b_half), c, _minus(a_rest))
    elif 3 * d > 4 * h:  # high: as the rectangle of a and c
        yield from _box(start, c_half, a_half, b)
        yield from _box(_plus(start, c_half), a, b, c_rest)
        yield from _box(_plus(start, a_end, c_half_end), _minus(c_half), _minus(a_rest), b)
    else:
        yield from _box(start, b_half, c_half, a_half)
        yield from _box(_plus(start, b_half), c, a_half, b_rest)
        yield from _box(_plus(start, b_half_end, c_end), a, _minus(b_half), _minus(c_rest))
        yield from _box(_plus(start, a_end, b_half, c_end), _minus(c), _minus(a_rest), b_rest)
        yield from _box(_plus(start, a_end, b_half_end), _minus(b_half), c_half, _minus(a_rest))


def _cube(start: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Cells of a cube whose side is a power of two, in the classical order."""
    side = _length(a)
    places = [(x, y, z) for z in range(side) for y in range(side) for x in range(side)]
    for place in sorted(places, key=lambda place: skilling_index(place, side.bit_length() - 1)):
        steps = [tuple(step * entry for entry in _unit(edge)) for step, edge in zip(place, (a, b, c), strict=True)]
        yield _plus(start, *steps)
