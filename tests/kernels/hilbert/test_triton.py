"""The kernel that moves rows, interpreted where there is no GPU, against PyTorch's gather."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.ordering.permutation import gather_rows, inverse_of

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ["float64", "float32", "bfloat16", "float16", "int64", "int8", "bool", "complex64"]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = torch.randint(-120, 120, shape, generator=torch.Generator().manual_seed(len(shape)))
    return (count % 2 == 0 if dtype == torch.bool else count.to(dtype)).to(DEVICE)


def permutation(rows: int, *batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.rand(*batch, rows, generator=generator).argsort(-1).to(DEVICE)


def check(x: torch.Tensor, index: torch.Tensor, dim: int) -> None:
    from dilated_attention_pytorch.kernels.hilbert.triton import permute_rows

    if index.dim() == 1:
        expected = x.movedim(dim, 0)[index].movedim(0, dim)
    else:
        entries = zip(x.movedim(dim, 1), index, strict=True)
        expected = torch.stack([entry[order] for entry, order in entries]).movedim(1, dim)
    for found in (permute_rows(x, index, dim), gather_rows(x, index, dim)):
        assert found.dtype == x.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 5, 48])
def test_every_dtype_and_width_of_words(dtype: str, columns: int):
    x = numbers(2, 37, columns, dtype=getattr(torch, dtype))
    check(x, permutation(37), 1)


@pytest.mark.parametrize(("shape", "dim"), [((50,), 0), ((33, 6), 0), ((2, 3, 20, 4), 2), ((2, 3, 20), 2), ((1, 7), 1)])
def test_every_dimension(shape, dim):
    check(numbers(*shape), permutation(shape[dim]), dim)


@pytest.mark.parametrize(("shape", "dim"), [((3, 20, 8), 1), ((3, 4, 20, 5), 2), ((3, 20), 1)])
def test_an_order_for_each_entry_of_a_batch(shape, dim):
    check(numbers(*shape), permutation(shape[dim], shape[0]), dim)


def test_more_rows_and_columns_than_a_tile():
    check(numbers(2, 70, 300, dtype=torch.float64), permutation(70), 1)
    check(numbers(1, 2500, 2), permutation(2500), 1)


def test_views():
    x = numbers(40, 2, 12).transpose(0, 1)
    check(x, permutation(40), 1)
    check(x[:, :, 1:], permutation(40), 1)
    check(numbers(1 + 20 * 6, dtype=torch.float16)[1:].view(20, 6), permutation(20), 0)  # not aligned to 4 bytes
    check(x[:, :1].expand(2, 30, 12), permutation(30), 1)


def test_nothing():
    check(numbers(2, 0, 4), permutation(0), 1)
    check(numbers(0, 3, 4), permutation(3), 1)


def test_inverses():
    for index in (permutation(30), permutation(30, 4)):
        assert torch.equal(index.gather(-1, inverse_of(index)), torch.arange(30, device=DEVICE).expand_as(index))
