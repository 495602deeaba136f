"""xPos: products depend on distances alone, and documents too long for its scale are refused."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.models.xpos import XPos, apply_xpos, centred_positions

DIM = 16


def scores(positions: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Products of one query with one key, laid at all pairs of positions."""
    query, key = torch.randn(2, DIM, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()
    rows = (1, positions.shape[1], 1, DIM)
    tables = XPos(DIM, 32).tables(positions, dtype)
    q, k = apply_xpos(query.expand(rows), key.expand(rows), tables)
    assert q.dtype == dtype
    return q[0, :, 0] @ k[0, :, 0].T


def test_products_depend_on_the_distance_alone() -> None:
    found = scores(centred_positions(40, None, torch.device("cpu")))
    for distance in range(-39, 40):
        diagonal = found.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-11, atol=1e-11)
    assert found[0].std() > 0.1
    torch.testing.assert_close(scores(torch.arange(40)[None] + 100), found, rtol=1e-8, atol=1e-8)


def test_decay_falls_behind_and_grows_ahead_of_the_query() -> None:
    xpos = XPos(DIM, 32)
    tables = xpos.tables(torch.tensor([[-320, 0, 320]]), torch.float64)
    assert torch.equal(tables.scale[0, 1], torch.ones(1, DIM // 2, dtype=torch.float64))
    slowest = (DIM - 2 + 0.4 * DIM) / (1.4 * DIM)
    assert float(tables.scale[0, 2, 0, -1]) == pytest.approx(slowest**10, rel=1e-5)
    assert float(tables.scale[0, 0, 0, 0]) == pytest.approx((1.4 / 0.4) ** 10, rel=1e-5)


def test_positions_are_centred_in_each_document() -> None:
    cpu = torch.device("cpu")
    assert centred_positions(5, None, cpu).tolist() == [[-2, -1, 0, 1, 2]]
    assert centred_positions(7, torch.tensor([0, 3, 3, 7]), cpu).diff().tolist() == [[1, 1, -3, 1, 1, 1]]


def test_documents_that_overflow_are_refused_and_shorter_ones_are_finite() -> None:
    xpos = XPos(DIM, 512)
    for rows, reach, dtype in (
        (30_000, 30_000, torch.float32),
        (60_000, 1024, torch.float32),
        (4000, 4000, torch.half),
    ):
        xpos.check_span(rows, reach, dtype)
    with pytest.raises(ValueError, match=r"a score beyond torch.float32 in a document of 40000 rows that sees 60000"):
        xpos.check_span(40_000, 60_000, torch.float32)
    with pytest.raises(ValueError, match=r"a query or key beyond torch.float16"):
        xpos.check_span(6000, 1024, torch.half)
    positions = centred_positions(30_000, None, torch.device("cpu"))[:, [0, 15_000, 29_999]]
    tables = xpos.tables(positions, torch.float32)
    q, k = apply_xpos(*torch.randn(2, 1, 3, 1, DIM).unbind(), tables)
    assert torch.isfinite(q[0, :, 0] @ k[0, :, 0].T).all()
