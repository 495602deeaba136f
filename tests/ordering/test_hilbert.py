"""The curve through grids of any size: every cell once, steps to neighbours, the classical curve, the plain oracle."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import pytest
import torch
from hilbertcurve.hilbertcurve import HilbertCurve

from dilated_attention_pytorch import hilbert_order
from dilated_attention_pytorch.kernels.hilbert import base
from dilated_attention_pytorch.ordering import count_jumps, step_lengths

RECTANGLES = list(itertools.product(range(1, 65), repeat=2))
BOXES = list(itertools.product(range(1, 13), repeat=3))
JUMPS_OF_BOXES = 30
"""Most diagonal steps in a box up to 12 x 12 x 12, those of 11 x 11 x 11."""


def some(shapes: list[tuple[int, ...]], one_in: int) -> list[tuple[int, ...]]:
    """A part of them that does not follow their sizes, the same in every run."""
    return [shape for shape in shapes if zlib.crc32(repr(shape).encode()) % one_in == 0]


def assert_visits_every_cell_once(order: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert order.dtype == torch.int64
    cells = torch.Size(shape).numel()
    assert order.shape == (cells,), shape
    assert bool((order.bincount(minlength=cells) == 1).all()), shape


def check_rectangle(height: int, width: int) -> None:
    order = hilbert_order(height, width)
    assert_visits_every_cell_once(order, (height, width))
    squares = step_lengths(order, (height, width))
    # Along an odd side, h * w cells change the colour of a chessboard once too often or too rarely if h * w is even.
    forbidden = max(height, width) % 2 == 1 and min(height, width) % 2 == 0
    assert int((squares != 1).sum()) == forbidden, (height, width)
    assert int(squares.max() if len(squares) else 0) <= 1 + forbidden, (height, width)
    assert order[0] == 0
    assert order[-1] == (width - 1 if width >= height else (height - 1) * width), (height, width)


def check_box(shape: tuple[int, ...]) -> None:
    order = hilbert_order(*shape)
    assert_visits_every_cell_once(order, shape)
    squares = step_lengths(order, shape)
    assert count_jumps(order, shape) == int((squares > 1).sum()) <= JUMPS_OF_BOXES, shape
    assert int(squares.max() if len(squares) else 0) <= 2, shape
    if all(size % 2 == 0 for size in shape):
        assert count_jumps(order, shape) == 0, shape


def check_against_the_oracle(shape: tuple[int, ...]) -> None:
    assert hilbert_order(*shape).tolist() == base.hilbert_order(*shape), shape


@pytest.mark.parametrize(
    ("check", "shapes", "one_in"),
    [
        pytest.param(lambda shape: check_rectangle(*shape), RECTANGLES, 8, id="rectangles"),
        pytest.param(check_box, BOXES, 4, id="boxes"),
        pytest.param(check_against_the_oracle, RECTANGLES, 80, id="rectangles-oracle"),
        pytest.param(check_against_the_oracle, BOXES, 24, id="boxes-oracle"),
    ],
)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"])
def test_every_size(check: Callable, shapes: list[tuple[int, ...]], one_in: int, every: bool):
    chosen = shapes if every else some(shapes, one_in)
    assert len(chosen) > len(shapes) // one_in // 2
    for shape in chosen:
        check(shape)


@pytest.mark.parametrize("shape", [(1000, 777), (999, 1001), (3, 2000), (1, 5000), (40, 64, 33), (2, 2, 900)])
def test_large_grids(shape):
    order = hilbert_order(*shape)
    assert_visits_every_cell_once(order, shape)
    assert step_lengths(order, shape).max() <= 2
    assert count_jumps(order, shape) <= 0.03 * len(order)


def classical(dimensions: int, bits: int) -> torch.Tensor:
    """The order of the package hilbertcurve, whose first coordinate is our last."""
    points = HilbertCurve(bits, dimensions).points_from_distances(list(range(2 ** (dimensions * bits))))
    strides = torch.tensor([2 ** (bits * axis) for axis in range(dimensions)])
    return (torch.tensor(points, dtype=torch.int64) * strides).sum(1)


@pytest.mark.parametrize(
    ("dimensions", "bits"), [(2, 1), (2, 2), (2, 3), (2, 4), (2, 5), (2, 6), (3, 1), (3, 2), (3, 3), (3, 4)]
)
def test_powers_of_two_have_the_classical_curve(dimensions: int, bits: int):
    assert torch.equal(hilbert_order(*[2**bits] * dimensions), classical(dimensions, bits))


def test_jumps_are_counted():
    assert count_jumps(torch.arange(12), (3, 4)) == 2
    assert step_lengths(torch.tensor([0, 5, 1, 7]), (2, 2, 2)).tolist() == [2, 1, 2]
    assert count_jumps(hilbert_order(11, 11, 11), (11, 11, 11)) == JUMPS_OF_BOXES


@pytest.mark.parametrize(
    ("shape", "fragments"),
    [
        ((4,), ("(4,)", "(height, width)")),
        ((), ("()", "(height, width)")),
        ((2, 2, 2, 2), ("(2, 2, 2, 2)", "(depth, height, width)")),
        ((0, 4), ("(0, 4)", "at least 1")),
        ((4, -1), ("(4, -1)", "at least 1")),
        ((4, 4.0), ("(4, 4.0)", "integer")),
        ((True, 4), ("(True, 4)", "integer")),
        ((4, 2**31), ("2147483648", "below 2**31")),
        (((4, 4),), ("((4, 4),)", "(height, width)")),
    ],
)
def test_wrong_grids(shape, fragments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragments are checked below
        hilbert_order(*shape)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
