"""Raster, snake and Morton orders of a grid."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.ordering import GRID_ORDERS, count_jumps, morton_order, raster_order, snake_order

SHAPES = [(1, 1), (4, 4), (5, 3), (6, 7), (1, 9), (3, 4, 5), (4, 3, 2), (5, 5, 5), (2, 1, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GRID_ORDERS)
def test_every_cell_once(name: str, shape: tuple[int, ...]):
    order = GRID_ORDERS[name](*shape)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(torch.Size(shape).numel()))


@pytest.mark.parametrize("shape", SHAPES)
def test_raster_is_the_identity_and_snake_has_no_jumps(shape: tuple[int, ...]):
    assert torch.equal(raster_order(*shape), torch.arange(torch.Size(shape).numel()))
    assert count_jumps(snake_order(*shape), shape) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_morton_interleaves_bits(shape: tuple[int, ...]):
    def key(cell: int) -> int:
        bits = ""
        coordinates = []
        for size in reversed(shape):
            cell, coordinate = divmod(cell, size)
            coordinates.append(coordinate)
        for bit in range(5, -1, -1):
            bits += "".join(str(coordinate >> bit & 1) for coordinate in reversed(coordinates))
        return int(bits, 2)

    assert morton_order(*shape).tolist() == sorted(range(torch.Size(shape).numel()), key=key)


@pytest.mark.parametrize("name", GRID_ORDERS)
def test_wrong_grids(name: str):
    with pytest.raises(ValueError, match="every size must be an integer of at least 1"):
        GRID_ORDERS[name](4, 0)
    with pytest.raises(ValueError, match=r"give \(height, width\)"):
        GRID_ORDERS[name](4)
