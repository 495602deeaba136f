"""The algebra of partial results, against one softmax over all keys."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dilated_attention_pytorch.merge import accumulator_dtype, add_zero_keys_, merge_


def partial(scores, values):
    lse = torch.logsumexp(scores, -1)
    return torch.softmax(scores, -1) @ values, lse


@pytest.mark.parametrize("cuts", [(10,), (1, 2, 30), (5, 5, 12)])
def test_parts_join_to_the_whole(cuts):
    torch.manual_seed(0)
    scores, values = torch.randn(3, 7, 40, dtype=torch.float64) * 30, torch.randn(3, 40, 5, dtype=torch.float64)
    whole = partial(scores, values)
    bounds = (0, *cuts, 40)
    out, lse = torch.zeros(3, 7, 5, dtype=torch.float64), torch.full((3, 7), -torch.inf, dtype=torch.float64)
    for a, b in reversed(list(pairwise(bounds))):
        if a < b:
            merge_(out, lse, *partial(scores[..., a:b], values[:, a:b]))
    torch.testing.assert_close(out, whole[0], atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(lse, whole[1], atol=1e-13, rtol=0)


def test_the_empty_partial_is_neutral():
    out, lse = torch.randn(4, 3), torch.randn(4)
    lse[2:], out[2:] = -torch.inf, 0
    before = out.clone(), lse.clone()
    merge_(out, lse, torch.full((4, 3), 7.0), torch.full((4,), -torch.inf))
    assert torch.equal(out, before[0])
    assert torch.equal(lse, before[1])
    merge_(out, lse, torch.full((4, 3), 7.0), torch.tensor([-torch.inf, -torch.inf, 2.0, -torch.inf]))
    assert torch.equal(out[2], torch.full((3,), 7.0))
    assert lse[2] == 2
    assert torch.equal(out[3], torch.zeros(3))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_distant_sizes_do_not_overflow(size):
    out, lse = torch.ones(1, 2), torch.tensor([size])
    merge_(out, lse, torch.zeros(1, 2), torch.tensor([0.0]))
    assert torch.equal(out, torch.full((1, 2), float(size > 0)))
    assert lse.item() == max(size, 0.0)


def test_strided_views_are_written_through():
    out, lse = torch.zeros(6, 4), torch.full((6,), -torch.inf)
    merge_(out[1::2], lse[1::2], torch.ones(3, 4, dtype=torch.bfloat16), torch.zeros(3))
    assert torch.equal(out.sum(1), torch.tensor([0.0, 4, 0, 4, 0, 4]))


def test_zero_keys_count_in_the_denominator_only():
    scores, values = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    out, lse = partial(scores, values)
    add_zero_keys_(out, lse, 4)
    padded = partial(torch.cat([scores, torch.zeros(5, 4)], 1), torch.cat([values, torch.zeros(4, 3)]))
    torch.testing.assert_close(out, padded[0])
    torch.testing.assert_close(lse, padded[1])
    out, lse = torch.zeros(1, 3), torch.tensor([-torch.inf])
    add_zero_keys_(out, lse, 3)
    assert torch.equal(out, torch.zeros(1, 3))
    assert lse.item() == pytest.approx(math.log(3))


def test_accumulators_are_wide():
    assert accumulator_dtype(torch.bfloat16) == accumulator_dtype(torch.float16) == torch.float32
    assert accumulator_dtype(torch.float64) == torch.float64
