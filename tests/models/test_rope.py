"""Rotary embedding: against complex numbers, relative, exact far out and under bfloat16."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.models.rope import document_positions, rotary_tables, rotate


def by_complex_numbers(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Pair i of (B, N, H, D) as one complex number, times exp(1j * position * base**(-2 i / D))."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    for i in range(half):
        angle = positions.double() * base ** (-2 * i / x.shape[-1])
        z[..., i] *= torch.polar(torch.ones_like(angle), angle)[:, :, None]
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("first", [0, -7, 1_000_000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_rotation_equals_complex_multiplication(dtype: torch.dtype, tolerance: float, first: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 50, 3, 16, dtype=torch.float64).to(dtype)
    positions = first + torch.stack([torch.arange(50), torch.arange(50) * 3])
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    turned = rotate(x, rotary_tables(positions, 16, base=500.0, dtype=table_dtype))
    assert turned.dtype == dtype
    gold = by_complex_numbers(x, positions, 500.0)
    assert (turned.double() - gold).abs().max() <= tolerance * gold.abs().max()


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        q, k = (
            rotate(x, rotary_tables(torch.tensor([[p]]), 32, base=10000.0, dtype=torch.float64))
            for x, p in ((query, query_position), (key, key_position))
        )
        return (q * k).sum()

    torch.testing.assert_close(score(40, 17), score(100_040, 100_017))
    torch.testing.assert_close(score(3, 3), (query * key).sum())
    assert (score(40, 17) - score(40, 18)).abs() > 0.1


def test_positions_restart_with_documents_and_shift_with_key_start() -> None:
    tokens = torch.zeros(1, 6)
    assert document_positions(tokens).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert document_positions(tokens, key_start=-2).tolist() == [[-2, -1, 0, 1, 2, 3]]
    boundaries = torch.tensor([0, 1, 1, 4, 6], dtype=torch.int32)  # with an empty document
    assert document_positions(tokens, cu_seqlens=boundaries).tolist() == [[0, 0, 1, 2, 0, 1]]
    rows = document_positions(torch.zeros(2, 3), key_start=torch.tensor([7, -1]))
    assert rows.tolist() == [[7, 8, 9], [-1, 0, 1]]


def test_shapes_that_do_not_fit_are_value_errors() -> None:
    with pytest.raises(ValueError, match=r"key_start has shape \(3,\); give an int or shape \(2,\)"):
        document_positions(torch.zeros(2, 3), key_start=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \(1, 2\)"):
        document_positions(torch.zeros(1, 3), cu_seqlens=torch.tensor([[0, 3]]))
