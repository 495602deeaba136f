"""Places on a curve through a grid of side 2**bits, for tensors of integer coordinates: int64, no loop over points.

``columns`` are the coordinates, int64 and of one shape, the fastest axis of the raster first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LIMITS = {2: 31, 3: 21}
"""Most bits of a coordinate, by dimensions: a key has to fit into the 63 bits of a nonnegative int64."""

_BLOCK = 1 << 15

_MASKS = {
    2: ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F), (2, 0x3333333333333333),
        (1, 0x5555555555555555)),
    3: ((32, 0x001F00000000FFFF), (16, 0x001F0000FF0000FF), (8, 0x100F00F00F00F00F), (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249)),
}  # fmt: skip
"""How the bits of a coordinate are spread to every second or third place: shifts, and what is kept after each."""


def hilbert_keys(columns: Sequence[Tensor], bits: int) -> Tensor:
    """Index on the classical curve: J. Skilling, AIP Conference Proceedings 707 (2004), for any number of points.

    On a CPU a block of points at a time, so that the many short passes over them stay in its cache.
    """
    block = _BLOCK if columns[0].device.type == "cpu" else max(columns[0].numel(), 1)
    flat = (column.flatten().split(block) for column in columns)
    return torch.cat([_hilbert_keys(part, bits) for part in zip(*flat, strict=True)]).view(columns[0].shape)


def _hilbert_keys(columns: Sequence[Tensor], bits: int) -> Tensor:
    x = [column.to(torch.int32) for column in columns]  # a coordinate has at most 31 bits
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for axis in range(len(x)):
            high = (x[axis] >> bit).bitwise_and_(1).neg_()  # all ones where the bit is set
            x[0] = x[0] ^ (high & low)
            if axis:
                exchanged = (x[0] ^ x[axis]).bitwise_and_(high.bitwise_not_()).bitwise_and_(low)
                x[0] ^= exchanged
                x[axis] = x[axis] ^ exchanged
    for axis in range(1, len(x)):
        x[axis] = x[axis] ^ x[axis - 1]
    flips = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flips ^= (x[-1] >> bit).bitwise_and_(1).neg_().bitwise_and_((1 << bit) - 1)
    return _interleave([(column ^ flips).to(torch.int64) for column in x])


def morton_keys(columns: Sequence[Tensor], bits: int) -> Tensor:
    """Index on the Z curve: the bits of the coordinates in turn, those of the first column lowest."""
    return _interleave(list(reversed(columns)))


def raster_keys(columns: Sequence[Tensor], bits: int) -> Tensor:
    """Rows one after the other."""
    key = torch.zeros_like(columns[0])
    for column in reversed(columns):
        key = key << bits | column
    return key


def snake_keys(columns: Sequence[Tensor], bits: int) -> Tensor:
    """Rows one after the other, every second one backwards, and so the slices."""
    last, key = (1 << bits) - 1, torch.zeros_like(columns[0])
    for column in reversed(columns):
        key = key << bits | torch.where(key & 1 == 1, last - column, column)
    return key


def _interleave(columns: Sequence[Tensor]) -> Tensor:
    """Bits of the columns in turn, those of the first the highest."""
    key, dimensions = torch.zeros_like(columns[0]), len(columns)
    for place, column in enumerate(reversed(columns)):
        spread = column
        for shift, mask in _MASKS[dimensions]:
            spread = (spread | spread << shift) & mask
        key |= spread << place
    return key


KEYS: dict[str, Callable[[Sequence[Tensor], int], Tensor]] = {
    "hilbert": hilbert_keys,
    "morton": morton_keys,
    "snake": snake_keys,
    "raster": raster_keys,
}
