"""Positions in the plane: against the original's table, written out with numpy, and coordinates that are refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch.models.positions import grid_cells, plane_positions, resize_positions


def original_table(width: int, grid: int) -> np.ndarray:
    """Row ``1 + a * grid + b`` belongs to cell (a, b); row 0 to the class token. Float64, as numpy computes it."""
    frequency = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))

    def axis(position: np.ndarray) -> np.ndarray:
        angle = position[:, None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    index = np.arange(grid * grid)
    cells = np.concatenate([axis(index % grid), axis(index // grid)], axis=1)
    return np.concatenate([np.zeros((1, width)), cells])


@pytest.mark.parametrize(("width", "grid"), [(48, 40), (768, 30)])
def test_equal_to_the_original_table(width: int, grid: int) -> None:
    table = torch.from_numpy(original_table(width, grid))
    a, b = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
    found = plane_positions(torch.stack((a, b), dim=-1)[None], grid, width, torch.float32)
    assert found.dtype == torch.float32
    assert float((found[0].double() - table[1:]).abs().max()) <= 1e-6


def test_equal_at_the_far_corner_of_the_grid() -> None:
    width, grid = 64, 1000
    cells = torch.tensor([[999, 0], [999, 999], [517, 998]])
    frequency = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    for cell, found in zip(cells.tolist(), plane_positions(cells, grid, width, torch.float32), strict=True):
        expected = [part(cell[axis] * frequency) for axis in (1, 0) for part in (np.sin, np.cos)]
        assert np.abs(found.double().numpy() - np.concatenate(expected)).max() <= 1e-6


def test_cells_are_floors_in_every_dtype() -> None:
    pixels = [[0, 255], [256, 511], [1791, 2047]]
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        coords = torch.tensor([pixels], dtype=dtype)
        cells = grid_cells(coords, tile_size=256, grid=8)
        assert cells.dtype == torch.int64
        assert cells.tolist() == [[[0, 0], [1, 1], [6, 7]]]
    assert grid_cells(torch.tensor([[[255.99, 256.01]]]), tile_size=256, grid=8).tolist() == [[[0, 1]]]


@pytest.mark.parametrize("bad", [[0.0, 2048.0], [-0.5, 3.0], [torch.nan, 3.0], [3.0, torch.inf]], ids=str)
def test_a_tile_outside_the_grid_is_named(bad: list[float]) -> None:
    coords = torch.zeros(2, 5, 2)
    coords[1, 3] = torch.tensor(bad)
    message = rf"tile 3 of batch row 1 are {re.escape(str(bad))} \(1 such in all\); give .* below 2048, the 8 x 8 grid"
    with pytest.raises(ValueError, match=message):
        grid_cells(coords, tile_size=256, grid=8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3] = True
    assert grid_cells(coords, tile_size=256, grid=8, padding=padding)[1, 3].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.zeros(4, 2), r"shape \(4, 2\); give \(batch, tiles, 2\)"),
        (torch.zeros(1, 4, 3), r"shape \(1, 4, 3\)"),
        (torch.zeros(1, 4, 2).half(), "dtype torch.float16; give pixels as float32"),
        (torch.zeros(1, 4, 2).bfloat16(), "dtype torch.bfloat16"),
        (torch.zeros(1, 4, 2, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(1, 4, 2, dtype=torch.complex64), "dtype torch.complex64"),
    ],
)
def test_what_cannot_be_coordinates_is_refused(coords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_cells(coords, tile_size=256, grid=8)


def test_learned_positions_keep_their_size_or_are_resized() -> None:
    positions = torch.randn(1, 16, 6)
    assert resize_positions(positions, 4, 4) is positions
    resized = resize_positions(positions, 8, 5)
    assert resized.shape == (1, 40, 6)
    plain = F.interpolate(positions.view(1, 4, 4, 6).permute(0, 3, 1, 2), (8, 5), mode="bicubic")
    difference = float((resized.view(1, 8, 5, 6).permute(0, 3, 1, 2) - plain).abs().max())
    assert 1e-4 < difference < 0.3  # near, but taken at LongViT's steps
    ramp = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    grown = resize_positions(ramp, 8, 4).view(8, 4)
    assert bool((grown.diff(dim=0) > -0.2).all()), "rows of patches come first"
    assert float(grown.diff(dim=1).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="15 positions"):
        resize_positions(positions[:, :15], 4, 4)
