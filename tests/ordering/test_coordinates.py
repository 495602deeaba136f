"""Orders of points with coordinates: against Skilling's transform for one point at a time, and the package's."""

from __future__ import annotations

import random

import pytest
import torch
from hilbertcurve.hilbertcurve import HilbertCurve

from dilated_attention_pytorch import hilbert_order, hilbert_order_from_coordinates
from dilated_attention_pytorch.kernels.hilbert.base import skilling_index
from dilated_attention_pytorch.ordering import GRID_ORDERS, order_from_coordinates

DTYPES = {7: torch.int8, 8: torch.uint8, 15: torch.int16, 31: torch.int32}


def check_random_set(seed: int) -> None:
    """A few points, clustered so that many share a cell, with bits given or not, in a dtype that holds them."""
    draw = random.Random(seed)
    dimensions = draw.choice((2, 3))
    bits = draw.randint(1, 31 if dimensions == 2 else 21)
    count, largest = draw.randint(1, 40), draw.choice((2, 2**bits))
    origin = [draw.randrange(2**bits) for _ in range(dimensions)]
    points = [tuple(min(start + draw.randrange(largest), 2**bits - 1) for start in origin) for _ in range(count)]
    dtype = draw.choice([dtype for most, dtype in DTYPES.items() if bits <= most] + [torch.int64])
    order = hilbert_order_from_coordinates(torch.tensor(points, dtype=dtype), bits=bits)
    keys = [skilling_index(point[::-1], bits) for point in points]
    assert order.tolist() == sorted(range(count), key=keys.__getitem__), seed
    if seed % 10 == 0:
        assert keys == HilbertCurve(bits, dimensions).distances_from_points([list(point[::-1]) for point in points])


@pytest.mark.parametrize("sets", [500, pytest.param(10_000, marks=pytest.mark.full)])
def test_random_sparse_sets(sets: int):
    for seed in range(sets):
        check_random_set(seed)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_all_cells_of_a_grid_have_its_order(dimensions: int, bits: int):
    cells = torch.cartesian_prod(*[torch.arange(2**bits)] * dimensions)
    for curve, grid_order in GRID_ORDERS.items():
        expected = grid_order(*[2**bits] * dimensions)
        assert torch.equal(order_from_coordinates(cells, curve=curve, bits=bits), expected), curve
    if bits % dimensions == 0:
        assert torch.equal(hilbert_order_from_coordinates(cells), hilbert_order(*[2**bits] * dimensions))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_more_points_than_a_block(dimensions: int):
    points = torch.randint(0, 2**12, (70_000, dimensions), generator=torch.Generator().manual_seed(1))
    order, few = hilbert_order_from_coordinates(points, bits=12), [0, 1, 32_767, 32_768, 65_535, 65_536, 69_999]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    keys = [skilling_index(points[row].flip(0).tolist(), 12) for row in few]
    assert sorted(few, key=lambda row: place[row]) == [row for _, row in sorted(zip(keys, few, strict=True))]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("given", ["integers", "floats"])
def test_an_entry_of_a_batch_does_not_depend_on_the_others(dimensions: int, given: str):
    generator = torch.Generator().manual_seed(dimensions)
    lengths, sides = (40, 1, 0, 25), (4, 1, 1, 3000)
    batch = torch.full((4, 40, dimensions), torch.nan if given == "floats" else -7)
    if given == "integers":
        batch = batch.long()
    alone = []
    for entry, (length, side) in enumerate(zip(lengths, sides, strict=True)):
        points = torch.randint(0, side, (length, dimensions), generator=generator)
        points = points * 0.25 - 1 if given == "floats" else points
        batch[entry, :length] = points
        alone.append(hilbert_order_from_coordinates(points).tolist())
    hidden = torch.arange(40) >= torch.tensor(lengths)[:, None]
    order = hilbert_order_from_coordinates(batch, key_padding_mask=hidden)
    for entry, length in enumerate(lengths):
        assert order[entry].tolist() == alone[entry] + list(range(length, 40))
    # The same rows with the padding in between.
    mixed = torch.randperm(40, generator=generator)
    between = hilbert_order_from_coordinates(batch[:, mixed], key_padding_mask=hidden[:, mixed])
    for entry, length in enumerate(lengths):
        rows = mixed[between[entry]]
        shown = mixed[~hidden[entry, mixed]].tolist()  # ties are stable: in the order given now
        assert sorted(rows[:length].tolist()) == sorted(shown)
        assert torch.equal(batch[entry, rows[:length]], batch[entry, order[entry, :length]])
        assert between[entry, length:].tolist() == sorted(between[entry, length:].tolist())


def test_floats_are_scaled_to_the_grid():
    cells = torch.randint(0, 16, (200, 2), generator=torch.Generator().manual_seed(2))
    cells[:2] = torch.tensor([[0, 0], [15, 15]])
    expected = hilbert_order_from_coordinates(cells, bits=4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for scale, shift in ((1, 0), (0.5, -3), (2**-10, 0), (64, 0)):
            points = (cells.double() * scale + shift).to(dtype)
            assert torch.equal(hilbert_order_from_coordinates(points, bits=4), expected)
    huge = torch.tensor([[-1.7e308, 0.0], [1.7e308, 0.0], [-1.6e308, 0.0]], dtype=torch.float64)
    assert hilbert_order_from_coordinates(huge).tolist() == [0, 2, 1]
    assert hilbert_order_from_coordinates(torch.full((5, 3), -2.5)).tolist() == list(range(5))


@pytest.mark.parametrize("sides", [(4, 64), (64, 4), (8, 64, 3)])
def test_axes_are_scaled_alike(sides: tuple[int, ...]):
    """A flat cloud stays flat, and its order is that of the same cells as integers."""
    cells = torch.cartesian_prod(*map(torch.arange, sides))
    expected = hilbert_order_from_coordinates(cells, bits=6)
    assert torch.equal(hilbert_order_from_coordinates(cells * 256.0, bits=6), expected)
    points = torch.stack((torch.zeros(50), torch.rand(50, generator=torch.Generator().manual_seed(3))), 1)
    assert torch.equal(hilbert_order_from_coordinates(points), points[:, 1].argsort(stable=True))


def test_no_points():
    assert hilbert_order_from_coordinates(torch.zeros(0, 2)).shape == (0,)
    assert hilbert_order_from_coordinates(torch.zeros(3, 0, 3, dtype=torch.int64)).shape == (3, 0)


POINTS = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("points", "options", "fragments"),
    [
        ([[0, 0]], {}, ("list", "torch.Tensor")),
        (POINTS[0], {}, ("(2,)", "(N, 2)", "(B, N, 3)")),
        (torch.zeros(4, 4), {}, ("(4, 4)", "(N, 2)")),
        (POINTS.bool(), {}, ("torch.bool", "integers or floating point")),
        (POINTS.to(torch.complex64), {}, ("complex64", "integers or floating point")),
        (torch.tensor([[0.0, torch.nan]]), {}, ("nan", "finite")),
        (torch.tensor([[0.0, -torch.inf]]), {}, ("-inf", "finite")),
        (torch.tensor([[0, -3]]), {}, ("-3", "at least 0")),
        (torch.tensor([[0, 2**31]]), {}, ("2147483648", "below 2**31 in 2-D")),
        (torch.tensor([[0, 0, 2**21]]), {}, ("2097152", "below 2**21 in 3-D")),
        (torch.tensor([[0, 8]]), {"bits": 3}, ("has 8", "below 2**3", "more bits, up to 31")),
        (POINTS, {"bits": 32}, ("bits is 32", "1 to 31 in 2-D")),
        (torch.zeros(4, 3), {"bits": 22}, ("bits is 22", "1 to 21 in 3-D")),
        (POINTS, {"bits": 0}, ("bits is 0", "1 to 31")),
        (POINTS, {"bits": 3.0}, ("bits is 3.0", "integer")),
        (POINTS, {"bits": True}, ("bits is True", "integer")),
        (POINTS, {"key_padding_mask": torch.zeros(3, dtype=torch.bool)}, ("(3,)", "bool (4,)", "True = padding")),
        (POINTS, {"key_padding_mask": torch.zeros(4)}, ("float32", "bool (4,)")),
        (POINTS, {"key_padding_mask": [False] * 4}, ("[False", "bool (4,)")),
        (POINTS, {"key_padding_mask": torch.zeros(4, dtype=torch.bool, device="meta")}, ("meta", "cpu", "one device")),
    ],
)
def test_wrong_input(points, options, fragments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragments are checked below
        hilbert_order_from_coordinates(points, **options)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_an_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="'peano'; choose one of 'hilbert', 'morton', 'snake', 'raster'"):
        order_from_coordinates(POINTS, curve="peano")
