"""Shapes and options that every GPU backend is tried on: the fixtures `shape` and `options`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

SHAPE = {"key_rows": 70, "segment_lengths": (16, 40, 128), "dilation_rates": (1, 3, 4), "kv_heads": 4}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "interleaved": {"head_offsets": "interleaved"},
    "grouped": {"kv_heads": 2, "group": 3},
    "value_dim": {"head_dim": 24, "value_dim": 40},
    "unaligned": {"head_dim": 17, "value_dim": 3},
    "scale": {"scale": 0.7, "is_causal": True},
    "random_mask": {"hidden": "random", "batch": 2},
    "random_mask_causal": {"hidden": "random", "batch": 2, "is_causal": True},
    "suffix_zeros": {"hidden": (13, 40), "batch": 2, "padding": "zeros"},
    "zeros": {"padding": "zeros", "mixing_grad": "detached"},
    "detached": {"mixing_grad": "detached", "is_causal": True},
    "packed": {"cuts": (9, 9, 31, 64)},
    "packed_causal": {"cuts": (9, 9, 31, 64), "is_causal": True},
    "left_padding": {"key_start": (-20, -3), "batch": 2, "is_causal": True},
    "evicted": {"key_start": 37, "query_rows": 5, "is_causal": True},
    "one_query": {"query_rows": 1, "is_causal": True},
    "chunk": {"query_rows": 29},
    "one_row": {"key_rows": 1},
    "more_rate_than_heads": {"kv_heads": 2, "segment_lengths": (20, 64), "dilation_rates": (5, 8)},
    "heads_no_multiple": {"kv_heads": 5, "segment_lengths": (15, 64), "dilation_rates": (1, 4)},
    "heads_first": {"layouts": ("heads_first",) * 4, "batch": 2},
    "packed_projection": {"layouts": ("packed", "packed", "packed", "strided_rows"), "batch": 2},
    "expanded": {"layouts": ("columns", "expanded", "columns", "expanded"), "batch": 2},
    "folded": {"key_rows": 64, "segment_lengths": (16, 32), "dilation_rates": (1, 2), "batch": 3},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``options`` runs with each of them."""
    if "options" in metafunc.fixturenames:
        metafunc.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def shape() -> dict[str, Any]:
    return dict(SHAPE)


@pytest.fixture
def key_counts() -> Callable[..., torch.Tensor]:
    """(heads, rows) int64: how many keys, with multiplicity, each row of one document attends to."""

    def count(rows: int, heads: int, patterns: tuple[tuple[int, int], ...], *, is_causal: bool) -> torch.Tensor:
        position = torch.arange(rows)
        expected = torch.zeros(heads, rows, dtype=torch.int64)
        for w, r in patterns:
            segment = position // w
            for h in range(heads):
                active = (position % w % r == h // -(-heads // r)).long()
                ends = torch.zeros(int(segment.max()) + 1, dtype=torch.int64).index_add_(0, segment, active)
                so_far = active.cumsum(0) - (ends.cumsum(0) - ends)[segment]
                expected[h] += active * (so_far if is_causal else ends[segment])
        return expected

    return count
