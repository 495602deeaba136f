"""Shapes and options that every GPU backend is tried on: the fixtures `shape` and `options`."""

from __future__ import annotations

from typing import Any

import pytest

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
